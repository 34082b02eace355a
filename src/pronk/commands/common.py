"""What several verbs share: model arguments, loading with progress, JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronk.errors import RequestError

if TYPE_CHECKING:
    from pronk.model import Model
    from pronk.spec import SamplingParams

__all__ = [
    "add_attention",
    "add_context",
    "add_expert_memory",
    "add_experts",
    "add_json",
    "add_kv",
    "add_model",
    "add_plot",
    "add_runtime",
    "add_sampling",
    "add_speculation",
    "note",
    "open_model",
    "print_json",
    "runtime_words",
    "sampling",
]


def add_model(parser: argparse.ArgumentParser) -> None:
    """The MODEL argument."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name, pypi:, hf: or s3:// address, or a path"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_attention(parser: argparse.ArgumentParser) -> None:
    """``--attention`` and ``--rope-scaling``."""
    parser.add_argument(
        "--attention", metavar="POLICY",
        help="window=512,global-every=4,sinks=4: all but every 4th layer see the last 512 "
        "positions and the first 4; global=0:4:8 lists the layers that see all, global=auto:8 "
        "measures which should",
    )  # fmt: skip
    parser.add_argument(
        "--rope-scaling", metavar="KIND:FACTOR",
        help="yarn:4, linear:2 or dynamic:2: a longer context than the model was made for",
    )  # fmt: skip


def add_kv(parser: argparse.ArgumentParser) -> None:
    """``--kv``."""
    parser.add_argument(
        "--kv", choices=("bf16", "int8", "int4"), default="bf16",
        help="elements of the KV cache: int8 takes half the memory, int4 less than a third; each "
        "loses some precision, which eval measures",
    )  # fmt: skip


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Threads, and what a model is run with: cache, activations, attention, packed weights."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: all cores)")
    add_kv(parser)
    parser.add_argument(
        "--activations", choices=("int12", "int8"), default="int12",
        help="what meets quantized weights: int8 is faster on prompts and in batches, and loses "
        "some precision, which eval measures (with AMX, 12 bits cost nothing)",
    )  # fmt: skip
    add_attention(parser)
    parser.add_argument(
        "--sparse-mlp", metavar="HOW",
        help="MLPs' activations near zero count as zero: kl=0.01 calibrates thresholds to this "
        "divergence, keep=0.6 to this share left; threshold=0.05; or a .json of thresholds",
    )  # fmt: skip
    parser.add_argument(
        "--no-packed-cache", dest="packed_cache", action="store_false",
        help="neither read packed weights from disk nor keep them there",
    )  # fmt: skip


def add_experts(parser: argparse.ArgumentParser) -> None:
    """``--dynamic-experts`` and ``--expert-memory``."""
    parser.add_argument(
        "--dynamic-experts", default="", metavar="P[:N]",
        help="experts of a token: the likeliest that make up the share P, at least N (1); or "
        "top-p=P,min=N,max=N",
    )  # fmt: skip
    add_expert_memory(parser)


def add_expert_memory(parser: argparse.ArgumentParser) -> None:
    """``--expert-memory``."""
    parser.add_argument(
        "--expert-memory", metavar="SIZE",
        help="memory for a mixture's experts: the hot ones are kept there, the others are read "
        "from disk when they are chosen (default: all are in memory)",
    )  # fmt: skip


def runtime_words(args: argparse.Namespace) -> list[str]:
    """What `add_runtime` and `add_experts` declare, as words for another command."""
    parser = argparse.ArgumentParser(add_help=False)
    add_runtime(parser)
    add_experts(parser)
    words: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest)
        if value != action.default:
            words += [action.option_strings[0], *([] if action.nargs == 0 else [str(value)])]
    return words


def add_speculation(parser: argparse.ArgumentParser, default: bool) -> None:
    """``--speculate`` and ``--no-speculate``; what does not declare them runs without."""
    parser.add_argument(
        "--speculate", action=argparse.BooleanOptionalAction, default=default,
        help="draft what repeats earlier text while that is faster; the tokens are the same "
        f"(default: {'on' if default else 'off'})",
    )  # fmt: skip


def add_plot(parser: argparse._ActionsContainer, what: str) -> None:
    """``--plot``."""
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help=f"{what} (.svg, .png or .html; needs matplotlib)",
    )  # fmt: skip


def add_context(parser: argparse.ArgumentParser) -> None:
    """``--context``."""
    parser.add_argument("--context", type=int, metavar="N", help="most tokens of a sequence")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and when generation ends."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="0 keeps all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus, (0, 1]")
    group.add_argument("--min-p", type=float, default=0.0, metavar="X", help="[0, 1]")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is off"
    )
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same tokens")
    group.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="most tokens to generate"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable"
    )


def sampling(args: argparse.Namespace) -> SamplingParams:
    """Sampling parameters from the arguments of `add_sampling`."""
    from pronk.spec import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
    )


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(data: dict[str, Any]) -> None:
    """The verb's result as one JSON object on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def open_model(
    name: str,
    args: argparse.Namespace,
    context: int | None,
    tell: Callable[[str], None] = note,
) -> tuple[Model, float]:
    """Load a model and say what was converted; returns it and the seconds it took.

    ``args`` holds what `add_runtime` declares.
    """
    from pronk.checkpoint.sources import resolve
    from pronk.commands.choice import choose
    from pronk.commands.sparse import choose_sparse
    from pronk.model import load

    path = resolve(name)  # a download is not part of the load time
    attention = choose(path, args)
    sparse = choose_sparse(path, args, attention)
    start = time.perf_counter()
    model = load(
        path, args.threads, context,
        kv_dtype=args.kv, activations=args.activations, packed_cache=args.packed_cache,
        kv_tokens=getattr(args, "kv_tokens", None),
        max_sequences=getattr(args, "max_sequences", 16),
        target_tpot=getattr(args, "target_tpot", None),
        attention=attention, rope_scaling=args.rope_scaling,
        speculate=getattr(args, "speculate", False),
        experts=getattr(args, "dynamic_experts", ""),
        expert_memory=getattr(args, "expert_memory", None),
        sparse_mlp=sparse,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    for c in model.conversions:
        tell(
            f"pronk: {c.tensors} tensors stored as {c.stored} run as {c.runs_as} "
            f"(relative error of the weights {c.error:.2%})"
        )
    return model, seconds


def first_prompt(text: str) -> str:
    """A prompt from the command line; ``-`` reads standard input."""
    if text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError:
            raise RequestError("standard input is not UTF-8 text") from None
    if not text.strip():
        raise RequestError("the prompt is empty: give some text")
    return text
