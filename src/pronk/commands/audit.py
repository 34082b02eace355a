"""``pronk audit verify``: whether an audit log is what the server wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from pronk.commands import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("action", choices=("verify",), help="check every line's seal")
    parser.add_argument(
        "files", type=Path, metavar="FILE", nargs="+",
        help="a log of pronk serve --audit; with the files before it, also that none is missing",
    )  # fmt: skip
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.serve.audit import verify_set

    found = verify_set(args.files)
    if args.json:
        common.print_json({"lines": found.lines, "first": found.first, "last": found.last,
                           "hash": found.hash, "cut_bytes": found.cut})  # fmt: skip
        return
    cut = f", then {found.cut} bytes of a line that was cut" if found.cut else ""
    since = f" from number {found.first}" if found.first > 0 else ""
    name = str(args.files[0]) if len(args.files) == 1 else f"{len(args.files)} files"
    print(f"{name}: {found.lines} lines hold{since}, the last with the hash {found.hash}{cut}")
