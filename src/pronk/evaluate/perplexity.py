"""Perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pronk.evaluate.windows import (
    LogitsModel,
    check_logits,
    log_normalizer,
    rows_at_a_time,
    windows,
)

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Mean negative log-likelihood, in nats a token, over the tokens scored."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def to_dict(self) -> dict[str, float | int]:
        """Plain data under stable names."""
        return {"perplexity": self.perplexity, "nll": self.nll, "tokens": self.tokens}


def perplexity(
    model: LogitsModel,
    ids: Sequence[int],
    window: int = 512,
    stride: int | None = None,
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `ids`, each token but the first scored once.

    The windows are those of `pronk.evaluate.windows.windows`. Memory: the logits of one
    window, and 16 MB.

    Parameters
    ----------
    model : LogitsModel
        Gives float32 logits [tokens, vocabulary].
    ids : sequence of int
        The text as the model's tokenizer encodes it.
    window, stride, bos
        See `pronk.evaluate.windows.windows`.
    progress : callable, optional
        Called with the tokens scored and the tokens to score.
    """
    total, count = 0.0, 0
    for part in windows(ids, window, stride, bos):
        logits = check_logits(model.logits(part.ids), part)
        step = rows_at_a_time(logits.shape[1])
        for at in range(0, len(part.targets), step):
            x = logits[at : at + step].astype(np.float64)
            targets = part.targets[at : at + step]
            total += float((log_normalizer(x) - x[np.arange(len(x)), targets]).sum())
        # Before the next window's are computed: one window's logits at a time.
        del logits
        count += len(part.targets)
        if progress is not None:
            progress(count, len(ids) - 1)
    return Perplexity(total / count, count)
