"""What a compression has finished, kept beside its output, so that a killed one goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint, TensorInfo
from pronk.errors import PronkError, RequestError

if TYPE_CHECKING:
    from pronk.checkpoint.tokenizer import Tokenizer

__all__ = ["Compressed", "Stages"]

_KEY = "key.json"


class Stages:
    """Finished steps of a compression in a hidden directory beside its output.

    A context manager, under a lock. A directory of other work (another recipe, source or
    calibration) is begun anew. Leaving it by an error keeps it; `remove` ends it.

    Parameters
    ----------
    target : path
        Where the output goes.
    key : Mapping
        What the work is; plain data.
    """

    def __init__(self, target: Path, key: Mapping[str, Any]) -> None:
        self.path = target.parent / f".{target.name}.compress"
        self._key = json.loads(json.dumps(key))
        self._lock = -1

    def __enter__(self) -> Self:
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise RequestError(
                    f"{self.path} is in use: another compression writes the same output"
                ) from None
            if self._stored() != self._key:
                for entry in self.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                self._put(_KEY, json.dumps(self._key).encode())
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _stored(self) -> Any:
        try:
            return json.loads((self.path / _KEY).read_bytes())
        except (OSError, ValueError):
            return None

    def _put(self, name: str, data: bytes) -> None:
        beside = self.path / f"{name}.part"
        beside.write_bytes(data)
        beside.replace(self.path / name)

    def done(self, step: str) -> dict[str, Any] | None:
        """The report of a finished step; None if it is not."""
        try:
            report: dict[str, Any] = json.loads((self.path / step / "report.json").read_bytes())
        except FileNotFoundError:
            return None
        return report

    def finish(
        self, step: str, tensors: Mapping[str, NDArray[Any]], report: Mapping[str, Any]
    ) -> None:
        """Keep a step's tensors (rows of blocks, or float32 vectors) and what is said of it."""
        with _writing(self.path):
            beside = self.path / f"{step}.part"
            if beside.exists():
                shutil.rmtree(beside)
            beside.mkdir()
            for name, rows in tensors.items():
                np.save(beside / f"{name}.npy", rows)
            (beside / "report.json").write_text(json.dumps(report))
            beside.rename(self.path / step)

    def latest(self, prefix: str) -> str | None:
        """The finished step of the largest number, of those named ``prefix-number``."""
        found = (p.name.rpartition("-") for p in self.path.glob(f"{prefix}-*") if p.is_dir())
        numbers = [int(number) for name, _, number in found if name == prefix and number.isdigit()]
        return f"{prefix}-{max(numbers)}" if numbers else None

    def forget(self, step: str) -> None:
        """Remove a finished step that a later one has replaced."""
        shutil.rmtree(self.path / step, ignore_errors=True)

    def tensor(self, step: str, name: str) -> NDArray[Any]:
        """A finished tensor, mapped from its file."""
        array: NDArray[Any] = np.load(self.path / step / f"{name}.npy", mmap_mode="r")
        return array

    def keep_inputs(self, layer: int, x: NDArray[np.float32]) -> None:
        """Keep what a layer is given, before the step that led to it is finished."""
        with _writing(self.path), (self.path / "inputs.part").open("wb") as file:
            np.save(file, x)
        (self.path / "inputs.part").replace(self.path / f"inputs-{layer}.npy")

    def inputs(self, layer: int) -> NDArray[np.float32] | None:
        """What a layer is given; None if that is not kept."""
        try:
            x: NDArray[np.float32] = np.load(self.path / f"inputs-{layer}.npy")
        except FileNotFoundError:
            return None
        return x

    def drop_inputs(self, layer: int) -> None:
        """Forget what a layer was given."""
        (self.path / f"inputs-{layer}.npy").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PronkError(
            f"{path} cannot be written: {error.strerror or error}; what is finished is kept, and "
            f"the same command goes on from there"
        ) from error


class Compressed(Checkpoint):
    """A checkpoint with finished tensors in the place of its own.

    Parameters
    ----------
    source : Checkpoint
        Keeps its tokenizer, and the tensors that are not replaced.
    made : Mapping
        Dtype and rows by name: uint8 [rows, row bytes], or a float32 vector.
    """

    def __init__(self, source: Checkpoint, made: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
        self.path, self.spec, self.format = source.path, source.spec, source.format
        self.source, self._made = source, made
        tensors = dict(source.tensors)
        for name, (dtype, rows) in made.items():
            tensors[name] = TensorInfo(name, dtype, source.tensors[name].shape, rows.nbytes)
        self.tensors = MappingProxyType(tensors)

    def _read(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        made = self._made.get(info.name)
        if made is None:
            return self.source.read_rows(info.name, start, stop)
        rows = made[1]
        if rows.ndim == 1:
            rows = rows.view(np.uint8)[None]
        return np.array(rows[start:stop])

    def load_tokenizer(self) -> Tokenizer:
        """That of the source."""
        return self.source.load_tokenizer()

    def close(self) -> None:
        """The source is closed by whoever opened it."""
