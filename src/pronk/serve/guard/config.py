"""A guard's configuration: one TOML file, an ordered list of filters."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args

from pronk.errors import RequestError
from pronk.serve.guard.classifier import load_classifier
from pronk.serve.guard.filters import Filter, Guard
from pronk.serve.guard.patterns import Pattern, words_pattern
from pronk.serve.guard.stages import Action, Direction, Hit, Rule

__all__ = ["read_guard", "require_guard"]

_SHARED = {"name", "kind", "on", "action"}
_MOST_FILTERS, _MOST_WORDS = 64, 10_000
_MARK = "[REDACTED]"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def require_guard() -> None:
    """Refuse where the libraries of the extra are missing.

    Raises
    ------
    RequestError
        Which says what to install.
    """
    for name in ("re2", "phonenumbers"):
        if find_spec(name) is None:
            raise RequestError(
                f"the guard needs {name}, which is not installed: pip install 'pronk[serve,guard]'"
            )


def read_guard(path: Path) -> Guard:
    """Read a guard's configuration.

    Raises
    ------
    RequestError
        If it cannot be read, or says what no filter knows.
    """
    require_guard()
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise RequestError(f"the guard's file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the guard's file {path} is not TOML: {error}") from None
    given = data.pop("filter", None)
    if data:
        raise RequestError(f"{path}: there is no key {min(data)!r}: filters are [[filter]] tables")
    if not isinstance(given, list) or not 0 < len(given) <= _MOST_FILTERS:
        raise RequestError(f"{path}: there must be 1 to {_MOST_FILTERS} [[filter]] tables")
    filters: list[Filter] = []
    for number, table in enumerate(given, 1):
        try:
            filters.append(_filter(table, path.parent))
        except RequestError as error:
            name = table.get("name") if isinstance(table, dict) else None
            raise RequestError(f"{path}: filter {name or number}: {error}") from None
    names = [one.name for one in filters]
    if len(set(names)) < len(names):
        raise RequestError(f"{path}: two filters have one name")
    return Guard(filters)


class _Table:
    """A table's values, each taken once; what is left over is an error."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def text(self, key: str, default: str | None = None, choices: Sequence[str] = ()) -> str:
        value = self._values.pop(key, default)
        if not isinstance(value, str) or not value:
            raise RequestError(f"{key} must be a text")
        if choices and value not in choices:
            raise RequestError(f"{key} must be one of {', '.join(choices)}, not {value!r}")
        return value

    def has(self, key: str) -> bool:
        return key in self._values

    def texts(self, key: str) -> list[str]:
        value = self._values.pop(key, [])
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise RequestError(f"{key} must be a text or a list of texts")
        return value

    def share(self, key: str, default: float) -> float:
        value = self._values.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise RequestError(f"{key} must be a number above 0 and at most 1")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._values.pop(key, False)
        if not isinstance(value, bool):
            raise RequestError(f"{key} must be true or false")
        return value

    def end(self, kind: str) -> None:
        if self._values:
            raise RequestError(f"{kind} has no key {min(self._values)!r}")


def _filter(values: Any, folder: Path) -> Filter:
    if not isinstance(values, dict):
        raise RequestError("it is no table")
    table = _Table(values)
    name = table.text("name")
    if not _NAME.fullmatch(name):
        raise RequestError("name must be letters, digits, dots and dashes, at most 64")
    kind = table.text("kind", choices=tuple(_KINDS))
    action = cast(Action, table.text("action", choices=get_args(Action)))
    sides = table.texts("on") or ["input", "output"]
    if "both" in sides:
        sides = ["input", "output"]
    for side in sides:
        if side not in get_args(Direction):
            raise RequestError(f"on must be input, output or both, not {side!r}")
    made = _KINDS[kind](name, action, frozenset(cast(list[Direction], sides)), table, folder)
    table.end(kind)
    return made


def _words(name: str, action: Action, on: frozenset[Direction], table: _Table, at: Path) -> Filter:
    words, mark = table.texts("words"), table.text("mark", _MARK)
    if table.has("file"):
        words = words + _lines(at / table.text("file"))
    words = sorted({word.strip() for word in words} - {""})
    if not 0 < len(words) <= _MOST_WORDS:
        raise RequestError(f"words and file must give 1 to {_MOST_WORDS} words, not {len(words)}")
    known = {word.casefold() for word in words}
    lengths = sorted({len(word) for word in words}, reverse=True)

    def accept(text: str, start: int, end: int) -> Sequence[Hit]:
        # The longest word is found, but a shorter one may be what stands alone.
        for length in (end - start, *(n for n in lengths if n < end - start)):
            last = start + length
            if not _joined(text, start) and not _joined(text, last) and (
                last == end or text[start:last].casefold() in known
            ):  # fmt: skip
                return [Hit(start, last, mark)]
        return []

    return Filter(name, on, action, (Rule(words_pattern(words), accept),))


def _joined(text: str, at: int) -> bool:
    """Whether a word goes on across a place."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the file {path} cannot be read: {error}") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _regex(name: str, action: Action, on: frozenset[Direction], table: _Table, at: Path) -> Filter:
    sources, mark = table.texts("pattern"), table.text("mark", _MARK)
    ignore_case = table.flag("ignore_case")
    if not sources:
        raise RequestError("pattern must be a text or a list of texts")

    def accept(text: str, start: int, end: int) -> Sequence[Hit]:
        return [Hit(start, end, mark)]

    rules = tuple(Rule(Pattern(source, ignore_case), accept) for source in sources)
    return Filter(name, on, action, rules)


def _pii(name: str, action: Action, on: frozenset[Direction], table: _Table, at: Path) -> Filter:
    from pronk.serve.guard.pii import ENTITIES, pii_rules

    entities = tuple(table.texts("entities")) or ENTITIES
    return Filter(name, on, action, tuple(pii_rules(entities, table.text("region", "US"))))


def _injection(
    name: str, action: Action, on: frozenset[Direction], table: _Table, at: Path
) -> Filter:
    from pronk.serve.guard.injection import DEFAULT_THRESHOLD, score

    if "output" in on or action == "redact":
        raise RequestError("injection works on input alone, and cannot redact")
    return Filter(name, on, action, (), score, table.share("threshold", DEFAULT_THRESHOLD),
                  users=True)  # fmt: skip


def _classifier(
    name: str, action: Action, on: frozenset[Direction], table: _Table, at: Path
) -> Filter:
    judge, threshold = load_classifier(table.text("call")), table.share("threshold", 0.5)
    return Filter(name, on, action, (), judge, threshold, table.text("mark", _MARK))


_Make = Callable[[str, Action, frozenset[Direction], _Table, Path], Filter]
_KINDS: Mapping[str, _Make] = {
    "words": _words, "regex": _regex, "pii": _pii, "injection": _injection,
    "classifier": _classifier,
}  # fmt: skip
