"""Whether one model is better than another on the same text or questions: paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.errors import RequestError

__all__ = ["RESAMPLES", "Interval", "Resampled", "blocks_of", "holm", "mcnemar"]

RESAMPLES = 10_000
_AT_ONCE = 1000  # resamples that are drawn together
_MOST_BLOCK, _LEAST_BLOCK, _BLOCKS = 256, 16, 64

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean or a difference of two, its 95 % confidence interval, and for a difference its p."""

    value: float
    low: float
    high: float
    p: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Plain data under stable names."""
        known = {"value": self.value, "low": self.low, "high": self.high}
        return known if self.p is None else {**known, "p": self.p}


def blocks_of(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Where the blocks of a text start that are resampled as a whole, int64 [blocks].

    Neighbouring tokens are not independent, so what is drawn are runs of tokens scored in one
    window: of 256, or fewer where the text would give fewer than 64 of them.

    Parameters
    ----------
    sizes : sequence of int
        Tokens scored in each window.
    """
    size = min(_MOST_BLOCK, max(_LEAST_BLOCK, sum(sizes) // _BLOCKS))
    starts: list[int] = []
    at = 0
    for count in sizes:
        # Even cuts, so that no block is a stub.
        cuts = max(1, round(count / size))
        starts += [at + count * i // cuts for i in range(cuts)]
        at += count
    return np.array(sorted(set(starts)), np.int64)


class Resampled:
    """Means over blocks drawn with replacement (Efron 1979), the same blocks for all models.

    Parameters
    ----------
    values : ndarray, float64 [models, items]
        A figure of every model for every token or question.
    starts : ndarray, int64 [blocks], optional
        Where the blocks start; every item is one unless given.
    seed : int
    """

    def __init__(
        self, values: NDArray[Any], starts: NDArray[np.int64] | None = None, seed: int = 0
    ) -> None:
        values = np.asarray(values, np.float64)
        if starts is None:
            starts = np.arange(values.shape[1])
        if not len(starts):
            raise RequestError("there is nothing to resample: give a longer text or more questions")
        sums = np.add.reduceat(values, starts, axis=1)
        counts = np.diff(np.append(starts, values.shape[1])).astype(np.float64)
        self.blocks = len(starts)
        self.means: Floats = values.mean(axis=1)
        rng = np.random.default_rng(seed)
        even = np.full(self.blocks, 1 / self.blocks)
        drawn = []
        for _ in range(0, RESAMPLES, _AT_ONCE):
            times = rng.multinomial(self.blocks, even, _AT_ONCE).astype(np.float64)
            drawn.append((times @ sums.T) / (times @ counts)[:, None])
        self._drawn: Floats = np.concatenate(drawn)  # [resamples, models]

    def mean(self, model: int) -> Interval:
        """A model's mean."""
        low, high = np.quantile(self._drawn[:, model], (0.025, 0.975))
        return Interval(float(self.means[model]), float(low), float(high))

    def difference(self, model: int, other: int) -> Interval:
        """A model's mean less another's.

        p is two-sided: twice the share of resamples in which the difference has not the sign it
        has, one more counted than there are (Davison and Hinkley 1997), so never zero.
        """
        drawn = self._drawn[:, model] - self._drawn[:, other]
        low, high = np.quantile(drawn, (0.025, 0.975))
        less = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        p = min(1.0, 2 * (less + 1) / (len(drawn) + 1))
        value = float(self.means[model] - self.means[other])
        return Interval(value, float(low), float(high), p)


def mcnemar(right: NDArray[Any], other: NDArray[Any]) -> float:
    """Exact two-sided p of McNemar's test (1947) on the questions that one alone got right.

    Parameters
    ----------
    right, other : ndarray, bool [questions]
        Which questions each of two models got right.
    """
    ahead = int((right & ~other).sum())
    behind = int((other & ~right).sum())
    n, k = ahead + behind, min(ahead, behind)
    if 2 * k == n:
        return 1.0
    # Logarithms: of thousands of questions, 2**-n is no float.
    terms = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, terms)))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for having tested so many pairs (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted = [0.0] * len(values)
    most = 0.0
    for place, i in enumerate(order):
        most = max(most, min(1.0, values[i] * (len(values) - place)))
        adjusted[i] = most
    return adjusted
