"""A filter at work on one text, which may arrive in pieces: what it gives is the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pronk.serve.guard.patterns import Pattern

__all__ = ["Action", "Direction", "Hit", "Judging", "Matching", "Rule", "Stage"]

Action = Literal["block", "redact", "flag"]
Direction = Literal["input", "output"]
_UNIT = 400  # most characters that a judge of answers waits for
_CONTEXT = 2000  # characters before them that it sees too
_SENTENCE = re.compile(r"[.!?]\s|\n")


@dataclass(frozen=True, slots=True)
class Hit:
    """A place in a text, and what stands there once it is redacted."""

    start: int
    end: int
    mark: str


@dataclass(frozen=True, slots=True)
class Rule:
    """What to look for.

    Parameters
    ----------
    pattern : Pattern
    accept : callable
        Of a text and a match's start and end: the places that count, within the match. It may look
        at one character on either side.
    """

    pattern: Pattern
    accept: Callable[[str, int, int], Sequence[Hit]]


class Stage(Protocol):
    """One filter's work on one text."""

    blocked: bool

    def push(self, text: str, final: bool) -> str:
        """Take a piece, the last if `final`, and give what is certain."""
        ...


class Matching:
    """Finds a rule's matches, wherever a text is cut.

    What is given depends on the whole text alone. A match is acted on once more text cannot
    change it: it does not begin at or after a place from which all that is there might still
    become a match (`Pattern.open_from`). What lies before that place and matches nothing is given;
    the rest, no longer than the longest match, is held back.

    Parameters
    ----------
    rule : Rule
    action : "block", "redact" or "flag"
    tell : callable
        Told of each hit.
    """

    def __init__(self, rule: Rule, action: Action, tell: Callable[[], None]) -> None:
        self._rule, self._action, self._tell = rule, action, tell
        self._held, self._start = "", 0  # and one character before, for \b and the like
        self.blocked = False

    def push(self, text: str, final: bool) -> str:
        """Take a piece, the last if `final`, and give what is certain."""
        if self.blocked:
            return ""
        text = self._held + text
        pattern, out = self._rule.pattern, []
        at = self._start
        open_from = len(text) if final else pattern.open_from(text, at)
        while True:
            if open_from < at:
                open_from = pattern.open_from(text, at)
            found = pattern.search(text, at)
            if found is None or (not final and found[0] >= open_from):
                break
            hits = self._rule.accept(text, *found)
            for hit in hits:
                self._tell()
                out.append(text[at : hit.start])
                if self._action == "block":
                    self.blocked, self._held = True, ""
                    return "".join(out)
                out.append(hit.mark if self._action == "redact" else text[hit.start : hit.end])
                at = hit.end
            if not hits:
                out.append(text[at : found[0] + 1])
                at = found[0] + 1
        out.append(text[at:open_from])
        self._held, self._start = text[max(0, open_from - 1) :], min(open_from, 1)
        return "".join(out)


class Judging:
    """Asks for a score of a text, and acts where it reaches a threshold.

    A text that is asked is judged whole. An answer is judged a sentence at a time, with what stood
    before it; so sentences are held back until they end, or 400 characters have come.

    Parameters
    ----------
    judge : callable
        Text to a score.
    threshold : float
    whole : bool
    mark : str
    action : "block", "redact" or "flag"
    tell : callable
        Told of each text that reaches the threshold.
    """

    def __init__(
        self,
        judge: Callable[[str], float],
        threshold: float,
        whole: bool,
        mark: str,
        action: Action,
        tell: Callable[[], None],
    ) -> None:
        self._judge, self._threshold, self._whole = judge, threshold, whole
        self._mark, self._action, self._tell = mark, action, tell
        self._held = self._before = ""
        self.blocked = False

    def push(self, text: str, final: bool) -> str:
        """Take a piece, the last if `final`, and give what is certain."""
        self._held += text
        out: list[str] = []
        while not self.blocked and (end := self._end(final)):
            unit, self._held = self._held[:end], self._held[end:]
            self._before = (self._before + unit)[-(_CONTEXT + len(unit)) :]
            if self._judge(self._before) < self._threshold:
                out.append(unit)
                continue
            self._tell()
            if self._action == "block":
                self.blocked = True
            else:
                out.append(self._mark if self._action == "redact" else unit)
                if self._action == "redact":
                    self._before = ""  # what nobody sees must not count against what follows
        return "".join(out)

    def _end(self, final: bool) -> int:
        """Where the text ends that is judged next; 0: not there yet."""
        if self._whole:
            return len(self._held) if final else 0
        found = _SENTENCE.search(self._held, 0, _UNIT)
        if found:
            return found.end()
        if len(self._held) >= _UNIT:
            return _UNIT
        return len(self._held) if final else 0
