"""KV memory by attention kind: which layers share blocks, and how many a sequence holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pronk.graph.pack import KV_BLOCK
from pronk.spec import ModelSpec

__all__ = ["KvGroup", "KvPool", "blocks_of", "kv_groups", "place"]


def blocks_of(positions: int) -> int:
    """Blocks that so many positions fill, from the start of one on."""
    return -(-positions // KV_BLOCK)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers whose tokens see the same positions, so that they hold blocks together.

    Parameters
    ----------
    attention : {"global", "window", "chunked"}
    window, sinks : int
        As `LayerSpec` has them.
    layers : tuple of int
    """

    attention: str
    window: int
    sinks: int
    layers: tuple[int, ...]

    def first_seen(self, position: int) -> int:
        """The first position that one sees, but for the sinks."""
        if self.attention == "global":
            return 0
        if self.attention == "chunked":
            return position // self.window * self.window
        return max(0, position - self.window + 1)

    def bound(self, tokens: int, at_once: int) -> int:
        """Most blocks that a sequence of so many tokens holds, where a step has `at_once`."""
        whole = blocks_of(tokens)
        if self.attention == "global":
            return whole
        # What the first token of a step sees need not begin with a block.
        seen = blocks_of(self.window + at_once) + 1
        return min(whole, seen + blocks_of(self.sinks))


@dataclass(frozen=True, slots=True)
class KvPool:
    """The memory of a group: `blocks` blocks of `block_bytes` bytes."""

    group: KvGroup
    block_bytes: int
    blocks: int

    @property
    def nbytes(self) -> int:
        """All its bytes."""
        return self.blocks * self.block_bytes


def kv_groups(spec: ModelSpec) -> tuple[KvGroup, ...]:
    """The groups of a model's layers, in the order of their first layers."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for i, layer in enumerate(spec.layers):
        seen = (layer.attention, layer.window, layer.sinks)
        if layer.attention == "global":
            seen = ("global", 0, 0)
        found.setdefault(seen, []).append(i)
    return tuple(KvGroup(*seen, tuple(layers)) for seen, layers in found.items())


def place(groups: Sequence[KvGroup], layer: int) -> tuple[int, int]:
    """The group of a layer, and the layer's place among those of the group."""
    for index, group in enumerate(groups):
        if layer in group.layers:
            return index, group.layers.index(layer)
    raise ValueError(f"layer {layer} is in no KV group")
