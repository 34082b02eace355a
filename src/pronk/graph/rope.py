"""Frequencies of rotary embeddings: the ways to stretch them over longer contexts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pronk.spec import LayerSpec, ModelSpec, RopeSpec

__all__ = ["FREQUENCIES", "KEY_CENTER", "computed_weight", "model_frequencies", "rope_frequencies"]

FREQUENCIES = "rope.frequencies"  # weights computed from the spec, not read from the checkpoint
KEY_CENTER = "key_center"  # weights computed from the bias of keys, by layer

_CENTERED = 4096  # positions; not the context, on which what is cached would then depend

Array = NDArray[np.float32]


def model_frequencies(spec: ModelSpec, name: str, context: int) -> Array | None:
    """The frequencies that a graph names as a weight; None for a weight of the checkpoint."""
    family, _, index = name.rpartition(".")
    if family != FREQUENCIES:
        return None
    return rope_frequencies(spec.ropes[int(index)], spec.head_dim, context)


def rope_frequencies(rope: RopeSpec, head_dim: int, context: int = 0) -> Array:
    """Radians per position of each rotated pair, float32 [head_dim / 2].

    Parameters
    ----------
    rope : RopeSpec
    head_dim : int
    context : int
        Most tokens of a sequence. Rules that depend on how long a sequence has become (dynamic,
        longrope) are fixed for this length: otherwise what is in the cache would be of another
        rule than what comes.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = rope.theta
    if rope.kind == "dynamic" and context > rope.original_context:
        stretched = rope.factor * context / rope.original_context - (rope.factor - 1)
        theta *= stretched ** (head_dim / (head_dim - 2))
    frequencies = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, frequencies, head_dim)
    elif rope.kind == "longrope":
        beyond = context > rope.original_context
        factors = rope.long_factors if beyond else rope.short_factors
        frequencies = frequencies / np.asarray(factors, np.float32)
    elif rope.kind not in ("default", "dynamic"):
        raise ValueError(f"unknown rope kind {rope.kind!r}")
    return np.asarray(frequencies, np.float32)


def computed_weight(
    spec: ModelSpec, name: str, context: int, read: Callable[[str], Array]
) -> Array | None:
    """A weight that a graph names and no checkpoint holds; None for any other.

    Parameters
    ----------
    spec : ModelSpec
    name : str
    context : int
        See `rope_frequencies`.
    read : callable
        A vector of the checkpoint by its name, float32.
    """
    family, _, index = name.rpartition(".")
    if family != KEY_CENTER:
        return model_frequencies(spec, name, context)
    layer = spec.layers[int(index)]
    at = int(index) if layer.weights is None else layer.weights
    bias = read(f"model.layers.{at}.self_attn.k_proj.bias").reshape(-1)
    return _key_center(spec, layer, bias, context)


def _key_center(spec: ModelSpec, layer: LayerSpec, bias: Array, context: int) -> Array:
    """What all keys of a layer have in common: the mean of their rotated bias over positions.

    Taken from every key it changes no attention, since it adds the same to all scores of a query;
    keys in fewer bits are nearer without it. Biases are largest where rope turns slowest (Qwen's
    reach 200 beside keys of about 1), so that the mean is most of them.
    """
    if layer.rope is None:
        return bias
    rope = spec.ropes[layer.rope]
    turn = np.exp(1j * rope_frequencies(rope, spec.head_dim, context).astype(np.float64))
    still = turn == 1
    turned = (1 - turn**_CENTERED) / np.where(still, 1, _CENTERED * (1 - turn))
    mean = np.where(still, 1, turned) * rope.attention_factor
    first, second = np.moveaxis(bias.reshape(spec.num_kv_heads, 2, -1), 1, 0)
    center = (first + 1j * second) * mean
    return np.stack([center.real, center.imag], 1).reshape(-1).astype(np.float32)


def _llama3(rope: RopeSpec, frequencies: Array) -> Array:
    """Wavelengths beyond the original context are stretched, short ones kept, the rest blended."""
    wavelengths = 2 * math.pi / frequencies
    low = rope.original_context / rope.low_freq_factor
    high = rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    inner = np.where(wavelengths < high, frequencies, blended)
    return np.where(wavelengths > low, frequencies / rope.factor, inner).astype(np.float32)


def _yarn(rope: RopeSpec, frequencies: Array, head_dim: int) -> Array:
    """Between two dimensions the frequencies go over from kept to interpolated."""

    def dimension(rotations: float) -> float:
        turned = rope.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(turned) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    mixed: Array = (frequencies / rope.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)
    return mixed
