"""Values of untrusted headers: each within its range, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pronk.errors import CheckpointError

__all__ = ["flag", "integer", "number", "short", "unknown"]


def integer(path: Path, field: str, value: object, low: int, high: int) -> int:
    """A whole number of an untrusted header, within its range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(
            f"{path} gives {field} as {short(value)}, not a whole number from {low} to {high}"
        )
    return value


def number(path: Path, field: str, value: object, low: float, high: float) -> float:
    """A finite number of an untrusted header, above `low` and at most `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise CheckpointError(
            f"{path} gives {field} as {short(value)}, not a number above {low:g} and up to {high:g}"
        )
    return float(value)


def flag(path: Path, field: str, value: object) -> bool:
    """True or false of an untrusted header."""
    if not isinstance(value, bool):
        raise CheckpointError(f"{path} gives {field} as something else than true or false")
    return value


def unknown(path: Path, what: str, value: object, known: Iterable[str]) -> CheckpointError:
    """The refusal of a value that Pronk does not know, with those that it does."""
    return CheckpointError(
        f"{path} has the unknown {what} {str(value)[:80]!r}; Pronk knows {', '.join(known)}"
    )


def short(value: object) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
