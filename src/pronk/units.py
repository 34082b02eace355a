"""Byte counts as people write them, and back."""

from __future__ import annotations

import re

from pronk.errors import RequestError

__all__ = ["format_bytes", "parse_seconds", "parse_size"]

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0}
_TIME = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|us|s|m|)\s*", re.ASCII)
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``200MB``, ``0.5GiB`` or ``300M``.

    ``k``, ``M``, ``G`` and ``T``, with or without ``B``, are powers of 1000; ``KiB``, ``MiB``,
    ``GiB`` and ``TiB`` powers of 1024; case does not matter. A fraction of a byte is dropped.

    Raises
    ------
    RequestError
        If it is not such a size, is zero, or is 2**63 bytes or more.
    """
    match = _SIZE.fullmatch(text)
    factor = None if match is None else _FACTORS.get(match[2].lower())
    if match is None or factor is None:
        raise RequestError(
            f"{text!r} is not a size: write a number and a unit, such as 200MB or 0.5GiB"
        )
    whole, _, fraction = match[1].partition(".")
    size: int = int(whole) * factor + int(fraction or 0) * factor // 10 ** len(fraction)
    if not 1 <= size < 2**63:
        raise RequestError(f"the size {text!r} must be at least one byte and below 8 EiB")
    return size


def parse_seconds(text: str) -> float:
    """Seconds of a time such as ``50ms``, ``0.5s``, ``2m``, or a plain number of seconds.

    Raises
    ------
    RequestError
        If it is not such a time, or not above zero.
    """
    match = _TIME.fullmatch(text)
    seconds = 0.0 if match is None else float(match[1]) * _SECONDS[match[2].lower()]
    if seconds <= 0:
        raise RequestError(f"{text!r} is not a time above zero: write one such as 50ms or 0.5s")
    return seconds


def format_bytes(size: int) -> str:
    """A byte count for people, in powers of 1000: ``134.5 MB``."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        # 999.95 would print as 1000.0.
        if abs(value) < (1000 if unit == "B" else 999.95):
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
