"""``pronk prune``: fewer layers, heads, neurons or channels, or zeros; and recovery."""

from __future__ import annotations

import argparse

from pronk.commands import common, recovery

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    import re

    # So that `--mlp -25%` is a value, not an option.
    parser._negative_number_matcher = re.compile(r"^-[0-9]+(\.[0-9]+)?%?$")
    parser.description = (
        "Make a model smaller: structured pruning gives a smaller config; --sparsity only zeros, "
        "which are stored and run dense, as fast as before. Sizes are a number to keep, or a "
        "share: 75%, or -25% for a quarter less."
    ).replace("%", "%%")
    common.add_model(parser)
    sizes = parser.add_argument_group("what to keep")
    sizes.add_argument("--parameters", metavar="SIZE", help="all in all; chooses the others")
    sizes.add_argument("--layers", metavar="SIZE", help="by block influence")
    sizes.add_argument("--heads", metavar="SIZE", help="KV heads, each with its query heads")
    sizes.add_argument("--mlp", metavar="SIZE", help="neurons of every MLP")
    sizes.add_argument("--hidden", metavar="SIZE", help="channels of the residual stream")
    zeros = parser.add_argument_group("zeros")
    zeros.add_argument("--sparsity", type=float, metavar="X", help="share of zeros")
    zeros.add_argument("--pattern", metavar="2:4", help="n:m or unstructured (default)")
    zeros.add_argument("--method", choices=("magnitude", "wanda", "sparsegpt"), default="sparsegpt")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="calibration windows")
    parser.add_argument(
        "--distill", type=int, default=0, metavar="STEPS",
        help="recover by so many steps of distillation from the model as it was",
    )  # fmt: skip
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
    from pronk.compress.smaller import Pruning, prune

    names = ("layers", "heads", "mlp", "hidden", "parameters", "sparsity", "pattern", "method")
    pruning = Pruning(
        **{name: getattr(args, name) for name in names},
        samples=args.samples, window=args.window, dtype=args.dtype,
    )  # fmt: skip
    pruning.zeros()
    recipe = recovery.recipe(args, args.distill) if args.distill else None
    source = resolve(args.model)
    with Progress("pruning") as progress:
        text = recovery.texts(args, source, progress.stage)
        report = prune(source, pruning, text, args.output, recipe=recipe, tell=progress.stage)
    if args.json:
        common.print_json(report)
        return
    count, shape = report["parameters"], report["shape"]["after"]
    if count["removed"]:
        print(f"{count['before'] / 1e6:.1f} M parameters to {count['after'] / 1e6:.1f} M "
              f"(-{count['removed']:.1%}): {shape['layers']} layers, {shape['kv_heads']} KV heads, "
              f"{shape['mlp']} neurons, {shape['hidden']} channels")  # fmt: skip
    if "sparse" in report:
        one = report["sparse"]
        print(f"{one['sparsity']:.1%} zeros ({one['pattern']}); runs dense, no faster: as int4 "
              f"{one['bytes_dense_int4'] / 1e6:.1f} MB, were it kept sparse "
              f"{one['bytes_sparse_int4'] / 1e6:.1f} MB")  # fmt: skip
    recovery.print_measured(report, "as it was")
