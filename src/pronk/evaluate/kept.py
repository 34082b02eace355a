"""Results that stay, so that an interrupted comparison goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.errors import RequestError

__all__ = ["Kept", "write_beside"]


def write_beside(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


class Kept:
    """Arrays and JSON under names made of all that they depend on.

    Parameters
    ----------
    folder : Path or None
        Where they lie; nothing is kept without one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RequestError(f"{folder} cannot be made: {error.strerror or error}") from error

    def _file(self, kind: str, facts: object, suffix: str) -> Path | None:
        if self._folder is None:
            return None
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
        return self._folder / f"{kind}-{name}{suffix}"

    def arrays(self, kind: str, facts: object) -> dict[str, NDArray[Any]] | None:
        """What was kept of a kind with these facts; None if nothing sound was."""

        def read(data: bytes) -> dict[str, NDArray[Any]]:
            with np.load(BytesIO(data), allow_pickle=False) as found:
                return {name: found[name] for name in found.files}

        found: dict[str, NDArray[Any]] | None = self._read(self._file(kind, facts, ".npz"), read)
        return found

    def keep_arrays(self, kind: str, facts: object, arrays: dict[str, NDArray[Any]]) -> None:
        """Keep arrays in place of what was."""
        file = self._file(kind, facts, ".npz")
        if file is not None:
            data = BytesIO()
            np.savez_compressed(data, allow_pickle=False, **arrays)
            write_beside(file, data.getvalue())

    def json(self, kind: str, facts: object) -> Any:
        """What was kept of a kind with these facts; None if nothing sound was."""
        return self._read(self._file(kind, facts, ".json"), json.loads)

    def keep_json(self, kind: str, facts: object, data: object) -> None:
        """Keep plain data in place of what was."""
        file = self._file(kind, facts, ".json")
        if file is not None:
            write_beside(file, json.dumps(data).encode())

    def _read(self, file: Path | None, parse: Callable[[bytes], Any]) -> Any:
        if file is None:
            return None
        try:
            return parse(file.read_bytes())
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None  # not there, or damaged: it is measured again
