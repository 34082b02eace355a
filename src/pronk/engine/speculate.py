"""Drafts without a second model: what followed the same words before, verified in one step.

A draft is looked up in the sequence itself (prompt lookup; Saxena 2023). The step that computes
the next token also computes the draft's, and the sampler draws as ever: a drafted token counts
only where it is the one that is drawn, so tokens are those of a run without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

__all__ = ["Acceptance", "Candidate", "Lookup", "Speculator", "StepCost"]

_MOST_DRAFTED = 31  # tokens of one sequence in one step
_KNOTS = (1, 2, 4, 8, 16, 32, 64)  # tokens of a step whose cost is kept
_MOST_ROWS = _KNOTS[-1]  # tokens of a step with drafts
_LONGEST = 16  # matching tokens that are told apart
_RESUMED = _LONGEST + 1  # what is added to a length where a broken match goes on
_SURE = 8  # matching tokens from which a match is followed without looking for a better one
_NEAR = 32  # tokens behind the last long match within which it is thought to go on
# What a match is taken for before any was seen: longer ones hold more often, resumed ones more
# often still. A little is taken off, so that text which never repeats costs little.
_LENGTHS = range(1, _LONGEST + 1)
_EXPECTED: tuple[float, ...] = (
    *(0.0, *(0.87 * (1 - 0.8 * n**-0.6) for n in _LENGTHS)),
    *(0.0, *(0.87 * (1 - 0.65 * n**-0.9) for n in _LENGTHS)),
)
_SLOWEST = 1 / 24  # least weight of a new match
_MARGIN = 1.05  # what a draft must promise over none
_LIKELY = 0.5  # chance from which a token is drafted beside prompts, and on trial
_PATIENCE = 128  # steps without a draft before a likely one is tried whatever it is said to cost


class Acceptance:
    """How often the token after a match was the next one, by the length of the match.

    Every match is scored against the token that comes, drafted or not, so that trying is never
    needed to know whether it would pay. Each sequence begins anew: what one repeats says little
    about the next.
    """

    def __init__(self) -> None:
        self._rates = list(_EXPECTED)
        self._trials = [4] * len(self._rates)

    def rate(self, kind: int) -> float:
        """The share of matches of a kind that held."""
        return self._rates[kind]

    def record(self, kind: int, hit: bool) -> None:
        """Count one match."""
        self._trials[kind] += 1
        self._rates[kind] += (hit - self._rates[kind]) * max(1 / self._trials[kind], _SLOWEST)


class Lookup:
    """Follows one sequence, and knows where it was in the same words before."""

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self._tokens = np.empty(256, np.int32)
        self._count = 0
        self._cursor = -1  # where the predicted token stands; -1 is nowhere
        self._matched = 0  # tokens before it that match the end of the sequence
        self._resumed = False  # found near where a long match broke off
        self._anchor = -_NEAR  # where the last long match broke off

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in what is new of a sequence's tokens, and find where it was before."""
        new = tokens[self._count :]
        if len(tokens) > len(self._tokens):
            grown = np.empty(2 * len(tokens), np.int32)
            grown[: self._count] = self._tokens[: self._count]
            self._tokens = grown
        for i, token in enumerate(new):
            if self._cursor < 0:
                self._tokens[self._count : len(tokens)] = new[i:]
                self._count = len(tokens)
                break
            hit = bool(self._tokens[self._cursor] == token)
            self.acceptance.record(self._kind(0), hit)
            self._tokens[self._count] = token
            self._count += 1
            if hit:
                self._cursor += 1
                self._matched += 1
            else:
                if self._matched >= _SURE:
                    self._anchor = self._cursor
                self._cursor = -1
        if new and (self._cursor < 0 or self._matched < _SURE):
            self._find()

    def _kind(self, ahead: int) -> int:
        return min(self._matched + ahead, _LONGEST) + (_RESUMED if self._resumed else 0)

    def _find(self) -> None:
        """The longest match of the end; among equals, the last."""
        tokens, end = self._tokens, self._count - 1
        self._cursor, self._matched, self._resumed = -1, 0, False
        places = np.flatnonzero(tokens[:end] == tokens[end])
        if not len(places):
            return
        low, high = np.searchsorted(places, (self._anchor, self._anchor + _NEAR))
        near = int(places[low]) if low < high else -1
        for matched in range(1, _LONGEST + 1):
            self._cursor, self._matched = int(places[-1]) + 1, matched
            if len(places) == 1 and places[0] < matched:
                break
            places = places[tokens[places - matched] == tokens[end - matched]]
            if len(places) and places[0] < matched:
                places = places[1:]
            if not len(places):
                break
        if near >= 0:
            length, rate = self._length(near), self.acceptance.rate
            if rate(length + _RESUMED) > rate(self._matched):
                self._cursor, self._matched, self._resumed = near + 1, length, True

    def _length(self, place: int) -> int:
        """How many tokens up to a place are those of the end, told apart up to `_LONGEST`."""
        most = min(_LONGEST, place + 1)
        here = self._tokens[place + 1 - most : place + 1]
        there = self._tokens[self._count - most : self._count]
        differ = np.flatnonzero(here != there)
        return most - 1 - int(differ[-1]) if len(differ) else most

    def chances(self, limit: int) -> list[float]:
        """The chance that the draft holds up to each of its tokens."""
        if self._cursor < 0:
            return []
        chance, chances = 1.0, []
        for i in range(limit):
            chance *= self.acceptance.rate(self._kind(i))
            if chance < 0.05:
                break
            chances.append(chance)
        return chances

    def draft(self, count: int) -> list[int]:
        """The tokens that followed before; what runs past the end repeats."""
        known = self._tokens[self._cursor : min(self._cursor + count, self._count)]
        found: list[int] = known.tolist()
        period = len(found)
        while len(found) < count:
            found.append(found[len(found) - period])
        return found


class StepCost:
    """What a step of so many tokens costs beside a step of one: running averages, no assumptions.

    The level (what one token costs now) follows every step; the shape (what more cost beside it)
    is kept at powers of two and learnt from the steps near them, so that a slow spell or a
    growing context does not count against the steps that met it.
    """

    def __init__(self) -> None:
        self._level = 0.0
        # Only until a step has been measured: dear, so that little is lost by trying.
        self._costs = [1 + 0.25 * (rows - 1) for rows in range(_MOST_ROWS + 1)]
        self._shape = [self._costs[rows] for rows in _KNOTS]
        self._seen = [0.0] * len(_KNOTS)  # weight of what each has learnt from

    def __call__(self, rows: int) -> float:
        """The cost of a step of so many tokens."""
        return self._costs[rows]

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one step."""
        if not 1 <= rows <= _MOST_ROWS or seconds <= 0:
            return
        self._level = self._level or seconds / self._costs[rows]
        ratio = min(seconds / (self._level * self._costs[rows]), 2.0)  # one hiccup is no trend
        knot = (rows - 1).bit_length()
        if not knot or self._seen[knot] > 4:  # before, what is wrong is the shape
            self._level *= ratio**0.1
        if not knot:
            return
        share = (rows - _KNOTS[knot - 1]) / (_KNOTS[knot] - _KNOTS[knot - 1])
        for i, weight in ((knot - 1, 1 - share), (knot, share)):
            if i and weight:
                self._seen[i] += weight
                self._shape[i] *= ratio ** (weight * max(1 / (0.5 + self._seen[i]), 0.05))
        self._refresh()

    def _refresh(self) -> None:
        """The costs of all numbers of rows: straight through what was measured, and beyond it."""
        shape, costs = self._shape, self._costs
        known = [0, *(i for i, seen in enumerate(self._seen) if seen)]
        for low, high in pairwise(known):
            slope = (shape[high] - shape[low]) / (_KNOTS[high] - _KNOTS[low])
            for rows in range(_KNOTS[low], _KNOTS[high] + 1):
                costs[rows] = shape[low] + slope * (rows - _KNOTS[low])
        last = known[-1]
        slope = max((shape[last] - 1) / (_KNOTS[last] - 1), 0.0)
        for rows in range(_KNOTS[last], _MOST_ROWS + 1):
            costs[rows] = shape[last] + slope * (rows - _KNOTS[last])
        self._shape = [costs[rows] for rows in _KNOTS]


class Candidate(NamedTuple):
    """A sequence that could be drafted for: its tokens, and how many more it may have."""

    lookup: Lookup | None
    tokens: Sequence[int]
    most: int


class Speculator:
    """Chooses what to draft for the sequences of a step, and remembers what it was worth.

    Attributes
    ----------
    drafted, accepted : int
        Tokens that were verified, and those of them that were drawn.
    """

    def __init__(self) -> None:
        self.cost = StepCost()
        self.drafted = 0
        self.accepted = 0
        self._idle = 0

    def plan(self, candidates: Sequence[Candidate], room: int, alone: bool) -> list[list[int]]:
        """A draft, perhaps empty, for each sequence that decodes in a step.

        Parameters
        ----------
        candidates : sequence of Candidate
        room : int
            Most tokens to draft in all.
        alone : bool
            Whether nothing but these sequences is in the step.
        """
        rows = len(candidates)
        room = min(room, _MOST_ROWS - rows)
        if room < 1:
            return [[] for _ in candidates]
        tokens: list[tuple[float, int]] = []  # chance, whose
        for i, (lookup, known, most) in enumerate(candidates):
            if lookup is not None and most > 0:
                lookup.follow(known)
                limit = min(_MOST_DRAFTED, room, most)
                tokens += ((chance, i) for chance in lookup.chances(limit))
        # Within a sequence chances only fall, so the best of all are prefixes of drafts.
        tokens.sort(key=lambda token: -token[0])
        count = self._worthwhile([chance for chance, _ in tokens[:room]], rows, alone)
        counts = [0] * rows
        for _, i in tokens[:count]:
            counts[i] += 1
        return [
            c.lookup.draft(n) if c.lookup and n else []
            for c, n in zip(candidates, counts, strict=True)
        ]

    def _worthwhile(self, chances: list[float], rows: int, alone: bool) -> int:
        """How many of the best tokens to draft: tokens a second are to be the most."""
        likely = sum(chance >= _LIKELY for chance in chances)
        if not alone:
            return likely  # the step is long whatever is added
        gain, count, expected = _MARGIN * rows / self.cost(rows), 0, float(rows)
        for n, chance in enumerate(chances, 1):
            expected += chance
            rate = expected / self.cost(rows + n)
            if rate > gain:
                gain, count = rate, n
        self._idle = 0 if count else self._idle + 1
        if self._idle >= _PATIENCE and likely:
            self._idle = 0
            return min(likely, 3)
        return count
