"""Static ranges of activations: one scale for every token, set once on calibration text.

Four ways to set the range of a matrix's input, from a histogram of its magnitudes: the largest;
the one that all but 1 in 10,000 are in; of least squared error; of least KL divergence between the
histogram and itself in 128 steps (Migacz 2017, "8-bit inference with TensorRT"). Pronk's own
kernels take a scale from each token's groups of 32 as they run and have no use for these; other
engines that read ``compressed-tensors`` do. `losses` measures what static ranges cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.compress.calibrate import batches
from pronk.compress.forward import Decoder, embedded
from pronk.compress.layers import read_floats
from pronk.evaluate.windows import log_normalizer
from pronk.graph.ir import Op
from pronk.graph.pack import ACT_RANGE, GROUP
from pronk.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OBSERVERS", "Histogram", "Rounding", "by_group", "by_token", "losses", "observe",
           "with_scales"]  # fmt: skip

OBSERVERS = ("minmax", "percentile", "mse", "entropy")
_TOP = 127  # largest integer of a rounded activation
_BINS = 4096
_LEVELS = 128  # of a histogram that is compared with itself, magnitudes alone
_INSIDE = 0.9999

Rounding = Callable[[str, "Tensor"], "Tensor"]
"""``(matrix, its input)`` to the input as it is multiplied, both [..., tokens, cols]."""


class Histogram:
    """Counts of magnitudes in bins of one width, from zero on; the width doubles as they grow."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS)
        self.width = self.largest = 0.0

    def add(self, x: Tensor) -> None:
        """Count the elements of a tensor."""
        import torch

        top = float(x.abs().max())
        self.largest = max(self.largest, top)
        if top and not self.width:
            self.width = top / _BINS
        while top > self.width * _BINS:
            self.counts[: _BINS // 2] = self.counts.reshape(-1, 2).sum(1)
            self.counts[_BINS // 2 :] = 0
            self.width *= 2
        if self.width:
            found = torch.histc(x.abs().float(), _BINS, 0, self.width * _BINS)
            self.counts += found.double().numpy()

    def scale(self, how: str) -> float:
        """The scale of int8 by one of `OBSERVERS`; 1 where nothing but zeros was seen."""
        if not self.largest:
            return 1.0
        if how == "minmax":
            return self.largest / _TOP
        if how == "percentile":
            inside = np.cumsum(self.counts) >= _INSIDE * self.counts.sum()
            return min(self.largest, float(inside.argmax() + 1) * self.width) / _TOP
        used = int(self.counts.nonzero()[0][-1]) + 1
        ends = np.unique(np.linspace(min(_LEVELS, used), used, 256).astype(int))
        error = {"mse": self._squared_error, "entropy": self._divergence}[how]
        best = min(ends, key=lambda end: error(int(end)))
        return min(self.largest, float(best) * self.width) / _TOP

    def _squared_error(self, end: int) -> float:
        values = (np.arange(_BINS) + 0.5) * self.width
        scale = end * self.width / _TOP
        rounded = np.minimum(np.round(values / scale), _TOP) * scale
        return float((self.counts * (rounded - values) ** 2).sum())

    def _divergence(self, end: int) -> float:
        """KL of what is in the first `end` bins, the rest counted in the last, from its steps."""
        inside = self.counts[:end]
        p = inside.copy()
        p[-1] += self.counts[end:].sum()
        level = np.arange(end) * _LEVELS // end
        held = inside > 0
        total = np.bincount(level, inside, _LEVELS)
        bins = np.maximum(np.bincount(level, held, _LEVELS), 1)
        q = np.where(held, (total / bins)[level], 0)
        if not q.sum() or (p[~held] > 0).any():
            return float("inf")
        p, q = p[held] / p.sum(), q[held] / q.sum()
        return float((p * np.log(p / q)).sum())


def observe(of: Checkpoint, decoder: Decoder, windows: NDArray[np.int64]) -> dict[str, Histogram]:
    """Histograms of what each matrix of a checkpoint is multiplied with, by its name.

    Matrices that share their input share its histogram.
    """
    import torch

    found: dict[str, Histogram] = {}
    last = len(decoder.layers)
    with torch.no_grad():
        x = embedded(of, decoder, windows)
        for layer in range(last + 1):
            stages = {stage[0]: stage for stage in decoder.matrices(layer)}
            names = decoder.names(layer)
            head = "" if layer < last else next(iter(stages))  # its logits are of no use here

            def look(name: str, inputs: Tensor, stages: dict[str, list[str]] = stages) -> None:
                for one in stages[name]:
                    found.setdefault(one, found.get(name) or Histogram())
                found[name].add(inputs)

            weights = read_floats(of, [name for name in names if name != head])
            parts = [decoder.run(layer, part, weights, look, head) for _, part in batches(x)]
            x = torch.cat(parts)
    return found


def with_scales(scales: Mapping[str, float]) -> Rounding:
    """Inputs in int8 with the scale of their matrix."""

    def rounding(name: str, x: Tensor) -> Tensor:
        rounded: Tensor = (x / scales[name]).round().clamp(-_TOP - 1, _TOP) * scales[name]
        return rounded

    return rounding


def by_token(_: str, x: Tensor) -> Tensor:
    """Inputs in int8, with a scale for each token as it comes."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / _TOP
    rounded: Tensor = (x / scale).round() * scale
    return rounded


def by_group(_: str, x: Tensor) -> Tensor:
    """Inputs as Pronk's kernels round them: 12 bits, a scale for each 32 elements of a token."""
    parts = x.unflatten(-1, (-1, GROUP))
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / ACT_RANGE["a12"]
    rounded: Tensor = ((parts / scale).round() * scale).flatten(-2)
    return rounded


class _Rounded(Decoder):
    """A decoder whose matrices are multiplied with rounded inputs."""

    def __init__(self, spec: ModelSpec, rounding: Rounding) -> None:
        super().__init__(spec)
        self._rounding = rounding

    def _apply(self, op: Op, x: list[Tensor], w: list[Tensor]) -> Tensor:
        if op.kind == "matmul":
            x = [self._rounding(op.weights[0], x[0]), *x[1:]]
        return super()._apply(op, x, w)


def losses(
    of: Checkpoint, windows: NDArray[np.int64], roundings: Mapping[str, Rounding]
) -> dict[str, dict[str, float]]:
    """What rounding the inputs of all matrices costs: their weights stay as the checkpoint's.

    Parameters
    ----------
    of : Checkpoint
    windows : int64 [windows, tokens]
        Of text that the ranges were not set on.
    roundings : Mapping
        By the names they have in the result.

    Returns
    -------
    dict
        ``kl`` in nats a token from the model without rounding, ``top1_agreement`` and
        ``perplexity``; of the model itself under ``exact``.
    """
    import torch

    exact = Decoder(of.spec)
    decoders = {"exact": exact} | {name: _Rounded(of.spec, r) for name, r in roundings.items()}
    last, sums = of.spec.num_layers, {name: np.zeros(3) for name in decoders}
    with torch.no_grad():
        x = dict.fromkeys(decoders, embedded(of, exact, windows))
        for layer in range(last):
            weights = read_floats(of, exact.names(layer))
            for name, decoder in decoders.items():
                parts = [decoder.run(layer, part, weights) for _, part in batches(x[name])]
                x[name] = torch.cat(parts)
        weights = read_floats(of, exact.names(last))
        for at, ids in enumerate(windows):
            first: NDArray[np.float64] | None = None
            for name, decoder in decoders.items():
                logits = decoder.run(last, x[name][at : at + 1], weights)[0].double().numpy()
                q = logits - log_normalizer(logits)[:, None]
                p = first = q if first is None else first
                nll = -q[np.arange(len(ids) - 1), ids[1:]].mean()
                same = (p.argmax(1) == q.argmax(1)).mean()
                sums[name] += (np.exp(p) * (p - q)).sum(1).mean(), same, nll
    out = {}
    for name, total in sums.items():
        kl, same, nll = total / len(windows)
        out[name] = {"kl": max(0.0, float(kl)), "top1_agreement": float(same),
                     "perplexity": float(np.exp(nll))}  # fmt: skip
    return out
