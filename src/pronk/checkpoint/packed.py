"""``compressed-tensors`` packed weights to and from GGUF's blocks.

A packed weight keeps unsigned values (the signed ones plus half the range) in the
little-endian words of an int32 row, its zero points packed likewise down the rows:
``w = scale * (value - zero)``. Blocks of 32 with the same scale say the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError

__all__ = [
    "FP8",
    "Scheme",
    "assemble",
    "narrow",
    "pack_blocks",
    "packed_dtype",
    "read_schemes",
    "unpack_down",
    "widen",
]

Bytes = NDArray[np.uint8]

# Bits, symmetry and group size (0: one scale a row) of a quantized weight.
Scheme = tuple[int, bool, int]

# Fewer bits run in the blocks of four, which hold their codes as they are.
_DTYPES = {(8, True): "q8_0"}
_DTYPES |= {
    (bits, symmetric): "q4_0" if symmetric else "q4_1"
    for bits in (2, 3, 4)
    for symmetric in (True, False)
}
FP8: Scheme = (8, True, -8)
"""The scheme of float-quantized weights; no group is of such a size."""
_FORMS = ("pack-quantized", "float-quantized")
_BITS = {"q8_0": 8, "q4_0": 4, "q4_1": 4}


def packed_dtype(bits: int, symmetric: bool) -> str | None:
    """The block format that says the same as a packed weight, if there is one."""
    return _DTYPES.get((bits, symmetric))


def pack_blocks(blocks: Bytes, cols: int) -> dict[str, NDArray[Any]]:
    """Rows of q8_0 or q4_0 blocks as the tensors of a packed Linear weight.

    Parameters
    ----------
    blocks : uint8 [rows, row_bytes]
        Those of q4_1 are `pronk.checkpoint.real_minima.split_minima`'s.
    cols : int

    Returns
    -------
    dict
        ``weight_packed`` int32 [rows, cols * bits / 32] and ``weight_scale`` float16
        [rows, cols / 32].
    """
    rows, groups = len(blocks), cols // 32
    part = blocks.reshape(rows, groups, -1)
    scale = np.ascontiguousarray(part[:, :, :2]).view(np.float16)[:, :, 0]
    out: dict[str, NDArray[Any]] = {}
    if part.shape[2] == 34:
        values = part[:, :, 2:] ^ np.uint8(0x80)
    else:
        low, high = part[:, :, 2:] & np.uint8(15), part[:, :, 2:] >> np.uint8(4)
        both = np.concatenate([low, high], axis=2)
        values = both[:, :, 0::2] | (both[:, :, 1::2] << np.uint8(4))
    out["weight_packed"] = np.ascontiguousarray(values).reshape(rows, -1).view("<i4")
    out["weight_scale"] = scale
    return out


def narrow(words: NDArray[np.int32], bits: int) -> NDArray[np.int32]:
    """Packed rows of four bits as those of `bits`, which hold the codes; of eight as they are.

    A code counts from the middle of its range, and 32 of them fill `bits` words.
    """
    if bits >= 4:
        return words
    data = np.ascontiguousarray(words).view(np.uint8)
    codes = np.stack([data & np.uint8(15), data >> np.uint8(4)], axis=-1).reshape(len(data), -1)
    codes -= np.uint8(8 - (1 << bits - 1))
    if (codes >> np.uint8(bits)).any():
        raise ValueError(f"codes that {bits} bits do not hold")
    flat = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(flat.reshape(len(data), -1), axis=1, bitorder="little").view("<i4")


def widen(words: Bytes, bits: int) -> Bytes:
    """The inverse of `narrow`, on the bytes of rows."""
    if bits >= 4:
        return words
    flat = np.unpackbits(words, axis=1, bitorder="little").reshape(len(words), -1, bits)
    codes = np.packbits(flat, axis=2, bitorder="little")[:, :, 0]
    codes += np.uint8(8 - (1 << bits - 1))
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))


def assemble(words: Bytes, scale: NDArray[np.float32], zero: Bytes | None, dtype: str) -> Bytes:
    """Rows of blocks from packed values, scales and zero points.

    Parameters
    ----------
    words : uint8 [rows, cols * bits / 8]
    scale : float32 [rows, groups], each group a multiple of 32 columns
    zero : uint8 [rows, groups] for q4_1, else None
    dtype : {"q8_0", "q4_0", "q4_1"}
    """
    rows = len(words)
    width = _BITS[dtype] * 4
    count = words.shape[1] // width
    with np.errstate(over="ignore"):
        d = scale.astype(np.float16)
        if not np.isfinite(d).all():
            raise CheckpointError("a packed weight has a scale outside the range of float16")
        heads = [d]
        if zero is not None:
            heads.append((0 - zero * d.astype(np.float32)).astype(np.float16))
    head = 2 * len(heads)
    out = np.empty((rows, count, head + width), dtype=np.uint8)
    repeat = count // scale.shape[1]
    for at, part in enumerate(heads):
        spread = np.repeat(part, repeat, axis=1).view(np.uint8).reshape(rows, count, 2)
        out[:, :, 2 * at : 2 * at + 2] = spread
    values = words.reshape(rows, count, width)
    if width == 32:
        np.bitwise_xor(values, np.uint8(0x80), out=out[:, :, head:])
    else:
        both = np.empty((rows, count, 32), dtype=np.uint8)
        both[:, :, 0::2] = values & np.uint8(15)
        both[:, :, 1::2] = values >> np.uint8(4)
        out[:, :, head:] = both[:, :, :16] | (both[:, :, 16:] << np.uint8(4))
    return out.reshape(rows, -1)


def unpack_down(words: NDArray[np.int32], first: int, count: int) -> Bytes:
    """`count` rows of zero points, skipping `first` within the packed `words`."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
    spread = (words.view(np.uint32)[:, None, :] >> shifts) & np.uint32(15)
    flat = spread.reshape(-1, words.shape[1])[first : first + count]
    return flat.astype(np.uint8)


def read_schemes(path: Path, config: object) -> frozenset[Scheme]:
    """The weight schemes a ``quantization_config`` names, if Pronk can read them all."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is quantized with {what}; Pronk reads compressed-tensors pack-quantized "
            f"weights of 2, 3, 4 or 8 bits in groups of a multiple of 32 or by channel, and "
            f"float-quantized ones by channel"
        )

    def empty(section: Mapping[str, Any], *keys: str) -> None:
        for key in keys:
            if section.get(key):
                raise refuse(f"{key} set")

    if not isinstance(config, dict):
        raise refuse("a quantization_config that is no object")
    if config.get("quant_method") != "compressed-tensors":
        raise refuse(f"quant_method {str(config.get('quant_method'))[:40]!r}")
    form = config.get("format")
    if form not in (*_FORMS, "mixed-precision"):
        raise refuse(f"format {str(form)[:40]!r}")
    empty(config, "kv_cache_scheme", "transform_config", "moe_sparsity_config")
    sparsity = config.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise refuse("sparsity_config set")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise refuse("no config_groups")
    out = set()
    for group in groups.values():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise refuse("a config group without weights of its own")
        own = group.get("format") if form == "mixed-precision" else form
        if own not in _FORMS:
            raise refuse(f"format {str(own)[:40]!r} in a config group")
        empty(group, "output_activations")
        inputs = group.get("input_activations")
        # What the kernels keep of inputs, 12 bits, is more than int8: its scales are left alone.
        if inputs and not (isinstance(inputs, dict) and inputs.get("type", "int") == "int"
                           and inputs.get("num_bits", 8) == 8):  # fmt: skip
            raise refuse("input_activations set to other than int8")
        if own == "float-quantized":
            out.add(_float_scheme(group["weights"], refuse, empty))
        else:
            out.add(_scheme(group["weights"], refuse, empty))
    return frozenset(out)


def _float_scheme(weights: dict[str, Any], refuse: Any, empty: Any) -> Scheme:
    """Eight bits of e4m3 with a scale a row."""
    empty(weights, "dynamic", "block_structure", "group_size", "actorder")
    if weights.get("type") != "float" or weights.get("num_bits", 8) != 8:
        raise refuse("float-quantized weights that are not of 8 bits")
    if weights.get("strategy") != "channel" or weights.get("symmetric", True) is not True:
        raise refuse("float-quantized weights that are not by channel")
    return FP8


def _scheme(weights: dict[str, Any], refuse: Any, empty: Any) -> Scheme:
    empty(weights, "dynamic", "block_structure")
    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if weights.get("type", "int") != "int" or weights.get("actorder") in ("group", "dynamic", True):
        raise refuse(
            f"type {str(weights.get('type'))[:40]!r} and actorder "
            f"{str(weights.get('actorder'))[:40]!r}"
        )
    if strategy is None:
        strategy = "channel" if size == -1 else "group" if size else "tensor"
    # Float32 zero points, as Pronk's bundles keep those of q4_1 (see `real_minima`).
    real = strategy == "tensor_group" and weights.get("zp_dtype") == "torch.float32"
    if real and bits in (2, 3, 4) and symmetric is False:
        strategy = "group"
    if strategy == "channel":
        size = 0
    elif strategy != "group" or type(size) is not int or size <= 0 or size % 32:
        raise refuse(f"strategy {str(strategy)[:40]!r} and group size {str(size)[:40]}")
    if type(bits) is not int or type(symmetric) is not bool or (bits, symmetric) not in _DTYPES:
        kind = "symmetric" if symmetric else "asymmetric"
        raise refuse(f"{str(bits)[:40]}-bit {kind} weights")
    return bits, symmetric, size
