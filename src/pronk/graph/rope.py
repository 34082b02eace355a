"""Frequencies of rotary embeddings: the ways to stretch them over longer contexts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pronk.spec import ModelSpec, RopeSpec

__all__ = ["FREQUENCIES", "model_frequencies", "rope_frequencies"]

FREQUENCIES = "rope.frequencies"  # weights computed from the spec, not read from the checkpoint

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
