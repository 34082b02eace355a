"""GGUF's K-quants: groups whose scales are whole multiples of one of 256 weights.

The layouts are ggml's ``block_q4_K`` and ``block_q6_K``. The scales of groups are searched as
those of other formats are, with importance, and then rounded; codes are rounded to what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SUPER", "k_blocks", "round_scales"]

SUPER = 256
"""Weights that share the upper level of scales."""

_LEVELS = {4: (0, 63), 6: (-128, 127)}  # of the lower level, by bits


def round_scales(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales of groups as multiples of one of each 256, and that one; as float16 holds it.

    Parameters
    ----------
    scale : float32 [rows, groups]
        Not negative where the multiples are not.
    bits : {4, 6}

    Returns
    -------
    rounded : float32 [rows, groups]
    upper : float32 [rows, cols / 256]
    """
    import torch

    least, most = _LEVELS[bits]
    parts = scale.unflatten(1, (-1, SUPER // (32 if bits == 4 else 16)))
    top = parts.gather(2, parts.abs().argmax(2, keepdim=True))
    upper = (top / (most if least == 0 else least)).half().float()
    inverse = torch.where(upper == 0, torch.zeros_like(upper), 1 / upper)
    steps = (parts * inverse).round().clamp(least, most)
    return (steps * upper).flatten(1), upper[..., 0]


def k_blocks(
    codes: Tensor, bits: int, scale: Tensor, upper: Tensor, low: Tensor | None, lowest: Tensor
) -> NDArray[np.uint8]:
    """Rows of blocks, uint8 [rows, row bytes].

    Parameters
    ----------
    codes : float32 [rows, cols]
    bits : {4, 6}
    scale, low : float32 [rows, groups]
        As `round_scales` gives them; of 6 bits there is no low.
    upper, lowest : float32 [rows, cols / 256]
        Their upper levels; the lowest is that of minus `low`.
    """
    rows, cols = codes.shape
    count = cols // SUPER
    q = codes.numpy().reshape(rows, count, SUPER)
    d = _halves(upper)
    steps = _steps(scale, upper, count)
    if bits == 4 and low is not None:
        body = _nibbles(q.astype(np.uint8))
        parts = [d, _halves(lowest), _sixes(steps, _steps(-low, lowest, count)), body]
    else:
        parts = [*_sextets((q + 32).astype(np.uint8)), steps.astype(np.int8).view(np.uint8), d]
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def _halves(upper: Tensor) -> NDArray[np.uint8]:
    return upper.half().numpy()[:, :, None].view(np.uint8)


def _steps(scale: Tensor, upper: Tensor, count: int) -> NDArray[np.float32]:
    parts = scale.numpy().reshape(len(scale), count, -1)
    d = upper.numpy()[:, :, None]
    out: NDArray[np.float32] = np.rint(np.divide(parts, d, out=np.zeros_like(parts), where=d != 0))
    return out


def _nibbles(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """64 codes fill 32 bytes: the first 32 their low halves."""
    pairs = q.reshape(*q.shape[:2], 4, 2, 32)
    packed: NDArray[np.uint8] = pairs[:, :, :, 0] | (pairs[:, :, :, 1] << np.uint8(4))
    return packed.reshape(*q.shape[:2], 128)


def _sixes(scales: NDArray[np.float32], lows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    s, m = scales.astype(np.uint8), lows.astype(np.uint8)
    first = s[..., :4] | ((s[..., 4:] >> 4) << np.uint8(6))
    second = m[..., :4] | ((m[..., 4:] >> 4) << np.uint8(6))
    third = (s[..., 4:] & np.uint8(15)) | ((m[..., 4:] & np.uint8(15)) << np.uint8(4))
    return np.concatenate([first, second, third], axis=-1)


def _sextets(q: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The low four bits of 256 codes, and the high two."""
    parts = q.reshape(*q.shape[:2], 2, 4, 32)
    low, high = parts & np.uint8(15), parts >> np.uint8(4)
    nibbles = np.stack([low[..., 0, :] | (low[..., 2, :] << np.uint8(4)),
                        low[..., 1, :] | (low[..., 3, :] << np.uint8(4))], axis=3)  # fmt: skip
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    pairs = np.bitwise_or.reduce(high << shifts, axis=3)
    return [nibbles.reshape(*q.shape[:2], 128), pairs.reshape(*q.shape[:2], 64)]
