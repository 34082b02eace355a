"""How many tokens a step may have, so that those who wait for their next token get it in time."""

from __future__ import annotations

__all__ = ["Pace"]

_KEEP = 0.98  # weight of what was measured, one step later


class Pace:
    """Fits ``seconds = fixed + each * tokens`` to the steps that ran, the latest the most.

    Parameters
    ----------
    target : float or None
        Seconds a step may take while anybody decodes; None: any.
    """

    def __init__(self, target: float | None = None) -> None:
        self.target = target
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in one step."""
        self._weight = _KEEP * self._weight + 1
        self._tokens = _KEEP * self._tokens + tokens
        self._seconds = _KEEP * self._seconds + seconds
        self._squares = _KEEP * self._squares + tokens * tokens
        self._products = _KEEP * self._products + tokens * seconds

    def budget(self, least: int, most: int) -> int:
        """Tokens of a step that keeps the target, in [least, most]."""
        if self.target is None or not self._tokens:
            return most
        n, mean = self._weight, self._tokens / self._weight
        spread = self._squares - n * mean * mean
        each = 0.0
        if spread > 1e-9 * self._squares:
            each = (self._products - mean * self._seconds) / spread
        if each <= 0:  # steps of one size say nothing of others: dear, so that it is soon known
            each = self._seconds / self._tokens
        fixed = self._seconds / n - each * mean
        return max(least, min(most, int((self.target - fixed) / each)))
