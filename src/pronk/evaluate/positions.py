"""Perplexity against position: what a model makes of a text the further it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.windows import log_normalizer, rows_at_a_time

__all__ = ["Bucket", "PartsModel", "by_position", "default_bucket", "runs_of", "scored"]


class PartsModel(Protocol):
    """A model that gives the logits of a long text in parts."""

    def logit_parts(
        self, ids: Sequence[int], first: int = 0, endings: Iterable[Sequence[int]] | None = None, /
    ) -> Iterator[NDArray[Any]]:
        """Rows of the positions from `first` on; see `pronk.model.Model.logit_parts`."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The tokens at positions `start` to `stop` (exclusive) of every run, scored.

    Attributes
    ----------
    start, stop : int
        Tokens before the first one scored here, and before the first one that is not any more.
    nll : float
        Mean negative log-likelihood, in nats a token.
    tokens : int
        Tokens scored.
    """

    start: int
    stop: int
    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def to_dict(self) -> dict[str, float | int]:
        """Plain data under stable names."""
        return {
            "start": self.start,
            "stop": self.stop,
            "perplexity": self.perplexity,
            "nll": self.nll,
            "tokens": self.tokens,
        }


def default_bucket(context: int) -> int:
    """Positions of one bucket: 512 or 256 where the context is long, else an eighth of it."""
    return 512 if context >= 8192 else min(256, max(1, -(-context // 8)))


def runs_of(ids: Sequence[int], context: int, bos: int | None = None) -> list[list[int]]:
    """A text cut into runs of at most `context` tokens, each read from its own start.

    Where the text starts with `bos`, every run does. A last run of one token is left out.
    """
    lead = [bos] if bos is not None and ids and ids[0] == bos else []
    runs = [list(ids[:context])]
    size = context - len(lead)
    for start in range(context, len(ids), size):
        runs.append([*lead, *ids[start : start + size]])
    return [run for run in runs if len(run) > 1]


def scored(
    parts: Iterator[NDArray[Any]], targets: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.int64]]]:
    """Logits in parts, matched with the tokens that they predict.

    Parameters
    ----------
    parts : iterator of ndarray [tokens, vocabulary]
    targets : sequence of int
        The token that each row predicts; rows behind the last one are left out.

    Yields
    ------
    at : int
        Place of the first of these rows.
    logits : ndarray, float64 [rows, vocabulary]
        A few rows at a time; may be written to.
    targets : ndarray, int64 [rows]

    Raises
    ------
    CheckpointError
        If a target is outside the vocabulary, or there are fewer rows than targets.
    """
    at = 0
    for part in parts:
        rows = min(len(part), len(targets) - at)
        wanted = np.asarray(targets[at : at + rows], np.int64)
        if rows and (wanted.max() >= part.shape[1] or wanted.min() < 0):
            raise CheckpointError(
                f"the text has token {wanted.max()}, and the model's vocabulary ends at "
                f"{part.shape[1] - 1}: its tokenizer is another model's"
            )
        step = rows_at_a_time(part.shape[1])
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield at + start, part[start:stop].astype(np.float64), wanted[start:stop]
        at += rows
    if at < len(targets):
        raise CheckpointError(f"the model gave logits of {at} tokens, and {len(targets)} are due")


def by_position(
    model: PartsModel,
    ids: Sequence[int],
    context: int,
    bucket: int | None = None,
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Bucket]:
    """Perplexity of a text by how much of it was read before, up to a whole context.

    The text is cut into runs of `context` tokens (`runs_of`), so every position is scored on a
    different piece of text in each; compare models on the same text only.

    Parameters
    ----------
    model : PartsModel
    ids : sequence of int
        The text as the model's tokenizer encodes it.
    context : int
        Tokens of one run; at least 2.
    bucket : int, optional
        Positions that are scored together; `default_bucket` unless given.
    bos : int, optional
        The tokenizer's beginning-of-sequence id.
    progress : callable, optional
        Called with the tokens read and the tokens to read.

    Raises
    ------
    RequestError
        If a size is out of range, or the text too short.
    """
    bucket = default_bucket(context) if bucket is None else bucket
    if context < 2:
        raise RequestError(f"the context must be at least 2 tokens, not {context}")
    if not 1 <= bucket <= context:
        raise RequestError(f"a bucket must be of 1 to {context} positions, not {bucket}")
    if len(ids) < 2:
        raise RequestError(f"the text is too short: {len(ids)} token(s), and 2 are needed")
    runs = runs_of(ids, context, bos)
    sums = np.zeros(-(-context // bucket))
    counts = np.zeros(len(sums), np.int64)
    before, total = 0, sum(map(len, runs))
    for run in runs:
        for at, x, targets in scored(model.logit_parts(run), run[1:]):
            loss = log_normalizer(x) - x[np.arange(len(x)), targets]
            places = np.arange(at + 1, at + 1 + len(x)) // bucket
            np.add.at(sums, places, loss)
            np.add.at(counts, places, 1)
            if progress is not None:
                progress(before + at + len(x), total)
        before += len(run)
    return [
        Bucket(i * bucket, min((i + 1) * bucket, context), float(sums[i] / n), n)
        for i, n in enumerate(counts.tolist())
        if n
    ]
