"""Filters in their order: what a guard is made of, and how it works on one text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pronk.serve.guard.stages import Action, Direction, Judging, Matching, Rule, Stage

__all__ = ["Chain", "Filter", "Guard", "Told"]

Told = Callable[[str, Action, Direction], None]  # a filter's name, what it did, to what


@dataclass(frozen=True, slots=True)
class Filter:
    """One of a guard's filters: rules to search by, or a judge to ask.

    Parameters
    ----------
    name : str
    on : set of "input" and "output"
    action : "block", "redact" or "flag"
    rules : tuple of Rule
    judge : callable or None
        Text to a score; the filter acts where it reaches `threshold`.
    threshold : float
    mark : str
        What stands for a sentence that a judge found.
    users : bool
        Whether it passes over what the application itself says: system messages.
    """

    name: str
    on: frozenset[Direction]
    action: Action
    rules: tuple[Rule, ...] = ()
    judge: Callable[[str], float] | None = None
    threshold: float = 0.5
    mark: str = "[REDACTED]"
    users: bool = False

    def stages(self, direction: Direction, tell: Told) -> Sequence[Stage]:
        """Itself at work on one text."""
        if direction not in self.on:
            return ()

        def told() -> None:
            tell(self.name, self.action, direction)

        if self.judge is not None:
            return (Judging(self.judge, self.threshold, direction == "input", self.mark,
                            self.action, told),)  # fmt: skip
        return [Matching(rule, self.action, told) for rule in self.rules]


class Chain:
    """Filters at work on one text, each on what those before it give.

    Attributes
    ----------
    blocked : bool
        Whether a filter ended the text: what `push` gave so far is all of it.
    """

    def __init__(self, filters: Sequence[Filter], direction: Direction, tell: Told) -> None:
        self._stages = [stage for one in filters for stage in one.stages(direction, tell)]
        self.asks = any(isinstance(stage, Judging) for stage in self._stages)
        self.blocked = False

    def push(self, text: str, final: bool = False) -> str:
        """Take a piece, the last if `final`, and give what is certain."""
        if self.blocked:
            return ""
        for stage in self._stages:
            text = stage.push(text, final)
            # What comes before a place that is blocked is the whole text for those that follow.
            final |= stage.blocked
            self.blocked |= stage.blocked
        return text


class Guard:
    """The filters of a server, in their order."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.filters = tuple(filters)
        outputs = [one for one in filters if "output" in one.on]
        self.watches_output = bool(outputs)
        self.changes_output = any(one.action != "flag" for one in outputs)

    def chain(self, direction: Direction, tell: Told, system: bool = False) -> Chain:
        """The filters for a text; `system` if the application wrote it."""
        filters = [one for one in self.filters if not (system and one.users)]
        return Chain(filters, direction, tell)
