"""Rotary embeddings as Hugging Face configs describe them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pronk.checkpoint.values import flag, integer, number, unknown
from pronk.errors import CheckpointError
from pronk.spec import RopeSpec

__all__ = ["longest_context", "longrope_factor", "read_ropes", "yarn_factor"]

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def longrope_factor(stretch: float, original: int) -> float:
    """LongRoPE's attention factor for a context `stretch` times as long (arXiv:2402.13753)."""
    if stretch <= 1 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(stretch) / math.log(original))


def yarn_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's attention factor (arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def longest_context(context: int, *ropes: RopeSpec) -> int:
    """The context that a model runs with, given what its header says and how ropes are scaled."""
    for rope in ropes:
        if rope.kind in ("dynamic", "yarn"):
            context = max(context, int(min(rope.factor * rope.original_context, 1 << 30)))
    return context


def read_ropes(
    path: Path, config: dict[str, Any], context: int, head_dim: int, local_theta: float
) -> tuple[RopeSpec, RopeSpec]:
    """The rope of most layers, and that of window layers.

    Both the older layout (``rope_theta``, ``rope_scaling``) and that of transformers 5
    (``rope_parameters``, by type of layer where types differ) are read.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    given = new if new is not None else old if old is not None else {}
    theta = config.get("rope_theta", 10000.0)
    if not isinstance(given, dict):
        raise _no_object(path)
    if any(kind in given for kind in _LAYER_TYPES):
        sets = [given.get(kind, {}) for kind in ("full_attention", "sliding_attention")]
        if not all(isinstance(one, dict) for one in sets):
            raise _no_object(path)
        local = config.get("rope_local_base_freq", local_theta or theta)
        return (
            _rope(path, config, sets[0], theta, context, head_dim),
            _rope(path, config, sets[1], local, context, head_dim),
        )
    rope = _rope(path, config, given, theta, context, head_dim)
    if not local_theta:
        return rope, rope
    base = config.get("rope_local_base_freq", local_theta)
    return rope, RopeSpec(theta=number(path, "rope_local_base_freq", base, 0, 1e12))


def _no_object(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} gives its rotary scaling as something else than an object")


def _rope(
    path: Path, config: dict[str, Any], scaling: dict[str, Any], theta: object, context: int,
    head_dim: int,
) -> RopeSpec:  # fmt: skip
    base = number(path, "rope_theta", scaling.get("rope_theta", theta), 0, 1e12)
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise CheckpointError(
            f"{path} rotates only a part of each head (partial_rotary_factor), which Pronk does "
            f"not run"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its name in the first Phi-3 files
    if kind == "default":
        return RopeSpec(theta=base)
    if kind not in _KINDS:
        raise unknown(path, "rope type", kind, _KINDS)

    def factor(field: str, default: object = None) -> float:
        return number(path, field, scaling.get(field) or default, 0, 1e6)

    original = integer(
        path,
        "original_max_position_embeddings",
        config.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings", context),
        1,
        1 << 30,
    )
    if kind == "linear":
        return RopeSpec(theta=base, kind="linear", factor=factor("factor"))
    if kind == "dynamic":
        # transformers scales by the length of a sequence beyond max_position_embeddings.
        return RopeSpec(base, "dynamic", factor("factor"), original_context=context)
    if kind == "llama3":
        low, high = factor("low_freq_factor"), factor("high_freq_factor")
        if low >= high:
            raise CheckpointError(f"{path} has low_freq_factor not below high_freq_factor")
        return RopeSpec(base, "llama3", factor("factor"), low, high, original)
    stretch = factor("factor", context / original)
    stated = scaling.get("attention_factor")
    if stated is not None:
        stated = number(path, "attention_factor", stated, 0, 100)
    if kind == "longrope":
        return RopeSpec(
            base, "longrope", stretch, original_context=original,
            attention_factor=stated or longrope_factor(stretch, original),
            short_factors=_factors(path, scaling, "short_factor", head_dim),
            long_factors=_factors(path, scaling, "long_factor", head_dim),
        )  # fmt: skip
    if stated is None:
        stated = yarn_factor(stretch)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            stated = yarn_factor(stretch, factor("mscale"))
            stated /= yarn_factor(stretch, factor("mscale_all_dim"))
    return RopeSpec(
        base, "yarn", stretch, original_context=original, attention_factor=stated,
        beta_fast=factor("beta_fast", 32.0), beta_slow=factor("beta_slow", 1.0),
        truncate=flag(path, "truncate", scaling.get("truncate", True)),
    )  # fmt: skip


def _factors(path: Path, scaling: dict[str, Any], field: str, head_dim: int) -> tuple[float, ...]:
    values = scaling.get(field)
    if not isinstance(values, list) or len(values) != head_dim // 2:
        raise CheckpointError(
            f"{path} gives {field} as something else than {head_dim // 2} numbers, one for each "
            f"rotated pair"
        )
    return tuple(number(path, field, value, 0, 1e6) for value in values)
