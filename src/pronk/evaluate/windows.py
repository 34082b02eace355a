"""The protocol every text figure shares: which tokens are scored, and after what context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError, RequestError

__all__ = ["LogitsModel", "Window", "log_normalizer", "rows_at_a_time", "windows"]

# Float64 bytes of the logits in flight: little enough to stay in a core's cache.
_CHUNK_BYTES = 2 << 20


class LogitsModel(Protocol):
    """A model as evaluation sees it."""

    def logits(self, ids: Sequence[int], /) -> NDArray[Any]:
        """Float32 [tokens, vocabulary]: row i is the prediction after ``ids[: i + 1]``."""


@dataclass(frozen=True, slots=True)
class Window:
    """One run of the model.

    Attributes
    ----------
    ids : list of int
        What the model is given.
    targets : list of int
        The tokens scored: those that follow ``ids[first], ids[first + 1], ...``.
    first : int
        The row of the logits that predicts ``targets[0]``.
    """

    ids: list[int]
    targets: list[int]
    first: int


def windows(
    ids: Sequence[int], window: int, stride: int | None = None, bos: int | None = None
) -> Iterator[Window]:
    """Cut a text into overlapping windows so that every token but the first is scored once.

    A window starts `stride` tokens after the one before and scores what that one did not
    reach, so a token is scored after at least ``window - stride`` tokens where the text has
    them. Where the text starts with `bos`, later windows start with it too, as anything the
    model is asked does; it takes one of their `window` places and is never scored.

    Parameters
    ----------
    ids : sequence of int
        The text as the tokenizer encodes it, with its special tokens.
    window : int
        Tokens given to the model at a time; at least 3.
    stride : int, optional
        Range [1, window - 2]; half the window unless given.
    bos : int, optional
        The tokenizer's beginning-of-sequence id.

    Raises
    ------
    RequestError
        If the text has fewer than two tokens, or a size is out of range.
    """
    if window < 3:
        raise RequestError(f"the window must be at least 3 tokens, not {window}")
    if stride is None:
        stride = max(1, window // 2)
    if not 1 <= stride <= window - 2:
        raise RequestError(f"the stride must be in [1, {window - 2}] tokens, not {stride}")
    if len(ids) < 2:
        raise RequestError(f"the text is too short: {len(ids)} token(s), and 2 are needed")
    prefix = [bos] if bos is not None and ids[0] == bos else []
    start, scored = 0, 1
    while scored < len(ids):
        lead = prefix if start else []
        stop = min(len(ids), start + window - len(lead))
        first = scored - 1 - start + len(lead)
        # A later window gives a place to `bos`, so with a short stride it may reach no further.
        if stop > scored:
            yield Window([*lead, *ids[start:stop]], list(ids[scored:stop]), first)
            scored = stop
        start += stride


def rows_at_a_time(vocabulary: int) -> int:
    """Rows of logits to turn into float64 at once."""
    return max(1, _CHUNK_BYTES // (8 * max(1, vocabulary)))


def log_normalizer(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the sum of exponentials of each row.

    Raises
    ------
    CheckpointError
        If a row holds a NaN or an infinity.
    """
    top = x.max(axis=1)
    if not np.isfinite(top).all():
        raise CheckpointError("the model gives logits that are not finite: its weights are damaged")
    shifted = x - top[:, None]
    np.exp(shifted, out=shifted)
    result: NDArray[np.float64] = top + np.log(shifted.sum(axis=1))
    return result
