"""``compressed-tensors`` float-quantized weights: e4m3 elements with a scale a row.

Pronk writes scales that are powers of two, so that an element times its scale is a bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "pack_fp8", "row_scales", "to_e4m3", "unpack_e4m3"]

Floats = NDArray[np.float32]

LARGEST = np.float32(448)
"""The largest e4m3 (OCP 8-bit floating point, revision 1.0; no infinity)."""


def _table() -> Floats:
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7) / 8
    normal = (1 + fraction) * 2.0 ** (exponent - 7)
    value = np.where(exponent > 0, normal, fraction * 2.0**-6)
    value[(code & 127) == 127] = np.nan
    return np.where(code & 128, -value, value).astype(np.float32)


_VALUES = _table()
_POSITIVE = _VALUES[:127]
_MIDDLES = (_POSITIVE[1:] + _POSITIVE[:-1]) / 2


def row_scales(values: Floats) -> Floats:
    """The least power of two for each row that keeps it within e4m3, float32 [rows, 1]."""
    top = np.abs(values).max(axis=1, keepdims=True) / LARGEST
    fraction, exponent = np.frexp(top)
    exponent = exponent - (fraction == 0.5)  # a power of two is its own
    return np.ldexp(np.float32(1), np.where(top > 0, exponent, 0)).astype(np.float32)


def to_e4m3(values: Floats) -> NDArray[np.uint8]:
    """The nearest e4m3 codes, ties to the even one; what is larger becomes the largest."""
    size = np.abs(values)
    code = np.searchsorted(_MIDDLES, size, side="left")
    at = np.minimum(code, len(_MIDDLES) - 1)
    code += (size == _MIDDLES[at]) & (code % 2 == 1)
    return (code | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def unpack_e4m3(codes: NDArray[np.uint8], scale: Floats) -> Floats:
    """Float32 [rows, cols] of e4m3 codes and scales [rows, 1]."""
    out: Floats = _VALUES[codes] * scale
    return out


def pack_fp8(values: Floats) -> dict[str, NDArray[Any]]:
    """Rows of float32 as ``weight`` (e4m3 codes) and ``weight_scale`` (float32 [rows, 1])."""
    scale = row_scales(values)
    return {"weight": to_e4m3(values / scale), "weight_scale": scale}
