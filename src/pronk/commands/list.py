"""``pronk list``: the models in the cache."""

from __future__ import annotations

import argparse

from pronk.commands import common
from pronk.units import format_bytes

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.sources import list_models

    entries = list_models()
    if args.json:
        common.print_json(
            {
                "models": [
                    {
                        "name": e.name,
                        "path": str(e.path),
                        "bytes": e.size_bytes,
                        "source": e.source,
                    }
                    for e in entries
                ]
            }
        )
        return
    for e in entries:
        print(f"{e.name:<32} {format_bytes(e.size_bytes):>12}  {e.source}")
