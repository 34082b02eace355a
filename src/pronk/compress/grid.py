"""The values that a group of weights may take: scales, minima, and their search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.blocks import quantize
from pronk.checkpoint.fp8 import pack_fp8, unpack_e4m3
from pronk.checkpoint.storage import Storage
from pronk.compress.kquants import k_blocks, round_scales
from pronk.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grid", "code_range", "fit_grid", "from_blocks", "refit", "round_floats", "to_blocks"]

_SHRINK = {
    8: (0.9, 1.0, 6),
    6: (0.85, 1.05, 9),
    4: (0.55, 1.1, 23),
    3: (0.45, 1.1, 27),
    2: (0.3, 1.1, 33),
}
"""Factors of a group's scale that are tried, by bits: from, to, how many."""
_AT_ONCE = 1 << 21  # elements searched at a time


def code_range(storage: Storage) -> tuple[int, int]:
    """The least and the largest code; those of minima lie in the middle of a nibble."""
    half = 1 << (storage.bits - 1)
    if storage.minimum:
        return 8 - half, 7 + half
    return (-127, 127) if storage.bits == 8 else (-half, half - 1)


@dataclass(frozen=True, slots=True)
class Grid:
    """``code * scale + low`` of every group.

    Parameters
    ----------
    storage : Storage
    scale : float32 [rows, groups]
        As float16 holds it; it may be negative.
    low : float32 [rows, groups] or None
        Where the storage has minima.
    upper, lowest : float32 [rows, cols / 256] or None
        Of K-quants, what scales and minima are multiples of.
    """

    storage: Storage
    scale: Tensor
    low: Tensor | None = None
    upper: Tensor | None = None
    lowest: Tensor | None = None

    def rows(self, some: slice) -> Grid:
        """The grid of some rows."""
        parts = (self.low, self.upper, self.lowest)
        cut = (None if part is None else part[some] for part in parts)
        return Grid(self.storage, self.scale[some], *cut)

    def wide(self, cols: int) -> tuple[Tensor, Tensor | None]:
        """Scale and low of every column, [rows, cols]."""
        size = cols // self.scale.shape[1]
        low = None if self.low is None else self.low.repeat_interleave(size, 1)
        return self.scale.repeat_interleave(size, 1), low

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes, whole numbers in float32 [rows, cols]."""
        scale, low = self.wide(weight.shape[1])
        return nearest(weight, scale, low, self.storage)

    def values(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for, float32 [rows, cols]."""
        scale, low = self.wide(codes.shape[1])
        return codes * scale if low is None else codes * scale + low


def nearest(weight: Tensor, scale: Tensor, low: Tensor | None, storage: Storage) -> Tensor:
    """Codes of weights, given scales that broadcast to them; 0 where the scale is."""
    import torch

    x = weight if low is None else weight - low
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return (x * inverse).round_().clamp_(*code_range(storage))


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def fit_grid(
    weight: Tensor, storage: Storage, importance: Tensor | None = None, search: bool = True
) -> Grid:
    """Scales (and minima) for a weight.

    Without a search, as GGUF's q8_0, q4_0 and q4_1: the largest of a group is kept. With one,
    those of least squared error, weighted by importance, among shrunk ranges, each then
    fitted to its codes by least squares.

    Parameters
    ----------
    weight : float32 [rows, cols]
    storage : Storage
        Of whole numbers.
    importance : float32 [cols] or [rows, cols], optional
        Weights of squared errors, such as mean squares of what a column is multiplied with.
    search : bool
    """
    import torch

    rows, cols = weight.shape
    groups = storage.groups(cols)
    step = max(1, _AT_ONCE // cols)
    scales, lows = [], []
    for at in range(0, rows, step):
        w = weight[at : at + step].unflatten(1, (groups, -1))
        v = torch.ones(1, 1, 1)
        if importance is not None:
            part = importance if importance.ndim == 1 else importance[at : at + step]
            v = part.reshape(-1, groups, w.shape[2])
        fitted = (_with_minimum if storage.minimum else _symmetric)(w, v, storage, search)
        scales.append(fitted[0])
        lows.append(fitted[1])
    scale = torch.cat(scales)
    low = torch.cat(lows) if storage.minimum else None
    if not torch.isfinite(scale).all() or (low is not None and not torch.isfinite(low).all()):
        raise CheckpointError("a weight holds values too large for float16 scales")
    if storage.kind != "k":
        return Grid(storage, scale, low)
    scale, upper = round_scales(scale, storage.bits)
    if low is None:
        return Grid(storage, scale, upper=upper)
    low, lowest = round_scales(-low.clamp_max(0), storage.bits)
    return Grid(storage, scale, -low, upper, lowest)


def _symmetric(w: Tensor, v: Tensor, storage: Storage, search: bool) -> tuple[Tensor, Tensor]:
    import torch

    least, largest = code_range(storage)
    at = w.abs().argmax(2, keepdim=True)
    top = w.gather(2, at)
    base = top.abs() / largest if storage.bits == 8 else top / least
    best = _half(base)
    if not search:
        return best[..., 0], best[..., 0]
    error = _loss(w, v, best, None, storage)
    low, high, count = _SHRINK[storage.bits]
    for sign in (1.0,) if storage.bits == 8 else (1.0, least / largest):
        for factor in torch.linspace(low, high, count).tolist():
            tried = _half(base * (sign * factor))
            q = nearest(w, tried, None, storage)
            top, bottom = (v * w * q).sum(2, keepdim=True), (v * q * q).sum(2, keepdim=True)
            tried = _half(torch.where(bottom > 0, top / bottom, tried))
            loss = _loss(w, v, tried, None, storage)
            better = loss < error
            error, best = torch.where(better, loss, error), torch.where(better, tried, best)
    return best[..., 0], best[..., 0]


def _with_minimum(w: Tensor, v: Tensor, storage: Storage, search: bool) -> tuple[Tensor, Tensor]:
    import torch

    least, largest = code_range(storage)
    bottom, top = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
    if storage.kind == "k":
        bottom = bottom.clamp_max(0)  # its minima are none above zero
    best = _half((top - bottom) / (largest - least))
    best_low = _half(bottom - best * least)
    if not search:
        return best[..., 0], best_low[..., 0]
    error = _loss(w, v, best, best_low, storage)
    total = (v + torch.zeros_like(w)).sum(2, keepdim=True)
    mean = (v * w).sum(2, keepdim=True) / total
    low, high, count = _SHRINK[storage.bits]
    for factor in torch.linspace(low, high, count).tolist():
        middle = (top + bottom) / 2
        scale = (top - bottom) * (factor / (largest - least))
        q = nearest(w, scale, middle - scale * ((largest + least) / 2), storage)
        center = (v * q).sum(2, keepdim=True) / total
        spread = (v * (q - center) ** 2).sum(2, keepdim=True)
        slope = (v * (q - center) * (w - mean)).sum(2, keepdim=True)
        scale = _half(torch.where(spread > 0, slope / spread, scale))
        offset = _half(mean - scale * center)
        if storage.kind == "k":
            offset = offset.clamp_max(0)
        loss = _loss(w, v, scale, offset, storage)
        better = loss < error
        error = torch.where(better, loss, error)
        best, best_low = torch.where(better, scale, best), torch.where(better, offset, best_low)
    return best[..., 0], best_low[..., 0]


def _loss(w: Tensor, v: Tensor, scale: Tensor, low: Tensor | None, storage: Storage) -> Tensor:
    out = nearest(w, scale, low, storage) * scale
    if low is not None:
        out = out + low
    return (v * (out - w) ** 2).sum(2, keepdim=True)


def refit(grid: Grid, scale: Tensor, low: Tensor | None = None) -> Grid:
    """The grid with other scales, and minima where given, as float16 holds them."""
    return replace(grid, scale=_half(scale), low=grid.low if low is None else _half(low))


def to_blocks(codes: Tensor, grid: Grid) -> NDArray[np.uint8]:
    """Rows of the storage's blocks of 32, uint8 [rows, row bytes]."""
    if grid.upper is not None:
        lowest = grid.upper if grid.lowest is None else grid.lowest
        return k_blocks(codes, grid.storage.bits, grid.scale, grid.upper, grid.low, lowest)
    rows, cols = codes.shape
    parts = [np.repeat(grid.scale.half().numpy(), cols // 32 // grid.scale.shape[1], axis=1)]
    if grid.low is not None:
        parts.append(np.repeat(grid.low.half().numpy(), cols // 32 // grid.low.shape[1], axis=1))
    heads = np.stack(parts, axis=2).view(np.uint8)
    q = codes.numpy().reshape(rows, cols // 32, 32)
    if grid.storage.bits == 8:
        body = q.astype(np.int8).view(np.uint8)
    else:
        nibbles = (q if grid.storage.minimum else q + 8).astype(np.uint8)
        body = nibbles[:, :, :16] | (nibbles[:, :, 16:] << np.uint8(4))
    return np.concatenate([heads, body], axis=2).reshape(rows, -1)


def from_blocks(blocks: NDArray[np.uint8], storage: Storage, cols: int) -> tuple[Tensor, Grid]:
    """Codes, int8 [rows, cols], and grid of such rows of blocks; not those of K-quants."""
    import torch

    rows, groups = len(blocks), storage.groups(cols)
    count = 2 if storage.minimum else 1
    parts = blocks.reshape(rows, cols // 32, -1)
    heads = np.ascontiguousarray(parts[:, :: cols // 32 // groups, : 2 * count])
    scale, *low = torch.from_numpy(heads.view(np.float16).astype(np.float32)).unbind(2)
    body = parts[:, :, 2 * count :]
    if storage.bits == 8:
        codes = body.view(np.int8)
    else:
        codes = np.concatenate([body & np.uint8(15), body >> np.uint8(4)], axis=2).view(np.int8)
        codes -= 0 if storage.minimum else 8
    grid = Grid(storage, scale.contiguous(), low[0].contiguous() if low else None)
    return torch.from_numpy(codes.reshape(rows, cols)), grid


def round_floats(weight: NDArray[np.float32], storage: Storage) -> NDArray[np.uint8]:
    """Rows of floats as `storage`, which is of no whole numbers, in its blocks."""
    if storage.kind == "fp8":
        parts = pack_fp8(weight)
        weight = unpack_e4m3(parts["weight"], parts["weight_scale"])
    return quantize(weight, storage.blocks)
