"""A log of what was asked: append-only JSON lines, each sealed by a hash of all before it.

A line is ``{"n": 7, "time": ..., ..., "hash": "..."}``: its number, what happened, and the SHA-256
of the hash before it and its own text. So a line that was changed, removed or moved is found when
the file is read again (`verify`). There is no secret in it: that the end was cut off, or all of it
written anew, shows only against a hash that was kept elsewhere (`verify` gives the last one).
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO

from pronk.errors import PronkError, RequestError

__all__ = ["AuditError", "AuditLog", "Verified", "verify", "verify_set"]

Prepare = Callable[[dict[str, Any]], dict[str, Any]]
_log = logging.getLogger("pronk.serve")
_BEGIN = "0" * 64
_LATEST = 0.2  # seconds until a line is on the disk
_LONGEST = 16 << 20  # bytes of a line: 128 texts of 8,192 characters of 12 each, and the rest


class AuditError(PronkError):
    """An audit log is not what was written."""


def _seal(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}{body}".encode()).hexdigest()


def _line(entry: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    body = json.dumps(entry, separators=(",", ":"))
    seal = _seal(before, body)
    return f'{body[:-1]},"hash":"{seal}"}}\n'.encode(), seal


@dataclass(frozen=True, slots=True)
class Verified:
    """What a log holds.

    Parameters
    ----------
    lines : int
        Whole lines.
    first, last : int
        Their numbers; -1 where there are none.
    before, hash : str
        The hash that the first goes on from, and that of the last.
    cut : int
        Bytes of a line that was cut.
    """

    lines: int
    first: int
    last: int
    before: str
    hash: str
    cut: int


def verify(path: Path) -> Verified:
    """Read a log and check every seal.

    The last line may be cut, as by a power failure; nothing else may.

    Raises
    ------
    AuditError
        At the first line that was changed, removed or moved.
    RequestError
        If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _verify(path, file)
    except OSError as error:
        raise RequestError(f"the audit log {path} cannot be read: {error.strerror}") from None


def verify_set(paths: Sequence[Path]) -> Verified:
    """Check the files of one log, in any order: each must go on where the one before it ended.

    Raises
    ------
    AuditError
        At the first line that was changed, removed or moved, or a file that is missing between
        two. That files before the first are missing shows in its ``first`` alone.
    RequestError
        If one cannot be read.
    """
    found = [(one, path) for path in paths if (one := verify(path)).lines]
    found.sort(key=lambda item: item[0].first)
    if not found:
        return verify(paths[0])
    for (one, path), (after, next_) in pairwise(found):
        if (after.first, after.before) != (one.last + 1, one.hash):
            raise AuditError(
                f"{next_} begins with number {after.first} and does not go on from {path}, which "
                f"ends with {one.last}: a file between them is missing, or was changed"
            )
        if one.cut:
            raise AuditError(f"the last line of {path} is cut, though {next_} goes on from it")
    first, last = found[0][0], found[-1][0]
    lines = sum(one.lines for one, _ in found)
    return replace(last, lines=lines, first=first.first, before=first.before)


def _verify(path: Path, file: BinaryIO) -> Verified:
    seal, number, count = _BEGIN, -1, 0
    before, first = seal, number
    while True:
        raw = file.readline(_LONGEST)
        if not raw.endswith(b"\n"):
            return Verified(count, first, number, before, seal, len(raw))
        count += 1
        where = f"line {count} of {path}"
        body, mark, end = raw.decode("utf-8", "replace").rpartition(',"hash":"')
        if not mark or not end.endswith('"}\n'):
            raise AuditError(f"{where} is not a line of an audit log")
        try:
            entry = json.loads(body + "}")
            found = int(entry["n"])
        except (ValueError, KeyError, TypeError):
            raise AuditError(f"{where} is not a line of an audit log") from None
        if count == 1:
            seal = before = str(entry.get("before", _BEGIN))
            first, number = found, found - 1
        if found != number + 1:
            raise AuditError(
                f"{where} is number {found}, not {number + 1}: lines are missing or were moved"
            )
        if _seal(seal, body + "}") != end[:-3]:
            raise AuditError(f"{where} does not match its seal: it, or the one before, was changed")
        seal, number = end[:-3], found


class AuditLog:
    """Appends to a log from a thread of its own, which flushes to the disk in batches.

    Parameters
    ----------
    path : Path
        Goes on from what is there, once that is verified; a line that was cut is dropped.
    most : int
        Bytes after which the file is renamed (``audit.log.1``, ``.2``, ...) and a new one begun,
        whose first line names the last hash of the old one.
    prepare : callable, optional
        Makes what is written of an entry, on the log's thread.

    Raises
    ------
    AuditError
        If what is there does not verify.
    RequestError
        If it cannot be written, or another process writes it.
    """

    def __init__(self, path: Path, most: int = 64 << 20, prepare: Prepare | None = None) -> None:
        self._path, self._most, self._prepare = path, most, prepare
        self._queue: SimpleQueue[dict[str, Any] | threading.Event | None] = SimpleQueue()
        self._seal, self._number = _BEGIN, -1
        self._left = b""  # what could not be written yet
        self._file = self._open()
        self._error: str | None = None
        if self._number < 0:
            self._go_on()
        self._thread = threading.Thread(target=self._run, name="pronk-audit", daemon=True)
        self._thread.start()

    def _open(self) -> BinaryIO:
        try:
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "ab")
        except OSError as error:
            raise RequestError(
                f"the audit log {self._path} cannot be written: {error.strerror}"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise RequestError(f"another server writes the audit log {self._path}") from None
        try:
            found = verify(self._path)
        except PronkError:
            file.close()
            raise
        if found.lines:
            self._seal, self._number = found.hash, found.last
        if found.cut:
            file.truncate(file.seek(0, os.SEEK_END) - found.cut)
        return file

    def write(self, entry: dict[str, Any]) -> None:
        """Queue an entry; it gets a number, a time and a seal."""
        self._queue.put(entry)

    def flush(self) -> None:
        """Wait until all that was written is on the disk."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        open_ = True
        while open_:
            waiting: list[threading.Event] = []
            lines: list[bytes] = []
            for item in self._batch():
                if item is None:
                    open_ = False
                elif isinstance(item, threading.Event):
                    waiting.append(item)
                else:
                    lines.append(self._sealed(self._prepared(item)))
            if lines:
                self._append(b"".join(lines))
            for event in waiting:
                event.set()

    def _batch(self) -> Iterator[dict[str, Any] | threading.Event | None]:
        """What comes within a moment of the first."""
        item = self._queue.get()
        yield item
        deadline = time.monotonic() + _LATEST
        while isinstance(item, dict):
            with contextlib.suppress(Empty):
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
                yield item
                continue
            return

    def _prepared(self, entry: dict[str, Any]) -> dict[str, Any]:
        if self._prepare is None:
            return entry
        try:
            return self._prepare(entry)
        except Exception as error:  # the log must not end with one entry
            _log.exception("an entry of the audit log could not be prepared")
            return {"request": entry.get("request"), "unprepared": type(error).__name__}

    def _sealed(self, entry: Mapping[str, Any]) -> bytes:
        self._number += 1
        line, self._seal = _line({"n": self._number, "time": time.time(), **entry}, self._seal)
        return line

    def _append(self, lines: bytes) -> None:
        """Write lines, behind those that could not be; what cannot be now is left for the next."""
        try:
            self._write(lines)
            if os.fstat(self._file.fileno()).st_size >= self._most:
                self._rotate()
        except (OSError, PronkError) as error:
            self._error = getattr(error, "strerror", None) or str(error)
            if len(self._left) > _LONGEST:  # they are lost, and `verify` will say so
                self._left = b""
        else:
            self._error = None

    def _write(self, lines: bytes) -> None:
        self._left += lines
        while self._left:
            self._left = self._left[os.write(self._file.fileno(), self._left) :]
        os.fsync(self._file.fileno())

    def _rotate(self) -> None:
        old = self._path.with_name(f"{self._path.name}.{max(self._rotated(), default=0) + 1}")
        self._path.rename(old)
        seal, number = self._seal, self._number
        try:
            file = self._open()
        except PronkError:  # go on with what there is
            if not self._path.exists():
                old.rename(self._path)
            raise
        self._file.close()
        self._file, self._seal, self._number = file, seal, number
        self._begin(old)

    def _rotated(self) -> Iterator[int]:
        """The numbers of the files that were renamed."""
        for old in self._path.parent.glob(f"{glob.escape(self._path.name)}.*"):
            if old.suffix[1:].isdecimal():
                yield int(old.suffix[1:])

    def _go_on(self) -> None:
        """From the last file that was renamed, where the new one was not begun (kill -9)."""
        if last := max(self._rotated(), default=0):
            old = self._path.with_name(f"{self._path.name}.{last}")
            try:
                found = verify(old)
            except PronkError:
                self._file.close()
                raise
            self._seal, self._number = found.hash, found.last
            self._begin(old)

    def _begin(self, old: Path) -> None:
        """A new file's first line."""
        self._write(self._sealed({"rotated": old.name, "before": self._seal}))

    @property
    def error(self) -> str | None:
        """Why the log could not be written, if it could not."""
        return self._error
