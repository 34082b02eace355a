"""Where the rows of a tensor come from: rows of stored ones, as they are or rearranged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Span, TensorInfo
from pronk.checkpoint.blocks import dequantize
from pronk.checkpoint.io import read_exact

__all__ = [
    "Joined",
    "MoreByOne",
    "Paired",
    "Part",
    "Rows",
    "Strip",
    "Tensor",
    "Transposed",
    "joined",
]

Bytes = NDArray[np.uint8]


class Rows(Protocol):
    """Rows of a tensor, read afresh whenever they are asked for."""

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows ``start:stop`` as uint8 [stop - start, bytes a row]."""

    def span(self) -> Span | None:
        """Where they lie one after the other in a file; None if they do not."""


Tensor = tuple[TensorInfo, Rows]


@dataclass(frozen=True, slots=True)
class Part:
    """`count` rows of another tensor, from the `first` on."""

    source: Rows
    first: int
    count: int
    width: int

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows of the part."""
        return self.source.rows(self.first + start, self.first + stop)

    def span(self) -> Span | None:
        """Where the part lies."""
        whole = self.source.span()
        if whole is None or whole.pairs:
            return None
        return replace(whole, offset=whole.offset + self.first * self.width)


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors of as many rows each, one after the other."""

    sources: tuple[Rows, ...]
    each: int

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows across the tensors."""
        parts = []
        for at in range(start // self.each, -(-stop // self.each)):
            first = at * self.each
            low, high = max(start - first, 0), min(stop - first, self.each)
            parts.append(self.sources[at].rows(low, high))
        return np.concatenate(parts) if parts else self.sources[0].rows(0, 0)

    def span(self) -> Span | None:
        """None, unless there is only one."""
        return self.sources[0].span() if len(self.sources) == 1 else None


@dataclass(frozen=True, slots=True)
class Paired:
    """Heads of `dim` rows whose rotary pairs lie side by side, told apart into halves.

    Of a vector, they are elements of `item` bytes.
    """

    source: Rows
    dim: int
    item: int = 0

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows in the order of halves."""
        dim = self.dim
        if self.item:
            row = self.source.rows(start, stop)
            pairs = row.reshape(len(row), -1, dim // 2, 2, self.item)
            return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(row.shape)
        first, last = start // dim, -(-stop // dim)
        rows = self.source.rows(first * dim, last * dim)
        halves = rows.reshape(last - first, dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
        return np.ascontiguousarray(halves[start - first * dim : stop - first * dim])

    def span(self) -> Span | None:
        """Where the pairs lie; None for a vector, whose elements change places."""
        whole = None if self.item else self.source.span()
        return None if whole is None or whole.pairs else replace(whole, pairs=self.dim)


@dataclass(frozen=True, slots=True)
class MoreByOne:
    """A vector of weights that count from one, as float32."""

    source: Rows
    dtype: str
    cols: int

    def rows(self, start: int, stop: int) -> Bytes:
        """One more than is stored."""
        values = dequantize(self.source.rows(start, stop), self.dtype, self.cols) + np.float32(1)
        return values.view(np.uint8)

    def span(self) -> Span | None:
        """None: the values have to be computed."""
        return None


@dataclass(slots=True)
class Strip:
    """The transposed rows that were made last; one for all tensors of a checkpoint."""

    of: object = None
    first: int = 0
    rows: Bytes | None = None


_STRIP = 1 << 22  # bytes of a strip


@dataclass(frozen=True, slots=True)
class Transposed:
    """Columns of stored matrices, as rows.

    Parameters
    ----------
    path : Path
    fd, offset : int
        The file, and the first byte of its matrices [height, width], one after the other.
    height, width, item : int
        The last is the bytes of an element.
    first, count : int
        The columns that are rows here, of each matrix.
    strip : Strip
        Columns lie apart in a file, so some are read together, and kept for the next rows.
    """

    path: Path
    fd: int
    offset: int
    height: int
    width: int
    item: int
    first: int
    count: int
    strip: Strip

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows of `height` elements."""
        out = np.empty((stop - start, self.height * self.item), np.uint8)
        at = start
        while at < stop:
            held = self._held(at)
            skip = at - self.strip.first
            n = min(len(held) - skip, stop - at)
            out[at - start : at - start + n] = held[skip : skip + n]
            at += n
        return out

    def _held(self, row: int) -> Bytes:
        """Transposed rows that hold this one, all of one matrix."""
        strip = self.strip
        kept = strip.rows if strip.of is self else None
        if kept is not None and strip.first <= row < strip.first + len(kept):
            return kept
        most = max(1, _STRIP // (self.height * self.item))
        matrix, column = divmod(row, self.count)
        low = column // most * most
        n = min(most, self.count - low)
        made = np.empty((n, self.height, self.item), np.uint8)
        for line in range(self.height):
            cell = (matrix * self.height + line) * self.width + self.first + low
            raw = read_exact(self.fd, self.offset + cell * self.item, n * self.item, self.path)
            made[:, line] = raw.reshape(n, self.item)
        strip.of, strip.first, strip.rows = self, row - column + low, made.reshape(n, -1)
        return strip.rows

    def span(self) -> Span | None:
        """None: rows lie apart."""
        return None


def joined(sources: Sequence[Rows], each: int) -> Rows:
    """Several tensors of `each` rows as one."""
    return sources[0] if len(sources) == 1 else Joined(tuple(sources), each)
