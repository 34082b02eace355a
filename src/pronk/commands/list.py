"""``pronk list``: the models in the cache, and the weights kept packed beside them."""

from __future__ import annotations

import argparse

from pronk.commands import common
from pronk.units import format_bytes

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--clear-packed", action="store_true",
        help="remove packed weights: the next start of a model packs them again",
    )  # fmt: skip
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint import packed_cache
    from pronk.checkpoint.sources import list_models

    freed = packed_cache.clear() if args.clear_packed else 0
    entries = list_models()
    packed = packed_cache.status()
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
                ],
                "packed": {
                    "path": str(packed.directory),
                    "models": packed.files,
                    "bytes": packed.size_bytes,
                    "limit": packed.limit_bytes,
                    "freed": freed,
                },
            }
        )
        return
    for e in entries:
        print(f"{e.name:<32} {format_bytes(e.size_bytes):>12}  {e.source}")
    if freed:
        common.note(f"removed {format_bytes(freed)} of packed weights")
    if packed.files:
        print(
            f"packed weights of {packed.files} {'model' if packed.files == 1 else 'models'}: "
            f"{format_bytes(packed.size_bytes)} of at most {format_bytes(packed.limit_bytes)} "
            f"in {packed.directory} (--clear-packed removes them)"
        )
