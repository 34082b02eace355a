"""Small files of /proc and /sys: text, numbers, lists; None where there is no such file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["control_groups", "cpu_list", "fields", "number", "text"]


def text(path: Path) -> str | None:
    """The text of a file without the white space around it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\r\n\0")
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The integer that a file holds."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def fields(path: Path) -> dict[str, str]:
    """The first of each ``key: value`` line; empty where there is no such file."""
    found: dict[str, str] = {}
    for line in (text(path) or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def cpu_list(listed: str | None) -> int | None:
    """How many CPUs a list such as ``0-3,8`` names."""
    if not listed:
        return None
    count = 0
    try:
        for part in listed.split(","):
            first, _, last = part.partition("-")
            count += int(last or first) - int(first) + 1
    except ValueError:
        return None
    return count


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups (versions 1 and 2), each before its parents."""
    mounts = root / "sys/fs/cgroup"
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            tops = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            tops = [mounts / controllers, mounts / controller]
        else:
            continue
        # Inside a namespace the path may climb above what is mounted.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for top in dict.fromkeys(tops):
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth])
