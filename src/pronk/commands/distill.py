"""``pronk distill``: train a model on the predictions of a larger one."""

from __future__ import annotations

import argparse

from pronk.commands import common, recovery

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="STUDENT", help="a model, such as one that was pruned")
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="what to learn from")
    parser.add_argument("--steps", type=int, default=recovery.STEPS, metavar="N")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is written"
    )
    recovery.add_text(parser)
    recovery.add_training(parser, 3e-4)
    recovery.add_output(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.sources import resolve
    from pronk.commands.progress import Progress
    from pronk.compress.smaller import distill

    recipe = recovery.recipe(args, args.steps)
    student, teacher = resolve(args.model), resolve(args.teacher)
    with Progress("distilling") as progress:
        text = recovery.texts(args, teacher, progress.stage)
        report = distill(
            student, teacher, text, args.output, recipe, dtype=args.dtype, tell=progress.stage
        )
    if args.json:
        common.print_json(report)
    else:
        recovery.print_measured(report, "teacher")
