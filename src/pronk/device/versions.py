"""Versions of Pronk and of the packages its extras ask for."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata

from pronk import __version__

__all__ = ["Versions", "extras", "read_versions"]

Versions = Mapping[str, str | None]
"""A version by package; None for one that is not installed."""

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*;.*\bextra\s*==\s*['\"]([^'\"]+)['\"]")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_versions() -> Versions:
    """Python, Pronk, and what it always needs of numerics and tokens."""
    needed = {name: _version(name) for name in ("numpy", "tokenizers", "gguf")}
    return {"pronk": __version__, "python": platform.python_version(), **needed}


def extras(requirements: list[str] | None = None) -> dict[str, Versions]:
    """Versions of the packages of each extra; empty where Pronk runs without being installed.

    Parameters
    ----------
    requirements : list of str, optional
        As the metadata of a package has them; those of Pronk unless given.
    """
    if requirements is None:
        try:
            requirements = metadata.requires("pronk") or []
        except metadata.PackageNotFoundError:
            return {}
    found: dict[str, Versions] = {}
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match and match[1] != "pronk":  # one extra may ask for others
            found[match[2]] = {**found.get(match[2], {}), match[1]: _version(match[1])}
    return found
