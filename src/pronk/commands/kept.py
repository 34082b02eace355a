"""Small results of long measurements, kept in the cache directory as JSON."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["file_of", "keep", "kept"]


def file_of(kind: str, key: Sequence[object]) -> Path:
    """Where the result of a kind is kept that follows from all in `key`."""
    import hashlib

    from pronk.checkpoint.cache import home

    return home() / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def kept(file: Path) -> Any:
    """What is kept there, or None."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None


def keep(file: Path, data: Any) -> None:
    """Keep a result, where that can be done."""
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # not kept: found anew the next time
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(data))
        beside.replace(file)
