"""``pronk qat``: train a model on the grid that it will be stored on."""

from __future__ import annotations

import argparse

from pronk.commands import common, recovery

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Quantization-aware training: the model learns its own predictions with weights on a "
        "grid, and a bundle holds exactly that grid. Codes of 2, 3 and 4 bits are stored and run "
        "as int4 with a scale for each 32 weights, 4.5 bits a weight."
    )
    common.add_model(parser)
    parser.add_argument(
        "--format", default="int4-g64", metavar="intN-gM",
        help="int2, int3, int4 or int8 in groups of M weights (default: int4-g64)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=recovery.STEPS, metavar="N")
    recovery.add_text(parser)
    recovery.add_training(parser, 1e-4)
    recovery.add_output(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.sources import resolve
    from pronk.commands.progress import Progress
    from pronk.compress.fake_quant import parse_grid
    from pronk.compress.smaller import qat

    grid = parse_grid(args.format)
    recipe = recovery.recipe(args, args.steps)
    source = resolve(args.model)
    with Progress("training") as progress:
        text = recovery.texts(args, source, progress.stage)
        report = qat(source, grid, text, args.output, recipe, tell=progress.stage)
    if args.json:
        common.print_json(report)
        return
    print(f"{grid}: {report['bits']['stored']:g} bits a weight as stored, "
          f"{report['bits']['packed']:g} if packed")  # fmt: skip
    recovery.print_measured(report, "as it was")
