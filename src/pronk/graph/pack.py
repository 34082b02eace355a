"""Sizes of the packed layouts; the same rules as the native core's formats (a test compares)."""

from __future__ import annotations

from pronk._native import GROUP, KV_BLOCK, KV_CHUNK, PANEL, PART_TAIL

__all__ = [
    "ACTIVATIONS",
    "ACT_RANGE",
    "ACT_ROWS",
    "ALIGN",
    "GROUP",
    "GROUPED",
    "KV_BLOCK",
    "KV_DTYPES",
    "PANEL",
    "PART_TAIL",
    "act_row_bytes",
    "kv_block_bytes",
    "packed_bytes",
    "past_bytes",
    "runtime_dtype",
]

# The native core's: rows interleaved into one panel (PANEL), elements that share a scale (GROUP),
# positions of a KV block (KV_BLOCK) and of what attention sums up at a time (KV_CHUNK), floats
# after the values of a part of attention (PART_TAIL).
ALIGN = 64  # bytes
ACT_ROWS = 16  # rows of quantized activations come in blocks of so many
# Largest integer of quantized activations by their dtype: 8 bits, or 12 in two int8.
ACT_RANGE = {"a8": 127, "a12": 127 * 16}
# What a user calls them.
ACTIVATIONS = {"int8": "a8", "int12": "a12"}

KV_DTYPES = ("bf16", "int8", "int4", "f32", "int4_plain")  # elements of the KV cache
_ELEMENT = {"f32": 4, "f16": 2, "bf16": 2}
SUPER = 8  # groups that share the upper level of two-level scales
# Bytes of scales of SUPER groups of one row, and of quants of one group.
GROUPED = {
    "q8_0": (16, 32),
    "q4_0": (16, 16),
    "q4_1": (32, 16),
    "q5_0": (16, 20),
    "q5_1": (32, 20),
    "q4_k": (16, 16),
    "q5_k": (16, 20),
    "q6_k": (18, 24),
}
# Formats that are packed in another way than the checkpoint's blocks they hold: in two planes of
# nibbles, so that the upper ones can be read alone (native/kernels/bounded.h).
PLANES = {"q8_planes": "q8_0"}
# What a format the kernels lack becomes at load: the native one that loses least, near its size.
_NEAREST = {
    "q8_k": "q8_0",
    "q8_1": "q8_0",
    "f64": "f32",
}


def align(size: int, to: int = ALIGN) -> int:
    """Round a size up to a multiple."""
    return -(-size // to) * to


def packed_bytes(dtype: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix: panels of 16 rows, scales padded to 64 bytes a panel."""
    panels = -(-rows // PANEL)
    if dtype in _ELEMENT:
        return panels * PANEL * cols * _ELEMENT[dtype]
    scales, quants = GROUPED[block_dtype(dtype)]
    groups = cols // GROUP
    return panels * (align(PANEL * scales * groups // SUPER) + PANEL * quants * groups)


def block_dtype(dtype: str) -> str:
    """The format of the checkpoint's blocks that a packed format holds."""
    return PLANES.get(dtype, dtype)


def past_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes that each thread needs to expand a chunk of a rounded KV cache to bf16."""
    return 0 if kv_dtype in _ELEMENT else 2 * KV_CHUNK * head_dim * 2


def bound_plan_floats(rows: int, cols: int) -> int:
    """Width of what a product with bounds needs beside a row of its logits."""
    return 2 * PANEL + 2 * (cols // GROUP) + -(-rows // PANEL)


def act_row_bytes(cols: int, dtype: str) -> int:
    """Bytes of a row of activations: floats, or integers with a scale and sums per group."""
    if dtype not in ACT_RANGE:
        return cols * 4
    return cols // GROUP * ((2 if dtype == "a12" else 1) * GROUP + 16)


def kv_block_bytes(layers: int, kv_heads: int, head_dim: int, kv_dtype: str) -> int:
    """Bytes of one block of 32 positions over all layers, keys and values.

    An int8 row of a head has a float32 scale; an int4 row a bfloat16 scale for each 32 elements,
    or each 16 where 32 do not divide it.
    """
    if kv_dtype == "int8":
        row = head_dim + 4
    elif kv_dtype in ("int4", "int4_plain"):
        row = head_dim // 2 + 2 * head_dim // (16 if head_dim % 32 else 32)
    else:
        row = head_dim * _ELEMENT[kv_dtype]
    return layers * 2 * kv_heads * KV_BLOCK * row


def runtime_dtype(dtype: str, cols: int) -> str:
    """The packed format that a tensor of a checkpoint runs in.

    Native formats stay as they are; others become the nearest native one. Rows whose length is
    no multiple of 32 cannot be grouped and run in float32.
    """
    if dtype in _ELEMENT:
        return dtype
    if cols % GROUP:
        return "f32"
    if dtype in GROUPED:
        return dtype
    return _NEAREST.get(dtype, "q4_1")
