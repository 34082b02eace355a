"""A log of what was asked: append-only JSON lines, each sealed by a hash of all before it.

A line is ``{"n": 7, "time": ..., ..., "hash": "..."}``: its number, what happened, and the SHA-256
of the hash before it and its own text. So a line that was changed, removed or moved is found when
the file is read again (`verify`). There is no secret in it: that the end was cut off, or all of it
written anew, shows only against a hash that was kept elsewhere (`verify` gives the last one).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO

from pronk.errors import PronkError, RequestError

__all__ = ["AuditError", "AuditLog", "Verified", "verify"]

_BEGIN = "0" * 64
_LATEST = 0.2  # seconds until a line is on the disk
_LONGEST = 1 << 20


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
    """What a log holds: whole lines, the hash of the last, and bytes of a line that was cut."""

    lines: int
    last: int
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


def _verify(path: Path, file: BinaryIO) -> Verified:
    seal, number, count = "", -1, 0
    while True:
        raw = file.readline(_LONGEST)
        if not raw.endswith(b"\n"):
            return Verified(count, number, seal or _BEGIN, len(raw))
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
            seal, number = str(entry.get("before", _BEGIN)), found - 1
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

    Raises
    ------
    AuditError
        If what is there does not verify.
    RequestError
        If it cannot be written, or another process writes it.
    """

    def __init__(self, path: Path, most: int = 64 << 20) -> None:
        self._path, self._most = path, most
        self._queue: SimpleQueue[dict[str, Any] | threading.Event | None] = SimpleQueue()
        self._seal, self._number = _BEGIN, -1
        self._file = self._open()
        self._error: OSError | None = None
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
                    lines.append(self._sealed(item))
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

    def _sealed(self, entry: Mapping[str, Any]) -> bytes:
        self._number += 1
        line, self._seal = _line({"n": self._number, "time": time.time(), **entry}, self._seal)
        return line

    def _append(self, lines: bytes) -> None:
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._file.tell() >= self._most:
                self._rotate()
        except OSError as error:
            self._error = error

    def _rotate(self) -> None:
        taken = 1
        while (old := self._path.with_name(f"{self._path.name}.{taken}")).exists():
            taken += 1
        self._path.rename(old)
        self._file.close()
        seal, number = self._seal, self._number
        self._file = self._open()
        self._seal, self._number = seal, number
        first = self._sealed({"rotated": old.name, "before": seal})
        self._file.write(first)
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def error(self) -> OSError | None:
        """Why the log could not be written, if it could not."""
        return self._error
