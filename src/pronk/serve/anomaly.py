"""Step changes in a server's latencies and errors, found while they are fresh.

Page's cumulative sum test (Biometrika 41, 1954) of each series: every value adds by how much it is
worse than usual, and what is as usual takes away. No single value raises an alarm, and a lasting
change does after a handful.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Alarm", "Anomalies", "Level", "Share"]

_WARM = 30  # values before anything is judged
_MEMORY = 1000  # values that the usual is made of
_LEAST_SPREAD = 0.1  # of logarithms: a change by a tenth is noise however even the values were
_CLIP = 4.0  # spreads that one value can add
_SLACK, _LIMIT = 0.75, 12.0  # spreads taken away a value, and the sum that raises
_MOST_SHARE, _LEAST_SHARE = 0.2, 0.01
_CERTAINTY = math.log(1e6)  # of the likelihoods, before it raises
_ACCEPT = 120.0  # seconds after which a change is the usual


@dataclass(frozen=True, slots=True)
class Alarm:
    """A series that is no longer as it was, since when, and from what to what."""

    series: str
    since: float
    usual: float
    now: float


class Level:
    """Positive values, such as latencies: alarmed while they are higher than usual."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._square = self._recent = self._sum = 0.0
        self.alarmed = False

    @property
    def usual(self) -> float:
        """What values were before, a geometric mean."""
        return math.exp(self._mean)

    @property
    def now(self) -> float:
        """The same of the last few."""
        return math.exp(self._recent)

    def add(self, value: float) -> None:
        """Take the next value."""
        x = math.log(max(value, 1e-9))
        self._recent += (x - self._recent) * (1 if not self._count else 0.2)
        if self._count >= _WARM:
            spread = max(_LEAST_SPREAD, math.sqrt(max(0.0, self._square - self._mean**2)))
            z = max(-_CLIP, min(_CLIP, (x - self._mean) / spread))
            self._sum = min(max(0.0, self._sum + z - _SLACK), 2 * _LIMIT)
            self.alarmed = self._sum > (_LIMIT / 2 if self.alarmed else _LIMIT)
            # What is judged must not become the measure: far values count as near ones.
            x = self._mean + max(-2.0, min(2.0, z)) * spread
        if not self.alarmed:
            self._count += 1
            rate = 1 / min(self._count, _MEMORY)
            self._mean += (x - self._mean) * rate
            self._square += (x * x - self._square) * rate


class Share:
    """Outcomes, good or bad: alarmed while more than usual are bad.

    The sum is of log likelihood ratios: of a share five times the usual one, against the usual.
    """

    def __init__(self) -> None:
        self._count, self._sum = 0, 0.0
        self.usual = self.now = 0.0
        self.alarmed = False

    def add(self, value: float) -> None:
        """Take the next outcome: 1 is bad, 0 is good."""
        bad = value > 0
        self.now += (bad - self.now) * 0.1
        if self._count >= _WARM:
            usual = max(_LEAST_SHARE, min(self.usual, _MOST_SHARE))
            more = min(0.9, max(_MOST_SHARE, 5 * usual))
            ratio = more / usual if bad else (1 - more) / (1 - usual)
            self._sum = min(max(0.0, self._sum + math.log(ratio)), 2 * _CERTAINTY)
            self.alarmed = self._sum > (_CERTAINTY / 2 if self.alarmed else _CERTAINTY)
        if not self.alarmed:
            self._count += 1
            self.usual += (bad - self.usual) / min(self._count, _MEMORY)


class Anomalies:
    """The detectors of a server, a series each. Not thread-safe: the event loop owns it.

    A change that lasts two minutes is taken for the new usual.

    Parameters
    ----------
    clock : callable
        Seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._series: dict[str, Level | Share] = {}
        self._since: dict[str, float] = {}

    def latency(self, series: str, seconds: float) -> Alarm | None:
        """Take a latency; an alarm if this one raised it."""
        return self._add(series, Level, seconds)

    def outcome(self, series: str, failed: bool) -> Alarm | None:
        """Take an outcome; an alarm if this one raised it."""
        return self._add(series, Share, float(failed))

    def _add(self, series: str, kind: type[Level | Share], value: float) -> Alarm | None:
        detector = self._series.get(series)
        if detector is None:
            detector = self._series[series] = kind()
        detector.add(value)
        since = self._since.get(series)
        if not detector.alarmed:
            self._since.pop(series, None)
        elif since is None:
            self._since[series] = self._clock()
            return self._alarm(series)
        elif self._clock() - since > _ACCEPT:
            del self._series[series], self._since[series]
        return None

    def _alarm(self, series: str) -> Alarm:
        detector = self._series[series]
        return Alarm(series, self._since[series], detector.usual, detector.now)

    @property
    def series(self) -> Iterator[tuple[str, Alarm | None]]:
        """Every series, and its alarm where there is one."""
        for name in self._series:
            yield name, self._alarm(name) if name in self._since else None
