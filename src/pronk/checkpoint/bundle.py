"""Writing a bundle: a Hugging Face checkpoint that also carries its plan, in ``pronk.json``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.bundle_config import check_bundled, hf_config
from pronk.checkpoint.bundle_tensors import Quantize, write_tensors
from pronk.errors import PronkError, RequestError

__all__ = [
    "BUNDLE_FILE",
    "BundleWriter",
    "DirectoryWriter",
    "is_bundle",
    "write_bundle",
    "write_json",
]

BUNDLE_FILE = "pronk.json"
FORMAT = 1

Progress = Callable[[int, int], None]


def is_bundle(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is a bundle, complete or damaged."""
    return (Path(directory) / BUNDLE_FILE).is_file()


class DirectoryWriter:
    """Writes a checkpoint beside its final place and moves it there when it is complete.

    A context manager: leaving it without `commit` removes what was written. A run that is
    killed leaves a hidden directory that the next one removes.

    Parameters
    ----------
    directory : path
        Where the checkpoint goes. One that is there and has the same `mark` is replaced;
        anything else is refused.
    mark : str
        The file that every directory written so holds.
    what : str
        What such a directory is, for the refusal.

    Attributes
    ----------
    path : Path
        The hidden directory where the checkpoint is until `commit`; it can be opened from there.
    """

    def __init__(self, directory: str | os.PathLike[str], mark: str, what: str) -> None:
        self._mark, self._what = mark, what
        # A link stays, and what it points to is replaced.
        self.target = Path(os.path.realpath(directory))
        self.path = self._beside("tmp", os.getpid())
        self._open = False

    def check(self) -> None:
        """Refuse a directory that holds something else than what is written.

        Raises
        ------
        RequestError
        """
        if os.path.lexists(self.target) and not (self.target / self._mark).is_file():
            empty = self.target.is_dir() and not any(self.target.iterdir())
            if not empty:
                raise RequestError(
                    f"{self.target} exists and is not {self._what}: give -o another directory"
                )

    def __enter__(self) -> Self:
        _recover(self.target)
        self.check()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir()
        except OSError as error:
            raise self.cannot(error) from error
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open:
            self._open = False
            shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> Path:
        """Put the checkpoint in its place and return that.

        Whenever this is cut short, the old one or the new one is there, or the next writer
        puts the old one back.
        """
        try:
            for file in self.path.iterdir():
                _sync(file)
            _sync(self.path)
            old = self._beside("old", os.getpid())
            replaced = os.path.lexists(self.target)
            if replaced:
                self.target.rename(old)
            try:
                self.path.rename(self.target)
            except OSError:
                if replaced:
                    old.rename(self.target)
                raise
            _sync(self.target.parent)
        except OSError as error:
            raise self.cannot(error) from error
        self._open = False
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
        return self.target

    def cannot(self, error: OSError) -> PronkError:
        """An error of the system while writing, in a sentence."""
        return PronkError(f"{self.target} cannot be written: {error.strerror or error}")

    def _beside(self, what: str, pid: int) -> Path:
        return self.target.parent / f".{self.target.name}.{what}-{pid}"


class BundleWriter(DirectoryWriter):
    """`DirectoryWriter` of a bundle, its tensors and its ``pronk.json``."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory, BUNDLE_FILE, "a bundle")
        self._fields: dict[str, Any] = {}

    def write(
        self,
        ckpt: Checkpoint,
        formats: Mapping[str, str],
        *,
        quantize: Quantize,
        meta: Mapping[str, Any],
        inputs: Mapping[str, float] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write every file.

        Parameters
        ----------
        ckpt : Checkpoint
            The source; its tensors are read a few rows at a time.
        formats : Mapping[str, str]
            Quantized dtype by tensor kind (`pronk.checkpoint.kinds.KINDS`).
        quantize : callable
            ``(ckpt, name, dtype)`` to ``(first row, blocks)`` pairs that cover the tensor.
        meta : Mapping
            Fields of ``pronk.json`` besides those written here.
        inputs : Mapping[str, float], optional
            Scales of each packed matrix's input in int8, by its name, for engines that want them.
        progress : callable, optional
            Called with the bytes written and the bytes to write.
        """
        import pronk

        check_bundled(ckpt.spec, formats)
        tokenizer = ckpt.load_tokenizer()
        try:
            write_tensors(
                ckpt, formats, self.path / "model.safetensors", quantize, progress, inputs
            )
            tokenizer.save(self.path)
            eos = sorted(tokenizer.eos_ids)
            write_json(
                self.path / "config.json",
                hf_config(ckpt.spec, formats, tokenizer.bos_id, eos, static=inputs is not None),
            )
            # That of a variant written before has figures which no longer hold.
            (self.path / BUNDLE_FILE).unlink(missing_ok=True)
            self._fields = {
                "format": FORMAT,
                "pronk_version": getattr(pronk, "__version__", "0"),
                "tied": ckpt.spec.tie_embeddings,
                "formats": dict(formats),
                **meta,
                "sha256": {file.name: _sha256(file) for file in sorted(self.path.iterdir())},
            }
            write_json(self.path / BUNDLE_FILE, self._fields)
        except OSError as error:
            raise self.cannot(error) from error

    def update(self, **fields: Any) -> None:
        """Set fields of ``pronk.json``, such as ``measurements``."""
        self._fields.update(fields)
        try:
            write_json(self.path / BUNDLE_FILE, self._fields)
        except OSError as error:
            raise self.cannot(error) from error


def write_bundle(
    ckpt: Checkpoint,
    formats: Mapping[str, str],
    directory: str | os.PathLike[str],
    *,
    quantize: Quantize,
    meta: Mapping[str, Any],
    progress: Progress | None = None,
) -> Path:
    """Write a bundle without measuring it; see `BundleWriter.write`."""
    with BundleWriter(directory) as writer:
        writer.write(ckpt, formats, quantize=quantize, meta=meta, progress=progress)
        return writer.commit()


def _recover(target: Path) -> None:
    """Remove what dead runs left beside `target`; put back a bundle they had set aside."""
    for path, what, pid in list(_leftovers(target)):
        if _alive(pid):
            continue
        if what == "old" and not os.path.lexists(target):
            with contextlib.suppress(OSError):  # another run was quicker
                path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _leftovers(target: Path) -> Iterator[tuple[Path, str, int]]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-([0-9]{{1,9}})")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is not None and path.is_dir() and not path.is_symlink():
            yield path, match[1], int(match[2])


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
