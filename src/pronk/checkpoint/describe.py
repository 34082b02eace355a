"""What a header says, of any format, checked and put together into a ModelSpec."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronk.checkpoint.families import Family
from pronk.checkpoint.values import integer, number
from pronk.errors import CheckpointError
from pronk.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec

__all__ = ["LIMITS", "Described", "check_experts", "describe", "every"]

LIMITS: Mapping[str, tuple[int, int]] = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 22),
    "num_layers": (1, 10_000),
    "num_heads": (1, 1 << 14),
    "num_kv_heads": (1, 1 << 14),
    "head_dim": (2, 1 << 12),
    "context_length": (1, 1 << 30),
}


def every(count: int, period: int) -> list[bool]:
    """For each of `count` layers, whether it is one of every `period`-th; 0: none is."""
    return [bool(period) and (i + 1) % period == 0 for i in range(count)]


@dataclass(frozen=True, slots=True)
class Described:
    """The layers of a header, layer by layer where they differ.

    Parameters
    ----------
    window : int
        Positions; 0 where there is no window.
    windowed, roped, routed : sequence of bool
        Which layers have a window, a rope, experts.
    rope, local_rope : RopeSpec
        That of most layers, and that of those with a window.
    moe : MoeSpec or None
    qk_norm : str
    weights : sequence of int
        The layer whose weights each layer uses.
    """

    window: int
    windowed: Sequence[bool]
    roped: Sequence[bool]
    routed: Sequence[bool]
    rope: RopeSpec
    local_rope: RopeSpec
    moe: MoeSpec | None
    qk_norm: str
    weights: Sequence[int]


def check_experts(path: Path, moe: MoeSpec) -> MoeSpec:
    """A mixture whose sizes are within their ranges."""
    integer(path, "the number of experts", moe.experts, 1, 1 << 12)
    integer(path, "the experts of a token", moe.top_k, 1, min(moe.experts, 256))
    integer(path, "the width of an expert", moe.intermediate_size, 1, LIMITS["hidden_size"][1])
    return moe


def describe(
    path: Path,
    family: Family,
    sizes: Mapping[str, object],
    described: Described,
    *,
    norm_eps: object,
    **rest: Any,
) -> ModelSpec:
    """A ModelSpec from header fields, each within its range and consistent with the others.

    `rest` are further fields of the spec, checked by who read them.
    """
    checked: dict[str, Any] = {f: integer(path, f, sizes.get(f), *LIMITS[f]) for f in LIMITS}
    if checked["num_heads"] % checked["num_kv_heads"]:
        raise CheckpointError(
            f"{path} has {checked['num_heads']} attention heads, no multiple of its "
            f"{checked['num_kv_heads']} key-value heads"
        )
    if checked["head_dim"] % 2:
        raise CheckpointError(f"{path} has the odd head size {checked['head_dim']}")
    count, context = checked.pop("num_layers"), checked["context_length"]
    if rest.get("attention_scale") is not None:
        plain = 1 / math.sqrt(checked["head_dim"])
        if math.isclose(rest["attention_scale"], plain, rel_tol=1e-6):
            rest["attention_scale"] = None
    layers, ropes = _layers(path, family, described, count, context)
    return ModelSpec(
        family=family.name,
        norm=family.norm,
        norm_eps=number(path, "the norm epsilon", norm_eps, 0, 1),
        post_norms=family.post_norms,
        layers=layers,
        ropes=ropes,
        moe=described.moe if any(described.routed) else None,
        **checked,
        **rest,
    )


def _layers(
    path: Path, family: Family, d: Described, count: int, context: int
) -> tuple[tuple[LayerSpec, ...], tuple[RopeSpec, ...]]:
    ropes: list[RopeSpec] = []
    layers: list[LayerSpec] = []
    window = d.window if d.window < context else 0  # a wide one hides nothing
    for i in range(count):
        rope = None
        if d.roped[i] and not family.alibi:
            of = d.local_rope if d.windowed[i] else d.rope
            if of not in ropes:
                ropes.append(of)
            rope = ropes.index(of)
        seen = bool(window and d.windowed[i])
        layers.append(
            LayerSpec(
                attention="global" if not seen else "chunked" if family.chunked else "window",
                window=window if seen else 0,
                rope=rope,
                qk_norm="" if d.qk_norm == "l2" and rope is None else d.qk_norm,
                mlp="moe" if d.routed[i] else family.mlp,
                weights=None if d.weights[i] == i else d.weights[i],
            )
        )
    for i, layer in enumerate(layers):
        if layer.weights is None:
            continue
        owner = layers[layer.weights]
        same = (layer.qk_norm in ("", "l2")) == (owner.qk_norm in ("", "l2"))
        if owner.weights is not None or owner.mlp != layer.mlp or not same:
            raise CheckpointError(
                f"{path} gives layer {i} the weights of layer {layer.weights}, which has none of "
                f"its own or is of another kind"
            )
    return tuple(layers), tuple(ropes)
