"""``pronk pull``: fetch a model into the cache."""

from __future__ import annotations

import argparse

from pronk.commands import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    common.add_model(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.sources import pull

    path = pull(args.model)
    if args.json:
        common.print_json({"model": args.model, "path": str(path)})
    else:
        print(path)
