"""Where fetched models are kept: whole or not at all, one fetch of a name at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pronk.errors import SourceError

__all__ = ["Record", "folder_of", "home", "locked", "partial", "publish", "read", "staging"]

_RECORD = "source.json"


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a fetched model, kept beside it.

    Parameters
    ----------
    name : str
        The name it was asked for by.
    file : str
        The file or directory, inside the model's folder.
    size : int
        Bytes, in all.
    sha256 : str or None
        Of a single file.
    """

    name: str
    file: str
    size: int
    sha256: str | None


def home() -> Path:
    """The cache directory: ``$PRONK_HOME``, or the user's cache directory."""
    chosen = os.environ.get("PRONK_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("pronk"))


def folder_of(name: str) -> Path:
    """The folder of a model's name, for any name."""
    return home() / "models" / _safe(name)


def _safe(name: str) -> str:
    if re.fullmatch(r"[a-z0-9][a-z0-9-]*(\.[a-z0-9-]+)*", name):
        return name
    import hashlib

    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:80] + "-" + digest


def read(folder: Path) -> tuple[Record, Path] | None:
    """The record of a fetched model and the path to it; None if it is not there or not whole."""
    try:
        data = json.loads((folder / _RECORD).read_bytes())
        record = Record(**data)
        path = folder / record.file
        plain = record.file not in {"", ".", ".."} and Path(record.file).name == record.file
        if plain and path.exists() and size_of(path) == record.size:
            return record, path
    except (OSError, ValueError, TypeError):  # no record, or none of ours: fetched again
        pass
    return None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for item in path.rglob("*"):
        # A file may be renamed by its writer while we look.
        with contextlib.suppress(OSError):
            total += item.stat().st_size if item.is_file() else 0
    return total


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of a name; another process that wants it waits."""
    folder = home() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / f"{_safe(name)}.lock").open("a")
    except OSError as error:
        raise SourceError(
            f"the model cache {home()} cannot be written ({error.strerror}); "
            "set PRONK_HOME to a directory that can"
        ) from error
    with handle:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        # The system releases it when the process ends, however that comes about.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def staging(name: str) -> Iterator[Path]:
    """A temporary folder in the cache, under the name's lock; gone afterwards.

    What a killed run left of the same name is removed first, but for its `partial` folder.
    """
    import shutil
    import tempfile

    parent = home() / "staging"
    parent.mkdir(parents=True, exist_ok=True)
    prefix = _safe(name) + "@"
    for stale in parent.glob(prefix + "*"):
        if stale != partial(name):
            shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def partial(name: str) -> Path:
    """The folder for what the next run of the same name may go on with, if this one ends early.

    Used under the name's lock; whoever makes it removes it.
    """
    return home() / "staging" / f"{_safe(name)}@partial"


def publish(folder: Path, record: Record) -> Path:
    """Make a staged folder, holding ``record.file``, the folder of its name, in one step."""
    import shutil

    target = folder_of(record.name)
    with (folder / _RECORD).open("w") as out:
        json.dump(asdict(record), out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # damaged, or it would have been used
        shutil.rmtree(target)
    folder.replace(target)
    return target / record.file
