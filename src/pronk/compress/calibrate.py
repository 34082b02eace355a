"""Windows of calibration text, and what matrices meet in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.errors import RequestError
from pronk.evaluate.corpus import encode, load_corpus

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WINDOW", "Calibration", "Inputs", "read_calibration"]

WINDOW = 512  # tokens
_SPREAD = 8  # windows drawn come from a text of at most so many times as many


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of a text.

    Parameters
    ----------
    name : str
        Of the text.
    windows : int64 [windows, tokens]
    """

    name: str
    windows: NDArray[np.int64]

    @property
    def digest(self) -> str:
        """A hash of the ids."""
        return hashlib.sha256(self.windows.tobytes()).hexdigest()


def read_calibration(
    ckpt: Checkpoint, path: str | os.PathLike[str] | None, samples: int, seed: int
) -> Calibration:
    """Draw windows from a text, each a sequence of its own behind the model's first token.

    Parameters
    ----------
    ckpt : Checkpoint
        Whose tokenizer reads it.
    path : path or None
        UTF-8 text; Python's own documentation without one.
    samples : int
        Most windows.
    seed : int
        Of the draw.

    Raises
    ------
    RequestError
        If the text is missing, empty, not UTF-8 or shorter than one window.
    """
    corpus = load_corpus(path)
    tokenizer = ckpt.load_tokenizer()
    window = min(WINDOW, ckpt.spec.context_length)
    bos = tokenizer.bos_id
    width = window - (bos is not None)
    ids = encode(corpus, tokenizer, samples * width * _SPREAD)
    if bos is not None and ids[0] == bos:
        ids = ids[1:]
    count = len(ids) // width
    if not count:
        raise RequestError(
            f"the text {corpus.name} is shorter than one window of calibration: {len(ids)} "
            f"tokens of the {width} it takes"
        )
    windows = np.array(ids[: count * width], dtype=np.int64).reshape(count, width)
    chosen = np.random.default_rng(seed).permutation(count)[:samples]
    windows = windows[np.sort(chosen)]
    if bos is not None:
        windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=bos)
    return Calibration(corpus.name, windows)


class Inputs:
    """What a matrix is multiplied with, added up over tokens.

    Attributes
    ----------
    hessian : float32 [cols, cols]
        Mean of ``x x^T``.
    mean, largest : float32 [cols]
        Mean and greatest absolute value by column.
    """

    def __init__(self, cols: int) -> None:
        import torch

        self._sum = torch.zeros(cols, cols)
        self._mean = torch.zeros(cols)
        self.largest = torch.zeros(cols)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Count tokens, float32 [tokens, cols]."""
        import torch

        self._sum.addmm_(x.T, x)
        size = x.abs()
        self._mean += size.sum(0)
        self.largest = torch.maximum(self.largest, size.amax(0))
        self._tokens += len(x)

    @property
    def hessian(self) -> Tensor:
        return self._sum / self._tokens

    @property
    def mean(self) -> Tensor:
        return self._mean / self._tokens

    def divide(self, scale: Tensor) -> None:
        """Make it what the matrix meets once columns are divided by `scale`."""
        self._sum /= scale[:, None] * scale
        self._mean /= scale
        self.largest = self.largest / scale


def batches(x: Tensor, tokens: int = 4096) -> Iterator[tuple[slice, Tensor]]:
    """Windows a few at a time, about so many tokens of them."""
    step = max(1, tokens // x.shape[1])
    for at in range(0, len(x), step):
        yield slice(at, at + step), x[at : at + step]
