"""What ``prune``, ``distill`` and ``qat`` share: texts, training options, their report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronk.errors import RequestError

if TYPE_CHECKING:
    from pronk.compress.smaller import Text
    from pronk.compress.training import Recipe

__all__ = ["add_output", "add_text", "add_training", "print_measured", "recipe", "texts"]

STEPS = 200
_JUDGED = 1 << 16  # tokens, more than are judged unless a window is longer


def add_output(parser: argparse.ArgumentParser) -> None:
    """``-o`` and ``--threads``."""
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="where the model goes")  # fmt: skip
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of torch (default: all cores)"
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """``--calibration`` and ``--window``."""
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="UTF-8 text to measure and learn from, its last tenth kept to judge on (default: "
        "Python's topics)",
    )  # fmt: skip
    parser.add_argument("--judge", metavar="FILE", help="UTF-8 text to judge on instead")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens at a time")


def add_training(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    """How a student is trained."""
    group = parser.add_argument_group("training on the teacher's predictions")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="windows of a step")
    group.add_argument("--learning-rate", type=float, default=learning_rate, metavar="X")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="of the distributions"
    )
    group.add_argument(
        "--hidden-weight", type=float, default=0.0, metavar="X",
        help="also match hidden states, where both are equally wide",
    )  # fmt: skip
    group.add_argument(
        "--sampled", type=int, default=0, metavar="N",
        help="learn from N windows that the teacher writes, not from the calibration text",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N")
    group.add_argument(
        "--precision", choices=("auto", "bf16", "f32"), default="auto",
        help="of matrix products (auto: bf16 where the CPU has it)",
    )  # fmt: skip


def recipe(args: argparse.Namespace, steps: int) -> Recipe:
    """The training options as a recipe."""
    from pronk.compress.training import Recipe

    return Recipe(
        steps=steps, window=args.window, batch=args.batch, learning_rate=args.learning_rate,
        temperature=args.temperature, hidden=args.hidden_weight, seed=args.seed,
        precision=args.precision,
    )  # fmt: skip


def texts(
    args: argparse.Namespace, teacher: Path, progress: Callable[[str, int, int], None]
) -> Text:
    """The texts of a run; what the teacher is to write, it writes here."""
    from pronk.checkpoint.open import open_checkpoint
    from pronk.compress.smaller import Text
    from pronk.compress.torch_model import need_torch
    from pronk.compress.training import split_text
    from pronk.evaluate.corpus import encode, load_corpus

    if args.window < 2:
        raise RequestError(f"--window must be 2 tokens or more, not {args.window}")
    if args.sampled < 0:
        raise RequestError(f"--sampled must be 0 or more, not {args.sampled}")
    need_torch("this verb")
    threads(args)
    corpus = load_corpus(args.calibration)
    other = None if args.judge is None else load_corpus(args.judge)
    with open_checkpoint(teacher) as ckpt:
        tokenizer = ckpt.load_tokenizer()
        ids = encode(corpus, tokenizer)
        learned, judged = split_text(ids, args.window)
        if other is not None:
            learned, judged = ids, encode(other, tokenizer, max(_JUDGED, args.window))
    made = _sampled(args, teacher, progress) if args.sampled else learned
    return Text(learned, made, judged)


def threads(args: argparse.Namespace) -> None:
    """Have torch's libraries use so many threads; they read it when they are loaded."""
    from pronk.compress.torch_model import use_threads
    from pronk.model import choose_threads

    use_threads(choose_threads(args.threads))


def _sampled(
    args: argparse.Namespace, teacher: Path, progress: Callable[[str, int, int], None]
) -> list[int]:
    """Text that the teacher writes from a random first token (LLM-QAT, arXiv:2305.17888)."""
    import random

    from pronk.model import load
    from pronk.spec import SamplingParams

    rng, out = random.Random(args.seed), []
    with load(teacher, args.threads, args.window) as model:
        bos = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
        for i in range(args.sampled):
            progress("sampling text", i, args.sampled)
            start = [*bos, rng.randrange(model.tokenizer.vocab_size)]
            params = SamplingParams(
                temperature=1.0, seed=args.seed + i, max_tokens=args.window - len(start),
                ignore_eos=True,
            )  # fmt: skip
            out += start + [piece.token for piece in model.generate(start, params)]
    # A step may start anywhere; so there is one window more than the least.
    return out if args.sampled > 1 else out * 2


def print_measured(report: dict[str, Any], first: str) -> None:
    """A table of what was measured, stage by stage."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("on text it has not seen")
    for name in ("perplexity", "KL", "top-1"):
        table.add_column(name, justify="right")
    stages = report["measured"]
    before = next(iter(stages.values()))["teacher_perplexity"]
    table.add_row(first, f"{before:.2f}", "", "")
    for name, one in stages.items():
        table.add_row(
            name, f"{one['perplexity']:.2f}", f"{one['kl']:.4f}", f"{one['top1_agreement']:.1%}"
        )
    console = Console()
    console.print(table)
    if report.get("resumed_at"):
        console.print(f"went on at step {report['resumed_at']}", markup=False)
    console.print(f"written to {report['directory']}", markup=False, soft_wrap=True)
