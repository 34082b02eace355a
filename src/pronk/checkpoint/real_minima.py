"""q4_1 blocks to and from ``compressed-tensors`` weights whose zero points are float32.

A q4_1 weight is ``code * scale + minimum``; a packed one ``(code - 8 - zero) * scale``. So the
zero point is ``-minimum / scale - 8``: real where GGUF's minimum is, which no rounding to whole
zero points would keep.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.packed import assemble, pack_blocks
from pronk.errors import CheckpointError

__all__ = ["join_minima", "split_minima"]

Bytes = NDArray[np.uint8]

# Packed bytes converted at a time.
_CHUNK = 1 << 17


def split_minima(blocks: Bytes, cols: int) -> dict[str, NDArray[Any]]:
    """Rows of q4_1 blocks, uint8 [rows, row bytes], as the tensors of a packed weight.

    ``weight_packed`` and ``weight_scale`` as `pack_blocks` gives them, and
    ``weight_zero_point`` float32 [rows, groups].
    """
    rows = len(blocks)
    data = blocks.reshape(-1, 20)
    heads = np.ascontiguousarray(data[:, :4]).view(np.float16)
    scale, minimum = heads[:, 0], heads[:, 1]
    # A group of one value has no scale: its minimum serves as one, at code zero.
    flat = scale == 0
    scale = np.where(flat, minimum, scale)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    zero = -(minimum.astype(np.float32) / divisor) - np.float32(8)
    # `pack_blocks` takes symmetric blocks: the same codes, without the minimum.
    plain = np.empty((len(data), 18), dtype=np.uint8)
    plain[:, :2] = np.ascontiguousarray(scale)[:, None].view(np.uint8)
    plain[:, 2:] = np.where(flat[:, None], np.uint8(0), data[:, 4:])
    parts = pack_blocks(plain.reshape(rows, -1), cols)
    return {**parts, "weight_zero_point": zero.reshape(rows, -1)}


def join_minima(words: Bytes, scale: NDArray[np.float32], zero: NDArray[np.float32]) -> Bytes:
    """The inverse of `split_minima`: uint8 [rows, row bytes].

    Parameters
    ----------
    words : uint8 [rows, cols / 2]
        The bytes of ``weight_packed``.
    scale, zero : float32 [rows, groups]
        Groups of a multiple of 32 columns.

    Raises
    ------
    CheckpointError
        If a scale or a minimum is outside the range of float16.
    """
    rows, groups = len(words), words.shape[1] // 16
    out = np.empty((rows, groups, 20), dtype=np.uint8)
    # A few rows at a time: this runs while a model loads, where every temporary counts.
    step = max(1, _CHUNK // words.shape[1])
    for at in range(0, rows, step):
        some = slice(at, at + step)
        _join(words[some], scale[some], zero[some], out[some])
    return out.reshape(rows, -1)


def _join(words: Bytes, scale: NDArray[np.float32], zero: NDArray[np.float32], out: Bytes) -> None:
    plain = assemble(words, scale, None, "q4_0").reshape(*out.shape[:2], 18)
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = (-(zero + np.float32(8)) * scale).astype(np.float16)
    if not np.isfinite(minimum).all():
        raise CheckpointError("a packed weight has a minimum outside the range of float16")
    spread = np.repeat(minimum, out.shape[1] // zero.shape[1], axis=1)
    out[:, :, :2] = plain[:, :, :2]
    out[:, :, 2:4] = spread.view(np.uint8).reshape(*out.shape[:2], 2)
    out[:, :, 4:] = plain[:, :, 2:]
