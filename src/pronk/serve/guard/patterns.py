"""Regular expressions for text that arrives in pieces.

They come from a configuration and run on anybody's text, so RE2 runs them: its time is linear in
the text, where a backtracking engine can be made to take for ever. RE2 has no partial matches, so
each pattern gets a companion that matches the beginnings of its matches: the tail of a text that
the companion matches might still become a match, and no other tail can.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pronk.errors import RequestError

__all__ = ["Pattern", "words_pattern"]

# Python's own parser, as hypothesis uses it too: the tree is what the companion is made of.
_sre = import_module("re._parser")
_MANY = 100  # what an unbounded repetition may repeat: a match has a longest length
_LONGEST = 4096
_MEMORY = (8 << 20, 64 << 20)  # most that RE2 may take for a pattern; more for large deny-lists
_CLASSES = {
    "CATEGORY_DIGIT": r"\p{Nd}",
    "CATEGORY_NOT_DIGIT": r"\P{Nd}",
    "CATEGORY_SPACE": r"\s\x{b}\x{85}\p{Z}",
    "CATEGORY_WORD": r"\p{L}\p{M}\p{N}_",
}
_NEGATED = {
    "CATEGORY_NOT_SPACE": _CLASSES["CATEGORY_SPACE"],
    "CATEGORY_NOT_WORD": _CLASSES["CATEGORY_WORD"],
}
_ANCHORS = {
    "AT_BEGINNING": r"\A", "AT_BEGINNING_STRING": r"\A", "AT_END": r"\z", "AT_END_STRING": r"\z",
    "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B",
}  # fmt: skip


class _UnsupportedError(Exception):
    """A construct that has no place here."""


class Pattern:
    """A pattern, and the beginnings of its matches.

    ``*``, ``+`` and ``{n,}`` repeat at most 100 times, so that what has to be held back is bounded.
    There are no lookarounds and no references to groups; ``\\b`` knows ASCII only, as RE2's does.

    Parameters
    ----------
    source : str
        In Python's syntax.
    ignore_case : bool

    Attributes
    ----------
    width : int
        Characters of its longest match.

    Raises
    ------
    RequestError
        If it is none, matches the empty text, or is too large.
    """

    def __init__(self, source: str, ignore_case: bool = False) -> None:
        try:
            tree = _sre.parse(source, re.IGNORECASE if ignore_case else 0)
            if tree.state.flags & (re.ASCII | re.LOCALE):
                raise _UnsupportedError("the flags a and L")
            whole = _Writer(tree.state.flags)
            self.width = whole.width(tree)
            if tree.getwidth()[0] == 0:
                raise RequestError(f"the pattern {source!r} matches the empty text")
            if self.width > _LONGEST:
                raise RequestError(
                    f"the pattern {source!r} matches up to {self.width} characters, of at most "
                    f"{_LONGEST}: bound its repetitions"
                )
            match, begun = whole.match(tree), whole.begun(tree)
        except (re.error, OverflowError) as error:
            raise RequestError(
                f"the pattern {source!r} is no regular expression: {error}"
            ) from None
        except _UnsupportedError as error:
            raise RequestError(
                f"the pattern {source!r} uses {error}, which text in pieces cannot be searched for"
            ) from None
        except RecursionError:
            raise RequestError(f"the pattern {source[:40]!r}... is nested too deep") from None
        flags = "(?i)" if tree.state.flags & re.IGNORECASE else ""
        self._match = _compile(f"{flags}{match}", source)
        self._begun = _compile(f"{flags}(?:{begun})\\z", source)
        # RE2 compiles an expression backwards when it is first needed, which may take 200 MB for
        # a moment: now, before a model takes their place, and not in the middle of requests.
        self.open_from("-", 0)

    def search(self, text: str, start: int) -> tuple[int, int] | None:
        """Where the first match from `start` on lies."""
        found = self._match.search(text, start)
        return found.span() if found else None

    def open_from(self, text: str, start: int) -> int:
        """Where the longest tail begins that more text may make a match; the end, if none may."""
        found = self._begun.search(text, start)
        return int(found.start()) if found else len(text)


def _compile(source: str, given: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors, options.never_capture = False, True
    for most in _MEMORY:
        options.max_mem = most
        with contextlib.suppress(re2.error):  # too large: with more memory, or not at all
            return re2.compile(source, options)
    raise RequestError(
        f"the pattern {given[:80]!r} is too large: bound its repetitions, or split it"
    )


class _Writer:
    """Writes a parsed expression in RE2's syntax, whole or as its beginnings."""

    def __init__(self, flags: int) -> None:
        self._flags = flags

    def width(self, tree: Any) -> int:
        """Characters of the longest match."""
        return sum(self._width(*node) for node in tree)

    def _width(self, kind: Any, value: Any) -> int:
        match str(kind):
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return 1
            case "BRANCH":
                return max(self.width(part) for part in value[1])
            case "SUBPATTERN":
                return self.width(value[3])
            case "MAX_REPEAT" | "MIN_REPEAT":
                return _times(value)[1] * self.width(value[2])
        return 0

    def match(self, tree: Any, anchors: bool = True) -> str:
        """The expression itself; without `anchors`, one that matches no less."""
        return "".join(self._node(kind, value, anchors) for kind, value in tree)

    def _node(self, kind: Any, value: Any, anchors: bool) -> str:
        match str(kind):
            case "LITERAL":
                return _char(value)
            case "NOT_LITERAL":
                return f"[^{_char(value)}]"
            case "ANY":
                return "(?s:.)" if self._flags & re.DOTALL else r"[^\n]"
            case "IN":
                return _set(value)
            case "BRANCH":
                return f"(?:{'|'.join(self.match(part, anchors) for part in value[1])})"
            case "SUBPATTERN":
                return self._group(value, lambda inner, tree: inner.match(tree, anchors))
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high = _times(value)
                lazy = "?" if str(kind) == "MIN_REPEAT" else ""
                return f"(?:{self.match(value[2], anchors)}){{{low},{high}}}{lazy}"
            case "AT":
                return self._anchor(str(value)) if anchors else ""
        raise _UnsupportedError(str(kind).lower().replace("_", " "))

    def _group(self, value: Any, write: Any) -> str:
        _, added, removed, tree = value
        inner = _Writer((self._flags | added) & ~removed)
        # Case is RE2's to fold; the other flags are written out.
        case = "i" if added & re.IGNORECASE else "-i" if removed & re.IGNORECASE else ""
        return f"(?{case}:{write(inner, tree)})"

    def _anchor(self, name: str) -> str:
        if self._flags & re.MULTILINE and name in ("AT_BEGINNING", "AT_END"):
            return "(?m:^)" if name == "AT_BEGINNING" else "(?m:$)"
        return _ANCHORS[name]

    def begun(self, tree: Any) -> str:
        """What matches all beginnings of matches, the empty one too.

        Of a sequence, those of its first half, or all of that and those of the second: halving
        keeps what is written short.
        """
        if len(tree) > 1:
            half = len(tree) // 2
            first, second = tree[:half], tree[half:]
            return f"(?:{self.begun(first)}|{self.match(first, False)}(?:{self.begun(second)}))"
        return self._begun(*tree[0]) if len(tree) else ""

    def _begun(self, kind: Any, value: Any) -> str:
        match str(kind):
            case "BRANCH":
                return f"(?:{'|'.join(self.begun(part) for part in value[1])})"
            case "SUBPATTERN":
                return self._group(value, lambda inner, tree: inner.begun(tree))
            case "MAX_REPEAT" | "MIN_REPEAT":
                high = _times(value)[1]
                if not high:
                    return ""
                return f"(?:{self.match(value[2], False)}){{0,{high - 1}}}{self.begun(value[2])}"
            case "AT":
                return ""
        return f"(?:{self._node(kind, value, False)})?"


def _times(value: Any) -> tuple[int, int]:
    low, high = int(value[0]), int(value[1])
    return low, max(low, _MANY) if value[1] is _sre.MAXREPEAT else high


def _char(code: int) -> str:
    if 0xD800 <= code < 0xE000:
        raise _UnsupportedError("a lone surrogate")
    return f"\\x{{{code:x}}}"


def _set(items: Sequence[tuple[Any, Any]]) -> str:
    negated, inside, others = False, "", []
    for kind, value in items:
        match str(kind):
            case "NEGATE":
                negated = True
            case "LITERAL":
                inside += _char(value)
            case "RANGE":
                inside += f"{_char(value[0])}-{_char(value[1])}"
            case _ if str(value) in _CLASSES:
                inside += _CLASSES[str(value)]
            case _:
                others.append(_NEGATED[str(value)])
    if not others:
        return f"[{'^' if negated else ''}{inside}]"
    if not negated:
        parts = [f"[^{other}]" for other in others] + ([f"[{inside}]"] if inside else [])
        return f"(?:{'|'.join(parts)})"
    if len(others) == 1 and not inside:
        return f"[{others[0]}]"
    raise _UnsupportedError("a set that excludes \\W or \\S with other characters")


def words_pattern(words: Sequence[str]) -> Pattern:
    """A pattern of any of some words, the longest first, in any case."""
    ordered = sorted(words, key=len, reverse=True)
    return Pattern("|".join(map(re.escape, ordered)), ignore_case=True)
