"""Rows of weights between their stored layout (GGUF's) and float32, in NumPy alone."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError

__all__ = ["BLOCK_SIZES", "dequantize", "quantize"]

# Elements and bytes of a block, by lower-case ggml type name.
BLOCK_SIZES = MappingProxyType(
    {
        "f32": (1, 4),
        "f16": (1, 2),
        "bf16": (1, 2),
        "q8_0": (32, 34),
        "q4_0": (32, 18),
        "q4_1": (32, 20),
        "q5_0": (32, 22),
        "q5_1": (32, 24),
        "q2_k": (256, 84),
        "q3_k": (256, 110),
        "q4_k": (256, 144),
        "q5_k": (256, 176),
        "q6_k": (256, 210),
        "iq1_s": (256, 50),
        "iq1_m": (256, 56),
        "iq2_xxs": (256, 66),
        "iq2_xs": (256, 74),
        "iq2_s": (256, 82),
        "iq3_xxs": (256, 98),
        "iq3_s": (256, 110),
        "iq4_nl": (32, 18),
        "iq4_xs": (256, 136),
        "tq1_0": (256, 54),
        "tq2_0": (256, 66),
        "mxfp4": (32, 17),
    }
)

# Elements converted at a time: keeps the temporaries of a large tensor in the cache.
_CHUNK = 1 << 18

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def dequantize(blocks: Bytes, dtype: str, cols: int) -> Floats:
    """Stored rows uint8 [rows, row_bytes] of `dtype` to float32 [rows, cols].

    Types outside the native ones go through the ``gguf`` package, imported then.
    """
    rows = blocks.shape[0]
    block, nbytes = _size(dtype, cols)
    if blocks.ndim != 2 or blocks.dtype != np.uint8 or blocks.shape[1] != cols // block * nbytes:
        raise ValueError(f"{dtype} rows of {cols} need uint8 [rows, {cols // block * nbytes}]")
    convert = _DEQUANTIZE.get(dtype) or _foreign(dtype)
    out = np.empty((rows, cols), dtype=np.float32)
    step = max(1, _CHUNK // max(cols, 1))
    for at in range(0, rows, step):
        part = np.ascontiguousarray(blocks[at : at + step])
        out[at : at + step] = convert(part.reshape(-1, nbytes)).reshape(-1, cols)
    return out


def quantize(x: Floats, dtype: str) -> Bytes:
    """Float32 [rows, cols] to stored rows uint8 [rows, row_bytes], bit for bit as ggml does.

    `dtype` is one of the native types. q8_0 takes ``d = amax / 127``, q4_0 the signed
    maximum over -8, q4_1 the minimum and the span over 15.
    """
    if x.ndim != 2:
        raise ValueError("quantize takes a matrix")
    rows, cols = x.shape
    block, nbytes = _size(dtype, cols)
    convert = _QUANTIZE.get(dtype)
    if convert is None:
        raise CheckpointError(f"Pronk does not write tensors of type {dtype!r}")
    out = np.empty((rows, cols // block * nbytes), dtype=np.uint8)
    step = max(1, _CHUNK // max(cols, 1))
    for at in range(0, rows, step):
        part = np.ascontiguousarray(x[at : at + step], dtype=np.float32)
        out[at : at + step] = convert(part.reshape(-1, block)).reshape(len(part), -1)
    return out


def _size(dtype: str, cols: int) -> tuple[int, int]:
    size = BLOCK_SIZES.get(dtype)
    if size is None:
        raise CheckpointError(f"tensor type {dtype!r} is not one that Pronk can read")
    if cols % size[0]:
        raise CheckpointError(
            f"a row of {cols} elements is no multiple of the {dtype} block {size[0]}"
        )
    return size


def _foreign(dtype: str) -> Callable[[Bytes], Floats]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as convert

    kind = GGMLQuantizationType[dtype.upper()]

    def run(blocks: Bytes) -> Floats:
        return np.asarray(convert(blocks, kind), dtype=np.float32)

    return run


def _half(column: Bytes) -> Floats:
    return np.ascontiguousarray(column).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    out = np.empty((len(packed), 32), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=out[:, :16])
    np.right_shift(packed, 4, out=out[:, 16:])
    return out


def _from_f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _from_f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _from_bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _from_q8_0(blocks: Bytes) -> Floats:
    out = blocks[:, 2:].view(np.int8).astype(np.float32)
    return _scaled(out, blocks)


def _from_q4_0(blocks: Bytes) -> Floats:
    out = _nibbles(blocks[:, 2:]).astype(np.float32)
    out -= 8
    return _scaled(out, blocks)


def _scaled(out: Floats, blocks: Bytes) -> Floats:
    with np.errstate(invalid="ignore"):  # an infinite scale: whoever reads the values checks them
        out *= _half(blocks[:, :2])
    return out


def _from_q4_1(blocks: Bytes) -> Floats:
    out = _nibbles(blocks[:, 4:]).astype(np.float32)
    out *= _half(blocks[:, :2])
    out += _half(blocks[:, 2:4])
    return out


def _to_f32(x: Floats) -> Bytes:
    return x.view(np.uint8)


def _to_f16(x: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint8)


def _to_bf16(x: Floats) -> Bytes:
    bits = x.view(np.uint32)
    # Rounding up could turn a NaN into an infinity: keep it a NaN, quiet.
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
    rounded[nan] = (bits[nan] & 0xFFFF0000) | (64 << 16)
    return (rounded >> 16).astype(np.uint16).view(np.uint8)


def _inverse(d: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _pack(d: Floats, *rest: NDArray[np.generic]) -> Bytes:
    with np.errstate(over="ignore"):
        parts = [d.astype(np.float16).view(np.uint8)]
    return np.concatenate([*parts, *(part.view(np.uint8) for part in rest)], axis=1)


def _to_q8_0(x: Floats) -> Bytes:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    q = x * _inverse(d)
    # Half away from zero, as C's roundf: np.round would go to even.
    whole = np.floor(np.abs(q))
    whole += np.floor(2 * (np.abs(q) - whole))
    return _pack(d, np.copysign(whole, q).astype(np.int8))


def _to_q4_0(x: Floats) -> Bytes:
    at = np.abs(x).argmax(axis=1, keepdims=True)
    d = np.take_along_axis(x, at, axis=1) / np.float32(-8)
    q = np.trunc(x * _inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return _pack(d, q[:, :16] | (q[:, 16:] << np.uint8(4)))


def _to_q4_1(x: Floats) -> Bytes:
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
    q = np.trunc((x - low) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    with np.errstate(over="ignore"):
        m = low.astype(np.float16)
    return _pack(d, m, q[:, :16] | (q[:, 16:] << np.uint8(4)))


_DEQUANTIZE: dict[str, Callable[[Bytes], Floats]] = {
    "f32": _from_f32,
    "f16": _from_f16,
    "bf16": _from_bf16,
    "q8_0": _from_q8_0,
    "q4_0": _from_q4_0,
    "q4_1": _from_q4_1,
}
_QUANTIZE: dict[str, Callable[[Floats], Bytes]] = {
    "f32": _to_f32,
    "f16": _to_f16,
    "bf16": _to_bf16,
    "q8_0": _to_q8_0,
    "q4_0": _to_q4_0,
    "q4_1": _to_q4_1,
}
