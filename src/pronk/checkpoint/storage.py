"""How a bundle stores a matrix: bits, groups and minima, and the blocks that say the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pronk.checkpoint.blocks import BLOCK_SIZES
from pronk.checkpoint.kinds import tensor_kind
from pronk.errors import RequestError

__all__ = ["Storage", "parse_storage", "storage_of"]

_GROUPED = re.compile(r"int([2348])-(?:g([1-9][0-9]{0,5})|channel)(-min)?")
# Formats of blocks of 32 that bundles are fitted in.
_BLOCKS = {"q8_0": "int8-g32", "q4_0": "int4-g32", "q4_1": "int4-g32-min"}
_FLOATS = MappingProxyType({"bf16": "BF16", "f16": "F16", "f32": "F32"})


@dataclass(frozen=True, slots=True)
class Storage:
    """A format of weights in a bundle.

    Parameters
    ----------
    bits : int
        Bits of an element.
    kind : {"int", "fp8", "float", "k"}
        Whole numbers with a float16 scale a group, and a minimum where ``minimum`` is set;
        e4m3 with a power of two a row; plain floats; GGUF's K-quants.
    group : int
        Elements that share a scale; 0: all of a row.
    minimum : bool
        Codes count from a minimum of the group rather than from zero.
    blocks : str
        The block format whose rows say the same, and which runs: ``q8_0``, ``q4_0`` or ``q4_1``
        with the group's scale in every block of 32 of it, or a float type.
    """

    bits: int
    kind: str
    group: int
    minimum: bool
    blocks: str

    def __str__(self) -> str:
        if self.kind != "int":
            return "fp8" if self.kind == "fp8" else self.blocks
        size = f"g{self.group}" if self.group else "channel"
        return f"int{self.bits}-{size}{'-min' if self.minimum else ''}"

    @property
    def unit(self) -> int:
        """What the length of a row must be a multiple of."""
        return {"int": self.group or 32, "k": 256}.get(self.kind, 1)

    def holds(self, dtype: str) -> bool:
        """Whether rows of `dtype` are rows of this as they are."""
        plain = self.kind in ("float", "k") or (self.group == 32 and self.bits >= 4)
        return plain and dtype == self.blocks

    def groups(self, cols: int) -> int:
        """Groups of a row."""
        return cols // self.group if self.group else 1

    def row_bytes(self, cols: int) -> int:
        """Bytes that a row takes in a bundle."""
        if self.kind == "float":
            return cols * self.bits // 8
        if self.kind == "fp8":
            return cols + 4
        if self.kind == "k":
            block, nbytes = BLOCK_SIZES[self.blocks]
            return cols // block * nbytes
        # A minimum is kept as a float32 zero point (see `pronk.checkpoint.real_minima`).
        return cols * self.bits // 8 + self.groups(cols) * (6 if self.minimum else 2)

    @property
    def weights(self) -> dict[str, Any] | None:
        """``weights`` of a ``compressed-tensors`` config group; None for plain floats."""
        if self.kind == "float":
            return None
        real = self.minimum
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "float" if self.kind == "fp8" else "int",
            "symmetric": not self.minimum,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }
        if real:
            # A minimum is no whole multiple of its scale, and rounding it to one would cost as
            # much as the rounding to 4 bits did. Strategy "group" packs zero points as whole
            # numbers (and compressed-tensors 0.20 cannot load those); "tensor_group", with a
            # global scale of one, computes the same and keeps them in zp_dtype.
            weights |= {"strategy": "tensor_group", "zp_dtype": "torch.float32"}
        return weights


_K_QUANTS = {
    "q4_k": Storage(4, "k", 32, True, "q4_k"),
    "q6_k": Storage(6, "k", 16, False, "q6_k"),
}


def parse_storage(text: str) -> Storage:
    """The format a name stands for: ``int4-g64``, ``int4-g32-min``, ``int8-channel``, ``fp8``, ...

    ``q8_0``, ``q4_0`` and ``q4_1`` are names of those of 32 with the same blocks.

    Raises
    ------
    RequestError
        If there is no such format, or its groups are no multiple of 32.
    """
    if text in _FLOATS:
        return Storage(32 if text == "f32" else 16, "float", 0, False, text)
    if text in _K_QUANTS:
        return _K_QUANTS[text]
    if text == "fp8":
        return Storage(8, "fp8", 0, False, "bf16")
    match = _GROUPED.fullmatch(_BLOCKS.get(text, text))
    if match is None or (match[1] == "8" and match[3]) or (match[3] and not match[2]):
        raise RequestError(
            f"there is no format {text!r}: give one such as int8-channel, int4-g64, "
            f"int4-g32-min, int3-g64, fp8 or bf16"
        )
    bits, group, minimum = int(match[1]), int(match[2] or 0), bool(match[3])
    if group % 32:
        raise RequestError(f"a group of {group} is no multiple of 32")
    blocks = "q8_0" if bits == 8 else "q4_1" if minimum else "q4_0"
    return Storage(bits, "int", group, minimum, blocks)


def storage_of(formats: Mapping[str, str], name: str) -> Storage:
    """The format of a matrix, given formats by name or by kind; its own name comes first."""
    text = formats.get(name)
    return parse_storage(formats[tensor_kind(name) or ""] if text is None else text)
