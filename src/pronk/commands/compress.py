"""``pronk compress``: a model in fewer bits, by a recipe."""

from __future__ import annotations

import argparse
import dataclasses

from pronk.commands import common
from pronk.errors import RequestError

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a name, pypi:, hf: or s3:// address, or a path"
    )
    parser.add_argument("--recipe", metavar="NAME", help="see --list-recipes")
    parser.add_argument("--list-recipes", action="store_true", help="print the recipes and end")
    parser.add_argument(
        "--group-size", metavar="N",
        help="weights that share a scale: a multiple of 32 that divides the rows, or channel; "
        "any of them runs in the kernels of 32, with the scale repeated",
    )  # fmt: skip
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--bits", type=float, metavar="X", help="auto: most bits a weight, all told")
    goal.add_argument("--size", metavar="SIZE", help="auto: most bytes of weights, such as 70MB")
    goal.add_argument("--kl", type=float, metavar="X", help="auto: most KL, at the smallest size")
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="UTF-8 text that activations are taken from (default: Python's topics)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="windows of 512 tokens of it (64)"
    )
    parser.add_argument(
        "--tune-scales", type=int, default=0, metavar="STEPS",
        help="then learn scales and norms end to end, so that the source's predictions are kept",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of their draw (0)")
    parser.add_argument(
        "-o", "--output", metavar="DIR|FILE.gguf",
        help="a bundle, or a GGUF file where the model is one",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: all cores)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.compress.recipes import RECIPES, recipe_of

    if args.list_recipes:
        listed = {name: recipe.about for name, recipe in RECIPES.items()}
        if args.json:
            common.print_json(listed)
        else:
            width = max(map(len, listed))
            print("\n".join(f"{name:<{width}}  {about}" for name, about in listed.items()))
        return
    if args.model is None or args.recipe is None:
        raise RequestError("give a MODEL and a --recipe (--list-recipes shows them)")
    recipe = recipe_of(args.recipe)
    group = _group(args.group_size)
    if group is not None and not recipe.group:
        raise RequestError(f"recipe {recipe.name} has no groups: leave --group-size out")
    if not 1 <= args.samples <= 1 << 20:
        raise RequestError(f"--samples must be from 1 to {1 << 20}, not {args.samples}")
    if not 0 <= args.tune_scales <= 1 << 20:
        raise RequestError(f"--tune-scales must be from 0 to {1 << 20}, not {args.tune_scales}")
    if not 0 <= args.seed < 1 << 63:
        raise RequestError(f"--seed must be 0 or more, and less than 2^63, not {args.seed}")

    from pathlib import Path

    from pronk.checkpoint.sources import resolve
    from pronk.commands.progress import Progress
    from pronk.compress.bits import Goal
    from pronk.compress.compress import compress
    from pronk.compress.forward import set_threads
    from pronk.model import choose_threads
    from pronk.units import parse_size

    goal = None
    if any(value is not None for value in (args.bits, args.size, args.kl)):
        goal = Goal(args.bits, None if args.size is None else parse_size(args.size), args.kl)
    set_threads(choose_threads(args.threads))
    recipe = dataclasses.replace(recipe, tune=args.tune_scales)
    source = resolve(args.model)
    output = Path(args.output or f"{source.stem}-{recipe.name}")
    with Progress("compressing") as progress:
        report = compress(
            source, recipe, output,
            group=group, calibration=args.calibration, samples=args.samples, seed=args.seed,
            goal=goal, progress=progress.stage,
        )  # fmt: skip
    if args.json:
        common.print_json(report.to_dict())
        return
    size, each = report.weight_bytes, report.weight_bytes / report.weights
    print(
        f"{report.output}: {recipe.name}, {size / 1e6:.1f} MB of weights, {each:.3f} bytes each, "
        f"{report.seconds:.0f} s"
    )


def _group(text: str | None) -> str | None:
    """The group as formats name it."""
    if text is None or text == "channel":
        return text
    whole = text.isascii() and text.isdigit() and len(text) < 6
    if not whole or int(text) == 0 or int(text) % 32:
        raise RequestError(
            f"--group-size must be a multiple of 32, such as 32, 64 or 128, or channel, "
            f"not {text!r}"
        )
    return f"g{int(text)}"
