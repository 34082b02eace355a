"""The sizes that structured pruning changes, and which of them to change for a target."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from pronk.checkpoint.arrange import expected_tensors
from pronk.errors import RequestError
from pronk.spec import ModelSpec

__all__ = ["Shape", "count_parameters", "parse_keep", "resized", "shape_for", "shape_of"]

STEP = 32
"""Widths are multiples of this: groups of quantized weights are."""

_KEEP = re.compile(r"(-?)([0-9]{1,12}(?:\.[0-9]{1,6})?)(%?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shape:
    """How many of each a model has: layers, KV heads, MLP neurons a layer, hidden channels."""

    layers: int
    kv_heads: int
    mlp: int
    hidden: int


def shape_of(spec: ModelSpec) -> Shape:
    """The shape of a model as it is."""
    return Shape(spec.num_layers, spec.num_kv_heads, spec.intermediate_size, spec.hidden_size)


def resized(spec: ModelSpec, shape: Shape) -> ModelSpec:
    """The spec with another shape; query heads stay as many to a KV head.

    Raises
    ------
    RequestError
        If a size is below the least or above what the model has, or no multiple of 32.
    """
    have = shape_of(spec)
    for what, want, most, step in (
        ("layers", shape.layers, have.layers, 1),
        ("KV heads", shape.kv_heads, have.kv_heads, 1),
        ("MLP neurons", shape.mlp, have.mlp, STEP),
        ("hidden channels", shape.hidden, have.hidden, STEP),
    ):
        if not 1 <= want <= most or (want != most and want % step):
            steps = f" in steps of {step}" if step > 1 else ""
            raise RequestError(f"{want} {what} cannot be kept: the model has {most}, and any "
                               f"number from {step} on{steps} can be")  # fmt: skip
    return replace(
        spec,
        layers=spec.layers[: shape.layers],
        num_kv_heads=shape.kv_heads,
        num_heads=spec.num_heads // spec.num_kv_heads * shape.kv_heads,
        intermediate_size=shape.mlp,
        hidden_size=shape.hidden,
    )


def count_parameters(spec: ModelSpec) -> int:
    """Weights of a model; an embedding that is the head too counts once."""
    return sum(math.prod(shape) for _, shape in expected_tensors(spec))


def parse_keep(text: str, have: int, step: int = 1, option: str = "") -> int:
    """How many to keep of `have`: ``24``, ``75%``, or ``-25%`` for a quarter less.

    Shares are rounded to the nearest multiple of `step`, and at least one step is kept.

    Raises
    ------
    RequestError
        If the text is none of these, keeps nothing, or more than there is.
    """
    match = _KEEP.fullmatch(text.strip())
    if match is None or (match[1] and not match[3]) or (not match[3] and "." in match[2]):
        raise RequestError(
            f"{option or 'the size'} takes a number to keep, or a share such as 75% or -25%, "
            f"not {text!r}"
        )
    number = float(match[2])
    if match[3]:
        share = 1 - number / 100 if match[1] else number / 100
        if not 0 < share <= 1:
            raise RequestError(f"{option or 'the size'} {text} leaves nothing to keep, or too much")
        number = max(step, round(share * have / step) * step) if share < 1 else have
    if not 1 <= number <= have:
        raise RequestError(f"{option or 'the size'} {text} is out of range: the model has {have}")
    return int(number)


def shape_for(spec: ModelSpec, target: int) -> Shape:
    """A shape of at most `target` parameters, and not much fewer.

    Neurons of the MLPs cost the least to lose, as they can be chosen one by one and the rest
    can be refitted; so they go first, down to `_LEAST_MLP`. Beyond that layers go with them,
    and the hidden width last, as it takes the embedding with it (arXiv:2407.14679 finds the
    same order for recovery: width before depth).

    Raises
    ------
    RequestError
        If no shape is that small.
    """
    have = shape_of(spec)
    least_layers = max(1, round(have.layers * _LEAST_LAYERS))
    widest = have.mlp // STEP * STEP
    if widest and target >= STEP:
        for hidden in (have.hidden, *range((have.hidden - 1) // STEP * STEP, 0, -STEP)):
            for layers in range(have.layers, least_layers - 1, -1):
                rest, neurons = (
                    count_parameters(resized(spec, Shape(layers, have.kv_heads, mlp, hidden)))
                    for mlp in (STEP, widest)
                )
                # Parameters grow evenly with neurons.
                slope = (neurons - rest) / max(1, widest - STEP)
                room = widest if slope == 0 else STEP + int((target - rest) // slope)
                mlp = min(widest, room // STEP * STEP)
                # The more layers go, the narrower may be those that are left.
                lost = 1 - layers / have.layers
                if rest <= target and mlp >= have.mlp * (_LEAST_MLP - _MLP_PER_LAYER * lost):
                    return Shape(layers, have.kv_heads, mlp, hidden)
    raise RequestError(
        f"no shape of the model has {target:,} parameters or fewer: give --layers, --heads, "
        f"--mlp and --hidden themselves"
    )


_LEAST_MLP, _MLP_PER_LAYER, _LEAST_LAYERS = 0.6, 0.5, 0.4
