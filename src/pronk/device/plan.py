"""What a model needs in memory and what it loses, from its header alone: pure functions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pronk.checkpoint.kinds import KINDS
from pronk.errors import BudgetError
from pronk.graph.pack import KV_BLOCK, kv_block_bytes, packed_bytes
from pronk.spec import MemoryPlan, ModelSpec
from pronk.units import format_bytes

__all__ = [
    "FORMATS",
    "Candidate",
    "Variant",
    "candidates",
    "choose",
    "fits",
    "format_error",
    "kv_bytes",
    "largest_context",
    "pareto",
    "plan",
    "refusal",
    "variants",
    "weight_bytes",
]

FORMATS = ("q8_0", "q4_1", "q4_0")
"""The formats a kind may get, best first."""

_ALIGN = 64

# The matrices a token passes one after the other: q, k and v, then o; gate and up; down; head.
# Each adds its relative error whatever its size. Measured on SmolLM2-135M, rounding one kind to
# 4 bits gave KL 0.123 (attention), 0.056 (gate and up), 0.079 (down) and 0.057 (head): by
# parameters, attention would have counted half of gate and up.
_STEPS = MappingProxyType({"head": 1, "attention": 2, "gate_up": 1, "down": 1})

Sources = Mapping[str, Mapping[str, float]]
"""Per kind, the dtypes its source tensors have and their shares of the kind's parameters."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A format for each tensor kind, and the relative squared error that predicts its loss."""

    formats: Mapping[str, str]
    predicted_error: float

    def __str__(self) -> str:
        return ", ".join(f"{kind} {self.formats[kind]}" for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant and what it needs."""

    variant: Variant
    plan: MemoryPlan

    def to_dict(self) -> dict[str, object]:
        """Plain data, for ``--json`` and ``pronk.json``."""
        return {
            "formats": dict(self.variant.formats),
            "predicted_error": self.variant.predicted_error,
            "memory": self.plan.to_dict(),
        }


def _weights(spec: ModelSpec) -> Iterator[tuple[str, int, int, int]]:
    """``(kind, rows, cols, how many)`` of every matrix."""
    hidden, layers = spec.hidden_size, spec.num_layers
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield "head", spec.vocab_size, hidden, 1
    yield "attention", q, hidden, layers
    yield "attention", kv, hidden, 2 * layers
    yield "attention", hidden, q, layers
    yield "gate_up", spec.intermediate_size, hidden, 2 * layers
    yield "down", hidden, spec.intermediate_size, layers


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def weight_bytes(spec: ModelSpec, formats: Mapping[str, str]) -> int:
    """Bytes of all weights as the runtime packs them, with `formats` by kind.

    An embedding table of its own, where it is not tied to the head, is in the format under
    ``"embedding"``; float16, as a bundle stores it, unless given.
    """
    total = 0
    if not spec.tie_embeddings:
        dtype = formats.get("embedding", "f16")
        total += _aligned(packed_bytes(dtype, spec.vocab_size, spec.hidden_size))
    for kind, rows, cols, count in _weights(spec):
        total += count * _aligned(packed_bytes(formats[kind], rows, cols))
    total += (2 * spec.num_layers + 1) * _aligned(4 * spec.hidden_size)
    # The rotary frequencies, one for each pair of a head's elements.
    total += _aligned(4 * (spec.head_dim // 2))
    if spec.attention_bias:
        q, kv = 4 * spec.num_heads * spec.head_dim, 4 * spec.num_kv_heads * spec.head_dim
        bias = _aligned(q) + 2 * _aligned(kv) + _aligned(4 * spec.hidden_size)
        total += spec.num_layers * bias
    return total


def kv_bytes(spec: ModelSpec, context: int, kv_dtype: str = "bf16") -> int:
    """Bytes of the keys and values of `context` tokens, in whole blocks."""
    block = kv_block_bytes(spec.num_layers, spec.num_kv_heads, spec.head_dim, kv_dtype)
    return block * -(-context // KV_BLOCK)


def plan(
    spec: ModelSpec, formats: Mapping[str, str], context: int, arena: int, overhead: int
) -> MemoryPlan:
    """The memory plan of a model with `formats` by kind; `arena` and `overhead` in bytes."""
    return MemoryPlan(
        weights=weight_bytes(spec, formats),
        kv=kv_bytes(spec, context),
        arena=arena,
        overhead=overhead,
    )


@functools.cache
def format_error(dtype: str) -> float:
    """Relative squared error of rounding Gaussian weights to `dtype`.

    Measured by quantizing a fixed pseudo-random sample, so that it follows the quantizer.
    """
    import random

    import numpy as np

    from pronk.checkpoint.blocks import dequantize, quantize

    draw = random.Random(20240229)
    sample = np.array([draw.gauss(0.0, 1.0) for _ in range(1 << 15)], dtype=np.float32)
    sample = sample.reshape(-1, 256)
    error = dequantize(quantize(sample, dtype), dtype, 256) - sample
    return float((error * error).sum(dtype=np.float64) / (sample * sample).sum(dtype=np.float64))


def variants(spec: ModelSpec, sources: Sources | None = None) -> list[Variant]:
    """Every assignment of a format to each kind, smallest predicted error first.

    The predicted error is the mean of each kind's relative squared error, weighted by
    `_STEPS`. The share of a kind that the source already holds in the format is kept bit for
    bit and loses nothing, so a variant never spends bits on what the source has already lost.
    """
    total = sum(_STEPS.values())

    def loss(kind: str, dtype: str) -> float:
        kept = 0.0 if sources is None else sources.get(kind, {}).get(dtype, 0.0)
        return _STEPS[kind] / total * (1.0 - kept) * format_error(dtype)

    found = []
    for dtypes in itertools.product(FORMATS, repeat=len(KINDS)):
        formats = dict(zip(KINDS, dtypes, strict=True))
        error = sum(loss(kind, dtype) for kind, dtype in formats.items())
        found.append(Variant(MappingProxyType(formats), error))
    found.sort(key=lambda v: (v.predicted_error, weight_bytes(spec, v.formats)))
    return found


def candidates(
    spec: ModelSpec, context: int, arena: int, overhead: int, sources: Sources | None = None
) -> list[Candidate]:
    """Every variant with its plan, smallest predicted error first, then smallest."""
    return [
        Candidate(variant, plan(spec, variant.formats, context, arena, overhead))
        for variant in variants(spec, sources)
    ]


def pareto(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both size and predicted error, best first."""
    front: list[Candidate] = []
    for one in sorted(found, key=lambda c: (c.variant.predicted_error, c.plan.total)):
        if not front or one.plan.total < front[-1].plan.total:
            front.append(one)
    return front


def fits(found: Sequence[Candidate], budget: int) -> list[Candidate]:
    """The candidates within `budget` bytes, smallest predicted error first; ties: smaller."""
    within = [one for one in found if one.plan.total <= budget]
    return sorted(within, key=lambda c: (c.variant.predicted_error, c.plan.total))


def largest_context(spec: ModelSpec, smallest: MemoryPlan, budget: int) -> int:
    """The longest context, in whole blocks, that `smallest` would fit at; 0 if none."""
    room = budget - (smallest.total - smallest.kv)
    return max(0, room // kv_bytes(spec, KV_BLOCK)) * KV_BLOCK


def choose(
    found: Sequence[Candidate], budget: int, spec: ModelSpec | None = None, context: int = 0
) -> Candidate:
    """The candidate with the smallest predicted error that fits; ties go to the smaller.

    Parameters
    ----------
    found : sequence of Candidate
        What to choose from.
    budget : int
        Bytes the whole plan may take.
    spec : ModelSpec, optional
    context : int
        Only for the message: what context would fit instead.

    Raises
    ------
    BudgetError
        If none fits; it names the smallest that would.
    """
    within = fits(found, budget)
    if within:
        return within[0]
    raise refusal(found, budget, spec, context)


def refusal(
    found: Sequence[Candidate], budget: int, spec: ModelSpec | None = None, context: int = 0
) -> BudgetError:
    """The error that names the smallest candidate and the context that would fit."""
    small = min(found, key=lambda c: (c.plan.total, c.variant.predicted_error))
    need = small.plan
    at = f" at a context of {context} tokens" if context else ""
    text = (
        f"no variant fits {format_bytes(budget)} ({budget} bytes){at}: the smallest needs "
        f"{format_bytes(need.total)} ({need.total} bytes: weights {format_bytes(need.weights)}, "
        f"KV {format_bytes(need.kv)}, arena {format_bytes(need.arena)}, overhead "
        f"{format_bytes(need.overhead)}), with {small.variant}; "
    )
    if spec is None:
        return BudgetError(f"{text}give --memory {need.total} or more")
    length = largest_context(spec, need, budget)
    if length and length < context:
        return BudgetError(f"{text}give --memory {need.total} or more, or --context {length}")
    return BudgetError(f"{text}give --memory {need.total} or more: no context would make it fit")
