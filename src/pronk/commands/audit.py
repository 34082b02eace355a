"""``pronk audit verify``: whether an audit log is what the server wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from pronk.commands import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("action", choices=("verify",), help="check every line's seal")
    parser.add_argument("file", type=Path, metavar="FILE", help="a log of pronk serve --audit")
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.serve.audit import verify

    found = verify(args.file)
    if args.json:
        common.print_json({"lines": found.lines, "last": found.last, "hash": found.hash,
                           "cut_bytes": found.cut})  # fmt: skip
        return
    cut = f", then {found.cut} bytes of a line that was cut" if found.cut else ""
    print(f"{args.file}: {found.lines} lines hold, the last with the hash {found.hash}{cut}")
