"""Reading files that are not trusted: regular files only, whole, with limits."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError

__all__ = ["open_file", "parse_json", "read_exact", "read_json"]


def open_file(path: Path) -> tuple[int, int]:
    """Open a regular file for `read_exact`: its descriptor and its size in bytes."""
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError(f"{path} is no regular file")
    return fd, status.st_size


def read_exact(fd: int, offset: int, nbytes: int, path: Path) -> NDArray[np.uint8]:
    """Read exactly `nbytes` at `offset` into a fresh array, without moving the file position."""
    out = np.empty(nbytes, dtype=np.uint8)
    view = out.data
    done = 0
    while done < nbytes:
        # Linux moves at most 0x7ffff000 bytes a call.
        got = os.preadv(fd, [view[done : done + (1 << 30)]], offset + done)
        if got <= 0:
            raise CheckpointError(f"{path} ended at byte {offset + done} while a tensor was read")
        done += got
    return out


def read_json(path: Path, limit: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes."""
    fd, size = open_file(path)
    try:
        if size > limit:
            raise CheckpointError(f"{path} is {size} bytes long, above the limit of {limit}")
        return parse_json(read_exact(fd, 0, size, path).tobytes(), path)
    finally:
        os.close(fd)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `raw`; one that names a key twice, or half a character, is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a name comes twice")
        # JSON can escape a lone surrogate, which nothing can print or write.
        for text in (*out, *out.values()):
            if isinstance(text, str):
                text.encode()
        return out

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)[:100]
        raise CheckpointError(f"{path} holds broken JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
