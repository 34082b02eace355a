"""``pronk serve``: models over HTTP, as OpenAI's clients expect them."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pronk.commands import common
from pronk.errors import BudgetError, RequestError
from pronk.serve.config import ServeConfig, ServeLimits
from pronk.units import format_bytes, parse_seconds, parse_size

if TYPE_CHECKING:
    from pronk.serve.guard.filters import Guard
    from pronk.serve.hosted import Hosted

__all__ = ["configure", "run"]

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(?!=)(.+)", re.DOTALL)
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
_GRPC_NEEDED = ("grpc", "grpc_health", "grpc_reflection")
_CONTEXTS = 4  # full sequences that the KV cache holds, unless told


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="+",
        help="a name, an address or a path; NAME=MODEL serves it as NAME",
    )  # fmt: skip
    common.add_context(parser)
    common.add_runtime(parser)
    common.add_experts(parser)
    common.add_speculation(parser, default=True)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--kv-tokens", type=int, metavar="N",
        help=f"tokens that the KV cache holds over all requests (default: {_CONTEXTS} contexts)",
    )  # fmt: skip
    group.add_argument(
        "--max-sequences", type=int, default=16, metavar="N",
        help="requests that run at once (16)",
    )  # fmt: skip
    group.add_argument(
        "--target-tpot", type=parse_seconds, metavar="TIME",
        help="what an output token may take while prompts are computed, such as 50ms",
    )  # fmt: skip
    _add_reach(parser)
    _add_limits(parser)
    common.add_json(parser)


def _add_reach(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reach")
    for name, kind, default, metavar, what in (
        ("--host", str, "127.0.0.1", "ADDRESS", "where to listen (127.0.0.1)"),
        ("--port", int, 8000, "N", "0 takes a free one (8000)"),
        ("--otlp-endpoint", str, None, "URL",
         "send a trace of every request to this collector of OpenTelemetry, without any text"),
        ("--api-key-file", Path, None, "FILE",
         "a name and a key a line: every route but /health and /ready then wants one"),
        ("--audit", Path, None, "FILE", "append who asked for what, sealed, without any text"),
        ("--audit-max-bytes", str, "64MiB", "BYTES", "after which that log goes on in a new file"),
        ("--guard", Path, None, "FILE", "filters over what is asked and answered, in TOML"),
        ("--grpc-port", int, None, "N", "where to listen for gRPC too; 0 takes a free one"),
        ("--tls-cert", Path, None, "FILE", "a PEM certificate"),
        ("--tls-key", Path, None, "FILE", "its PEM key"),
    ):  # fmt: skip
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=what)
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text",
        help="json: a line of JSON for every request and every warning, on stderr (text)",
    )  # fmt: skip
    group.add_argument(
        "--audit-text", action="store_true",
        help="have that log hold prompts and answers too, personal data redacted",
    )  # fmt: skip
    for name, metavar, what in (
        ("--cors-origin", "ORIGIN", "a web origin whose pages may call the server; repeatable"),
        ("--allow-host", "NAME", "another name of a server on the loopback; repeatable"),
    ):
        group.add_argument(name, action="append", default=[], metavar=metavar, help=what)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group, most = parser.add_argument_group("limits"), ServeLimits()
    for name, kind, default, metavar, what in (
        ("--max-body", str, str(most.body), "BYTES", "of a request (2MiB)"),
        ("--max-queue", int, most.queue, "N",
         f"generations that may wait; more are refused at once ({most.queue})"),
        ("--target-ttft", parse_seconds, None, "TIME",
         "a request whose first token would take longer, such as 5s, is refused at once (any)"),
        ("--key-rate", float, None, "N", "requests a minute of a key (any number)"),
        ("--key-concurrency", int, None, "N", "requests of a key at once (any number)"),
        ("--max-completions", int, most.completions, "N",
         f"texts of one request: prompts times n ({most.completions})"),
        ("--drain", float, most.drain, "SECONDS",
         f"what running requests get after SIGTERM ({most.drain:g})"),
    ):  # fmt: skip
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=what)


def _config(args: argparse.Namespace) -> ServeConfig:
    limits = ServeLimits(
        body=parse_size(args.max_body), queue=args.max_queue, target_ttft=args.target_ttft,
        per_minute=args.key_rate,
        concurrent=args.key_concurrency, completions=args.max_completions, drain=args.drain,
    )  # fmt: skip
    return ServeConfig(
        host=args.host, port=args.port, grpc_port=args.grpc_port, key_file=args.api_key_file,
        origins=tuple(args.cors_origin), hosts=tuple(args.allow_host),
        tls_cert=args.tls_cert, tls_key=args.tls_key,
        audit=args.audit, audit_bytes=parse_size(args.audit_max_bytes), audit_text=args.audit_text,
        guard=args.guard,
        limits=limits,
    )  # fmt: skip


def _named(models: Sequence[str]) -> dict[str, str]:
    """Addresses by the names to serve them as."""
    named: dict[str, str] = {}
    for given in models:
        match = _NAMED.fullmatch(given)
        name, address = match.groups() if match else (Path(given).stem or given, given)
        if name in named:
            raise RequestError(f"two models would be served as {name}: give them names, NAME=MODEL")
        named[name] = address
    return named


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    needed = _NEEDED if args.grpc_port is None else (*_NEEDED, *_GRPC_NEEDED)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        extra = "serve" if missing[0] in _NEEDED else "serve,grpc"
        raise RequestError(
            f"pronk serve needs {missing[0]}, which is not installed: pip install 'pronk[{extra}]'"
        )
    config, named = _config(args), _named(args.models)
    guard = _guard(config)
    from pronk import __version__
    from pronk.device.footprint import ALLOWANCE
    from pronk.device.memory import resident_memory

    # Before models are loaded, so that their plans count what this takes.
    from pronk.serve.http.app import make_app
    from pronk.serve.http.run import Server, bind, serve
    from pronk.serve.log import configure_log
    from pronk.serve.trace import open_tracer

    if config.grpc_port is not None:
        import pronk.serve.grpc.server  # noqa: F401 (loaded, not used)
    configure_log(args.log_format)
    tell = _teller(args.log_format)
    with contextlib.ExitStack() as stack:
        tracer = open_tracer(args.otlp_endpoint, __version__)
        sock = stack.enter_context(bind(config.host, config.port))
        if config.grpc_port is not None:
            with bind(config.host, config.grpc_port) as found:  # gRPC takes it itself, later
                config = replace(config, grpc_port=found.getsockname()[1])
        hosted = [_open(name, address, args, tell, stack) for name, address in named.items()]
        # What comes and goes; and what RE2's automata still grow by over some hundred requests.
        allowance = ALLOWANCE * (2 if guard is not None or config.audit_text else 1)
        # The least that it takes: what does not fit is refused before it listens.
        _plan(hosted, resident_memory(), allowance)

        def settled() -> None:
            # What is there by now stays. Collections that leave it out are short, and come more
            # often: Python waits until garbage is a quarter of all that it looks at.
            gc.collect()
            gc.freeze()
            stack.callback(gc.unfreeze)
            total, overhead = _plan(hosted, resident_memory(), allowance)
            tell(
                f"pronk: {format_bytes(total)} planned, {format_bytes(overhead)} of it the process"
            )

        served = make_app(
            hosted, config, resident_memory, __version__,
            guard=guard, tracer=tracer, settled=settled,
        )  # fmt: skip
        stack.callback(served.close)
        host, port = sock.getsockname()[:2]
        scheme = "https" if config.tls_cert else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

        def started(server: Server) -> None:
            if args.json:
                data = {"url": url, "models": list(named), "grpc_port": config.grpc_port}
                print(json.dumps(data), flush=True)
            else:
                tell(f"pronk: {', '.join(named)} at {url} (chat: /, figures: /dashboard)")
                if config.grpc_port is not None:
                    tell(f"pronk: gRPC at {host}:{config.grpc_port}")

        serve(served, config, sock, started)


def _guard(config: ServeConfig) -> Guard | None:
    """The filters that were asked for; what they need is looked for before any model is loaded."""
    if config.guard is None and not config.audit_text:
        return None
    from pronk.device.memory import trim
    from pronk.serve.guard.config import read_guard, require_guard
    from pronk.serve.guard.pii import pii_rules

    require_guard()
    if config.audit_text:
        pii_rules()  # what the log's texts are redacted by
    guard = read_guard(config.guard) if config.guard is not None else None
    trim()  # patterns took more while they were compiled
    return guard


def _teller(form: str) -> Callable[[str], None]:
    """Where notes of the start go: as they are, or into the log."""
    if form == "text":
        return common.note
    log = logging.getLogger("pronk.serve")
    return lambda text: log.info(text.removeprefix("pronk: "))


def _plan(hosted: Sequence[Hosted], resident: int, allowance: int) -> tuple[int, int]:
    """Count what the process takes beside the models' regions: once, with the first of them.

    Parameters
    ----------
    hosted : sequence of Hosted
    resident, allowance : int
        Bytes that the process takes now, and may take more.

    Returns
    -------
    int, int
        Bytes planned in all, and for the process.

    Raises
    ------
    BudgetError
        If a bundle's budget does not hold all of it.
    """
    regions = sum(model.memory.total - model.memory.overhead for model in hosted)
    overhead = max(0, resident - regions) + allowance
    for index, model in enumerate(hosted):
        model.memory = replace(model.memory, overhead=0 if index else overhead)
    total = regions + overhead
    for model in hosted:
        if model.budget is not None and total > model.budget.memory:
            raise BudgetError(
                f"{model.name} was fitted to {format_bytes(model.budget.memory)}, but serving "
                f"takes {format_bytes(total)} in all: use a shorter --context, or fit it again "
                "to a larger budget"
            )
    return total, overhead


def _open(
    name: str,
    address: str,
    args: argparse.Namespace,
    tell: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> Hosted:
    """Load a model and start its engine's thread; the stack ends both."""
    from concurrent.futures import ThreadPoolExecutor

    from pronk.checkpoint.open import open_checkpoint
    from pronk.checkpoint.sources import resolve
    from pronk.graph.program import choose_context
    from pronk.serve.hosted import Hosted

    path = resolve(address)
    with open_checkpoint(path) as checkpoint:
        budget, spec = checkpoint.budget, checkpoint.spec
    # What a bundle was fitted to, it keeps.
    if args.kv_tokens is None and budget is None and args.rope_scaling is None:
        args = argparse.Namespace(**vars(args))
        args.kv_tokens = _CONTEXTS * choose_context(spec, args.context)
    model, seconds = common.open_model(str(path), args, args.context, tell)
    stack.callback(model.close)
    regions = model.memory.total - model.memory.overhead
    tell(f"pronk: {name}: {format_bytes(regions)}, loaded in {seconds:.1f} s")
    pool = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="pronk-text"))
    engine = stack.enter_context(model.service())
    hosted = Hosted(
        name, model.tokenizer, model.spec, model.memory, model.context, engine, pool,
        args.max_sequences, budget,
    )  # fmt: skip
    hosted.read_vocabulary()
    return hosted
