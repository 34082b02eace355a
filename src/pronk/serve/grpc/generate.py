"""Write the modules of the ``.proto`` files anew: ``python -m pronk.serve.grpc.generate [DIR]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PROTOS", "generate"]

HERE = Path(__file__).parent
PROTOS = ("generation", "open_inference")


def generate(out: Path, options: Sequence[str] = ()) -> None:
    """Run the protocol compiler; what it writes lands in `out` below ``pronk/serve/grpc``."""
    from grpc_tools import protoc

    root = HERE.parents[2]
    files = [str((HERE / f"{name}.proto").relative_to(root)) for name in PROTOS]
    command = ["protoc", f"-I{root}", f"--python_out={out}", f"--pyi_out={out}", *options, *files]
    if protoc.main(command):
        raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[2])
