"""How far a model's predictions are from those of a reference, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError
from pronk.evaluate.scores import score_window
from pronk.evaluate.windows import LogitsModel, log_normalizer, rows_at_a_time, windows

__all__ = ["Divergence", "divergence", "mean_divergence"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Mean KL(reference || model) in nats a token, and how often both agree on the best token."""

    kl: float
    top1_agreement: float
    tokens: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain data under stable names."""
        return {"kl": self.kl, "top1_agreement": self.top1_agreement, "tokens": self.tokens}


def divergence(
    reference: LogitsModel,
    model: LogitsModel,
    ids: Sequence[int],
    window: int = 512,
    stride: int | None = None,
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Compare two models window by window, at the positions `perplexity` scores.

    Parameters
    ----------
    reference, model : LogitsModel
        They must share the vocabulary.
    ids : sequence of int
        The text as their tokenizer encodes it.
    window, stride, bos
        See `pronk.evaluate.windows.windows`.
    progress : callable, optional
        Called with the tokens compared and the tokens to compare.

    Raises
    ------
    RequestError
        If the vocabularies differ in size.
    """
    kl, same, count = 0.0, 0, 0
    for part in windows(ids, window, stride, bos):
        (scores,) = score_window(part, [model], reference)
        kl += float(scores.kl.sum())
        same += int(scores.same.sum())
        count += len(scores)
        if progress is not None:
            progress(count, len(ids) - 1)
    return Divergence(kl / count, same / count, count)


def mean_divergence(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """KL(expected || got) of logits [rows, vocabulary], in nats a row.

    Raises
    ------
    CheckpointError
        If their shapes differ, or a row is not finite.
    """
    if expected.shape != got.shape:
        raise CheckpointError(f"logits of shapes {expected.shape} and {got.shape} were compared")
    total, step = 0.0, rows_at_a_time(expected.shape[1])
    for at in range(0, len(expected), step):
        p = expected[at : at + step].astype(np.float64)
        q = got[at : at + step].astype(np.float64)
        p -= log_normalizer(p)[:, None]
        q -= log_normalizer(q)[:, None]
        # A token that the reference rules out (-inf) adds nothing: 0 log 0 = 0.
        possible = np.isfinite(p)
        total += float((np.exp(p[possible]) * (p[possible] - q[possible])).sum())
    return max(0.0, total / len(expected))
