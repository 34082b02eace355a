"""What a model needs in memory and what it loses, from its header alone: pure functions."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pronk.checkpoint.bundle_config import experts_fit
from pronk.checkpoint.kinds import EMBEDDING_DTYPE, KINDS, tensor_kind
from pronk.errors import BudgetError
from pronk.graph.pack import KV_BLOCK
from pronk.graph.program import Limits, Program, compile_program, kv_pools
from pronk.spec import MemoryPlan, ModelSpec
from pronk.units import format_bytes

__all__ = [
    "FORMATS",
    "Candidate",
    "Variant",
    "candidates",
    "fits",
    "format_error",
    "largest_context",
    "pareto",
    "planned",
    "refusal",
    "variants",
]

FORMATS = ("q8_0", "q4_1", "q4_0")
"""The formats a kind may get, best first."""

# The matrices a token passes one after the other: q, k and v, then o; gate and up; down; head.
# Each adds its relative error whatever its size: on SmolLM2-135M, rounding attention to 4 bits
# diverges about twice as much as rounding any other kind, though it has the fewest parameters.
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


def planned(spec: ModelSpec, formats: Mapping[str, str], context: int) -> Program:
    """The program that a bundle with `formats` by kind runs as."""

    def dtype_of(name: str) -> str:
        if name == "model.embed_tokens.weight" and not spec.tie_embeddings:
            return EMBEDDING_DTYPE
        kind = tensor_kind(name)
        return "f32" if kind is None else formats[kind]  # routers stay as they are

    return compile_program(spec, dtype_of, Limits(context))


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


def variants(sources: Sources | None = None) -> list[Variant]:
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
    found.sort(key=lambda v: v.predicted_error)
    return found


def candidates(
    spec: ModelSpec, context: int, overhead: int, sources: Sources | None = None
) -> list[Candidate]:
    """Every variant with its plan, smallest predicted error first, then smallest."""
    return [
        Candidate(variant, planned(spec, variant.formats, context).memory(overhead))
        for variant in variants(sources)
        if experts_fit(spec, variant.formats)
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


def largest_context(spec: ModelSpec, smallest: MemoryPlan, context: int, budget: int) -> int:
    """The longest context up to `context`, in whole blocks, that a plan would fit at; 0 if none."""
    room = budget - (smallest.total - smallest.kv)

    def kv(blocks: int) -> int:
        return sum(pool.nbytes for pool in kv_pools(spec, Limits(blocks * KV_BLOCK)))

    # The pools grow with the context, or stay as they are.
    return bisect.bisect_right(range(1, context // KV_BLOCK + 1), room, key=kv) * KV_BLOCK


def refusal(spec: ModelSpec, found: Sequence[Candidate], budget: int, context: int) -> BudgetError:
    """The error that names the smallest candidate and the context that would fit."""
    small = min(found, key=lambda c: (c.plan.total, c.variant.predicted_error))
    need = small.plan
    text = (
        f"no variant fits {format_bytes(budget)} ({budget} bytes) at a context of {context} "
        f"tokens: the smallest needs "
        f"{format_bytes(need.total)} ({need.total} bytes: weights {format_bytes(need.weights)}, "
        f"KV {format_bytes(need.kv)}, arena {format_bytes(need.arena)}, overhead "
        f"{format_bytes(need.overhead)}), with {small.variant}; "
    )
    length = largest_context(spec, need, context, budget)
    if length >= 2 and length < context:
        return BudgetError(f"{text}give --memory {need.total} or more, or --context {length}")
    return BudgetError(f"{text}give --memory {need.total} or more: no context would make it fit")
