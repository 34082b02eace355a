"""Packed weights kept on disk, so that a later start reads them instead of packing again.

A file of weights is named by what was packed (a hash of the checkpoint's bytes), by the program
that they were packed for and by the instruction set; a small file beside it remembers the hash of
a checkpoint by its device, inode, size and times, so that it is hashed once. A file of weights is
the weights as they lie in memory, then a JSON object, then its length, its sum and a mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronk import _native
from pronk.checkpoint import cache
from pronk.errors import RequestError
from pronk.units import format_bytes, parse_size

__all__ = [
    "ENVIRONMENT",
    "Key",
    "Status",
    "clear",
    "content_hash",
    "limit",
    "restore",
    "status",
    "store",
]

ENVIRONMENT = "PRONK_PACKED_CACHE"
"""Names the variable that turns the cache off (``0``) or limits its bytes (``4GB``)."""

DEFAULT_LIMIT = 10_000_000_000

_FORMAT = 2
_END = struct.Struct("<QQ8s")  # length of the JSON, its sum, mark
_MARK = b"PRONKPK\1"
_MOST_JSON = 1 << 26
_SPARE = 500_000_000  # bytes of disk that are left to others
_WEIGHTS, _KNOWN, _WRITING = ".weights", ".known", ".tmp"


@dataclass(frozen=True, slots=True)
class Key:
    """What packed weights are of.

    Parameters
    ----------
    files : tuple of int
        Descriptors of the open files that hold the checkpoint's tensors.
    program : str
        Everything else that decides what is packed, and where it lies.
    """

    files: tuple[int, ...]
    program: str


@dataclass(frozen=True, slots=True)
class Status:
    """The cache as it stands.

    Parameters
    ----------
    directory : Path
    files, size_bytes : int
        Packed models, and their bytes on disk.
    limit_bytes : int
        Most bytes it may take; 0 where it is off.
    problem : str
        Why nothing can be kept; empty if it can.
    """

    directory: Path
    files: int
    size_bytes: int
    limit_bytes: int
    problem: str


def limit() -> int:
    """Most bytes the cache may take; 0 where it is off.

    Raises
    ------
    RequestError
        If the environment says neither a size nor 0.
    """
    value = os.environ.get(ENVIRONMENT, "").strip()
    if not value:
        return DEFAULT_LIMIT
    if value.lower() in ("0", "off", "no", "false"):
        return 0
    try:
        return parse_size(value)
    except RequestError:
        raise RequestError(
            f"{ENVIRONMENT} is {value!r}: set it to 0 for none, or to a size such as 4GB"
        ) from None


def status() -> Status:
    """The cache as it stands."""
    folder = _folder()
    entries = _entries(folder)
    most = limit()
    # The nearest directory that there is decides whether another can be made.
    there = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    problem = "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"
    if not most:
        problem = f"{ENVIRONMENT} turns it off"
    return Status(folder, len(entries), sum(size for _, size, _ in entries), most, problem)


def clear() -> int:
    """Remove all packed weights; gives the bytes that were freed."""
    folder = _folder()
    freed = 0
    if not folder.is_dir():
        return 0
    with _locked(folder, wait=True):
        for path in folder.iterdir():
            if path.suffix in (_WEIGHTS, _KNOWN, _WRITING):
                freed += _size(path)
                path.unlink(missing_ok=True)
    return freed


def restore(
    key: Key, size: int, read: Callable[[int, Path, list[int]], bool]
) -> dict[str, Any] | None:
    """Read packed weights; None where there are none.

    Parameters
    ----------
    key : Key
    size : int
        Their bytes.
    read : callable
        Called with a descriptor, the path and the sums of what `store` wrote; tells whether the
        weights are those of the sums.

    Returns
    -------
    dict or None
        The facts they were stored with. What is damaged is removed.
    """
    if not limit():
        return None
    path = _entry(key, _folder())
    if path is None:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _end_of(fd, size)
        if found is not None and read(fd, path, found["sums"]):
            with contextlib.suppress(OSError):
                os.utime(path)  # those used longest ago go first
            facts: dict[str, Any] = found["facts"]
            return facts
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):  # what cannot be removed is found damaged again
        path.unlink(missing_ok=True)
    return None


def _end_of(fd: int, size: int) -> dict[str, Any] | None:
    """What follows `size` bytes of weights; None if it is not what `store` wrote."""
    end = os.fstat(fd).st_size - _END.size
    if end < size:
        return None
    length, total, mark = _END.unpack(os.pread(fd, _END.size, end))
    if mark != _MARK or length != end - size or length > _MOST_JSON:
        return None
    raw = os.pread(fd, length, size)
    if len(raw) != length or _native.xxh64(raw) != total:
        return None
    data: dict[str, Any] = json.loads(raw)
    return data


def store(
    key: Key,
    size: int,
    write: Callable[[int], tuple[list[int], dict[str, Any]]],
    *,
    wait: bool = False,
) -> str:
    """Keep packed weights; gives the reason if they are not kept, or "".

    Atomic, and safe beside other processes: one of them writes, the others go without.

    Parameters
    ----------
    key : Key
    size : int
        Their bytes.
    write : callable
        Writes them to a descriptor; gives sums, and facts as JSON can hold them.
    wait : bool
        Wait for another process that writes, rather than go without.
    """
    most = limit()
    if not most:
        return "it is turned off"
    if size > most:
        return f"{format_bytes(size)} of weights are above its limit of {format_bytes(most)}"
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, wait) as mine:
            return _store(folder, key, size, write, most) if mine else "another process writes"
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"


def _store(
    folder: Path,
    key: Key,
    size: int,
    write: Callable[[int], tuple[list[int], dict[str, Any]]],
    most: int,
) -> str:
    for stale in folder.glob("*" + _WRITING):  # of a process that was killed: the lock is ours
        stale.unlink(missing_ok=True)
    identity = _identity(key.files)
    content = content_hash(key.files)
    if _identity(key.files) != identity:
        return "the checkpoint changes while it is read"
    path = folder / _name(content, key.program)
    if not path.exists():
        _evict(folder, most - size)
        if _free(folder) < size + _SPARE:
            return f"the disk of {folder} has too little room"
        with _written(path) as fd:
            sums, facts = write(fd)
            raw = json.dumps({"sums": sums, "facts": facts}).encode()
            end = _END.pack(len(raw), _native.xxh64(raw), _MARK)
            os.lseek(fd, size, os.SEEK_SET)
            _write(fd, raw + end)
    with _written(folder / (identity + _KNOWN)) as fd:
        _write(fd, content.encode())
    return ""


def _folder() -> Path:
    return cache.home() / "packed"


def _entry(key: Key, folder: Path) -> Path | None:
    """The file of weights of a checkpoint whose hash is known."""
    try:
        content = (folder / (_identity(key.files) + _KNOWN)).read_text()
    except (OSError, ValueError):
        return None
    return folder / _name(content, key.program)


def _digest(value: object) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _identity(files: Sequence[int]) -> str:
    """A name for the files as they are now: whoever changes a byte changes its ctime."""
    states = [os.fstat(fd) for fd in files]
    return _digest([(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states])


def _name(content: str, program: str) -> str:
    return _digest([_FORMAT, _native.PACK_VERSION, content, program]) + _WEIGHTS


def content_hash(files: Sequence[int]) -> str:
    """A hash of the bytes of files, which have no length in common that could be mistaken."""
    import hashlib

    total = hashlib.sha256()
    for fd in files:
        one = hashlib.sha256()
        at = 0
        while block := os.pread(fd, 1 << 20, at):
            one.update(block)
            at += len(block)
        total.update(one.digest())
    return total.hexdigest()


@contextlib.contextmanager
def _written(path: Path) -> Iterator[int]:
    """A descriptor to write a file by, which appears whole or not at all."""
    import tempfile

    fd, name = tempfile.mkstemp(suffix=_WRITING, dir=path.parent)
    beside = Path(name)
    try:
        # No fsync: what a power cut loses, the sums tell.
        yield fd
        beside.replace(path)
    finally:
        os.close(fd)
        beside.unlink(missing_ok=True)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of the cache; False if another process does and we do not wait."""
    with (folder / "lock").open("a") as handle:
        try:
            import fcntl
        except ImportError:  # Windows
            yield True
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """Files of weights, the one used longest ago first: (time, bytes, path)."""
    found = []
    for path in folder.glob("*" + _WEIGHTS):
        with contextlib.suppress(OSError):  # removed meanwhile
            state = path.stat()
            found.append((state.st_mtime, state.st_size, path))
    return sorted(found)


def _evict(folder: Path, most: int) -> None:
    entries = _entries(folder)
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= most:
            return
        path.unlink(missing_ok=True)
        total -= size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _free(folder: Path) -> int:
    import shutil

    return shutil.disk_usage(folder).free
