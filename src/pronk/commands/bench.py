"""``pronk bench``: speed, memory, and how near both come to the machine's limits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pronk.commands import common
from pronk.device.memory import peak_memory
from pronk.errors import RequestError
from pronk.units import format_bytes

if TYPE_CHECKING:
    from pronk.graph.ir import Weight
    from pronk.model import Model

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    common.add_model(parser)
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens to generate")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="medians over so many")
    common.add_context(parser)
    common.add_runtime(parser)
    common.add_speculation(parser, default=False)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.device.limits import measure_limits
    from pronk.evaluate.corpus import default_corpus, encode
    from pronk.evaluate.latency import latency

    if args.prompt_tokens < 1:
        raise RequestError(f"--prompt-tokens must be at least 1, not {args.prompt_tokens}")
    model, load_time = common.open_model(args.model, args, args.context)
    room = model.context - args.tokens
    if room < 1:
        raise RequestError(
            f"{args.tokens} tokens do not fit the context of {model.context}: give --tokens less"
        )
    prompt = encode(default_corpus(), model.tokenizer, min(args.prompt_tokens, room))
    figures = latency(model, prompt, args.tokens, args.runs)
    peak = peak_memory()  # before the limits are measured: those need memory of their own
    memory, threads, isa, spec = model.memory, model.threads, model.isa, model.spec
    parameters = _prompt_parameters(model)
    streamed = _bytes_per_token(model)
    path = str(model.path)
    drafted, accepted = model.speculation.drafted, model.speculation.accepted
    model.close()
    limits = measure_limits(threads)
    result: dict[str, Any] = {
        "model": path,
        "isa": isa,
        "threads": threads,
        "load_time": load_time,
        **figures.to_dict(),
        "drafted": drafted,
        "accepted": accepted,
        "peak_memory": peak,
        "memory": memory.to_dict(),
        "bytes_per_token": streamed,
        "bandwidth": limits.bandwidth,
        "int8_peak": limits.int8_peak,
        "fraction_of_bandwidth": figures.decode * streamed / limits.bandwidth,
        "fraction_of_peak": figures.prefill * 2 * parameters / limits.int8_peak,
    }
    if args.json:
        common.print_json(result)
        return
    print(f"{spec.name or path}: {threads} threads, {isa}")
    print(f"  load         {load_time:8.2f} s")
    print(f"  first token  {figures.ttft * 1000:8.1f} ms after {figures.prompt_tokens} tokens")
    print(
        f"  prefill      {figures.prefill:8.1f} tokens/s, "
        f"{result['fraction_of_peak']:.0%} of {limits.int8_peak / 1e12:.2f} Tera-op/s int8"
    )
    print(
        f"  decode       {figures.decode:8.1f} tokens/s, "
        f"{result['fraction_of_bandwidth']:.0%} of {limits.bandwidth / 1e9:.1f} GB/s"
    )
    if drafted:
        print(f"  drafts       {accepted / drafted:8.0%} of {drafted} tokens held, over all runs")
    print(f"  peak memory  {format_bytes(peak):>8}")


def _matrices(model: Model) -> list[tuple[Weight, bool]]:
    """Matrices that a token is multiplied with, and whether every prompt token is.

    The head is applied to the last token of a prompt only; an embedding of its own is looked up.
    """
    graph = model.program.graph
    return [
        (graph.weights[name], graph.values[op.output].rows == "T")
        for op in graph.ops
        if op.kind == "matmul"
        for name in op.weights
        if graph.weights[name].rows > 1
    ]


def _prompt_parameters(model: Model) -> int:
    return sum(w.rows * w.cols for w, prompt in _matrices(model) if prompt)


def _bytes_per_token(model: Model) -> int:
    """Bytes of weights that a decode step reads; the cache is left out, being short here."""
    from pronk.graph.memory import weight_bytes

    return sum(weight_bytes(w) for w, _ in _matrices(model))
