"""Perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pronk.evaluate.scores import score_window
from pronk.evaluate.windows import LogitsModel, windows

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

    The windows are those of `pronk.evaluate.windows.windows`.

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
        (scores,) = score_window(part, [model])
        total += float(scores.nll.sum())
        count += len(scores)
        if progress is not None:
            progress(count, len(ids) - 1)
    return Perplexity(total / count, count)
