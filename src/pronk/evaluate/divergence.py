"""How far a model's predictions are from those of a reference, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.windows import (
    LogitsModel,
    check_logits,
    log_normalizer,
    rows_at_a_time,
    windows,
)

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

    Memory: the logits of one window of each model, and some 40 MB.

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
        p_logits = check_logits(reference.logits(part.ids), part)
        q_logits = check_logits(model.logits(part.ids), part)
        if p_logits.shape[1] != q_logits.shape[1]:
            raise RequestError(
                f"the reference has {p_logits.shape[1]} tokens in its vocabulary and the model "
                f"{q_logits.shape[1]}: only models of one vocabulary can be compared"
            )
        step = rows_at_a_time(p_logits.shape[1])
        for at in range(0, len(part.targets), step):
            p = p_logits[at : at + step].astype(np.float64)
            q = q_logits[at : at + step].astype(np.float64)
            same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            p -= log_normalizer(p)[:, None]
            q -= log_normalizer(q)[:, None]
            # A token that the reference rules out (-inf) adds nothing: 0 log 0 = 0.
            possible = np.isfinite(p)
            np.subtract(p, q, out=q, where=possible)
            q[~possible] = 0
            np.exp(p, out=p)
            p *= q
            kl += float(p.sum())
        del p_logits, q_logits
        count += len(part.targets)
        if progress is not None:
            progress(count, len(ids) - 1)
    # Rounding can leave a sum of equal distributions a hair below zero.
    return Divergence(max(0.0, kl / count), same / count, count)


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
