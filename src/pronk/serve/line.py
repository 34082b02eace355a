"""Who waits for a first token, and how long another would: what admission is decided by."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Line"]

_KEEP = 0.95  # weight of what was measured, one first token later
_LEAST = 8.0  # weight of first tokens before anything is foretold


class Line:
    """Generations from when they are asked for to their first token. Used on one thread.

    What waits, over the rate at which first tokens come, is how long it waits (Little, Operations
    Research 9, 1961). The rate counts only while anybody waits, so that quiet hours do not make
    a server look slow; it is taken in generations and in tokens of prompts, and the longer wait
    counts.

    Parameters
    ----------
    clock : callable
        Seconds, for tests.

    Attributes
    ----------
    waiting : int
        Generations in line.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.waiting = 0
        self._tokens = 0
        self._last = 0.0
        self._spell = 0.0  # seconds in which anybody waited, since the last first token
        self._served = self._served_tokens = self._seconds = 0.0

    def enter(self, tokens: int) -> None:
        """One with a prompt of so many tokens begins to wait."""
        self._tick()
        self.waiting += 1
        self._tokens += tokens

    def leave(self, tokens: int, served: bool) -> None:
        """It waits no longer: its first token came, or it was given up."""
        self._tick()
        self.waiting -= 1
        self._tokens -= tokens
        if served:
            self._served = _KEEP * self._served + 1
            self._served_tokens = _KEEP * self._served_tokens + tokens
            self._seconds = _KEEP * self._seconds + self._spell
            self._spell = 0.0

    def _tick(self) -> None:
        now = self._clock()
        if self.waiting:
            self._spell += now - self._last
        self._last = now

    def wait(self, texts: int, tokens: int) -> float | None:
        """Seconds until the first tokens of so many more texts; None if nothing is known yet.

        Parameters
        ----------
        texts : int
        tokens : int
            Of all their prompts.
        """
        self._tick()
        if self._served < _LEAST:
            return None
        # When no first token has come for long, the next will show a lower rate: it counts now.
        seconds = max(self._seconds, _KEEP * self._seconds + self._spell)
        by_number = (self.waiting + texts) * seconds / self._served
        by_tokens = (self._tokens + tokens) * seconds / max(self._served_tokens, 1.0)
        return max(by_number, by_tokens)
