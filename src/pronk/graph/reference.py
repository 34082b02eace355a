"""The NumPy interpreter: what every op means, in plain arithmetic, for any graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.graph.ir import Graph, Op
from pronk.graph.pack import ACT_RANGE, GROUP

__all__ = ["Reference", "fake_quantize"]

Array = NDArray[Any]


def fake_quantize(x: Array, steps: int = ACT_RANGE, group: int = GROUP) -> Array:
    """Round each group of a row to whole multiples of max|x| / steps, in float32."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    top = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(steps), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(groups * inverse)
    result: Array = (q * (top / np.float32(steps))).reshape(x.shape).astype(np.float32)
    return result


def _rotate(x: Array, angles: Array, heads: int) -> Array:
    tokens, half = x.shape[0], angles.shape[1] // 2
    cos, sin = angles[:, None, :half], angles[:, None, half:]
    parts = x.reshape(tokens, heads, 2, half)
    a, b = parts[:, :, 0], parts[:, :, 1]
    return np.stack([a * cos - b * sin, b * cos + a * sin], 2).reshape(tokens, -1)


class Reference:
    """Runs a graph step by step, with its own KV cache.

    Parameters
    ----------
    graph : Graph
        Before or after any passes.
    weights : Mapping[str, ndarray]
        float32 arrays by canonical name: matrices [rows, cols], vectors [cols].
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Array]) -> None:
        self.graph = graph
        self.weights = weights
        self._cache: dict[tuple[int, int], tuple[list[Array], list[Array]]] = {}

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        rows: Sequence[int],
    ) -> Array:
        """Run one step and return the logits of the given token rows, [rows, vocab].

        A sequence's tokens must come in the order of their positions.
        """
        self._ids, self._positions, self._sequences = list(ids), list(positions), list(sequences)
        self._rows = list(rows)
        values: dict[str, Array] = {}
        for op in self.graph.ops:
            values[op.output] = self._apply(op, values)
        return values[self.graph.output]

    def _apply(self, op: Op, values: Mapping[str, Array]) -> Array:
        x = [values[ref.value][:, ref.column :] for ref in op.inputs]
        w = [self.weights[name] for name in op.weights]
        result = getattr(self, f"_{op.kind}")(op, x, w)
        if self.graph.values[op.output].quantized:
            result = fake_quantize(result)
        return np.asarray(result, dtype=np.float32)

    def _embed(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return w[0][self._ids]

    def _rope_table(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        angles = np.asarray(self._positions, np.float32)[:, None] * w[0]
        return np.concatenate([np.cos(angles), np.sin(angles)], 1)

    def _rms_norm(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        mean = np.mean(x[0] * x[0], -1, keepdims=True)
        result: Array = w[0] * (x[0] / np.sqrt(mean + np.float32(op.attrs["eps"])))
        return result

    def _quantize(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return x[0][:, : self.graph.values[op.output].width]

    def _matmul(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        cols = op.integer("cols")
        parts: list[Array] = []
        for name, weight in zip(op.weights, w, strict=True):
            if self.graph.weights[name].rows == 1:
                parts[-1] = parts[-1] + weight
            else:
                parts.append(x[0][:, :cols] @ weight.T)
        out = np.concatenate(parts, 1)
        residual: Array | float = x[1][:, : out.shape[1]] if len(x) > 1 else 0.0
        result: Array = out + residual
        return result

    def _rope(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        return _rotate(x[0][:, :width], x[1], op.integer("heads"))

    def _rope_store(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        heads, kv_heads, dim = op.integer("heads"), op.integer("kv_heads"), x[1].shape[1]
        cut = (heads + kv_heads) * dim
        rotated = _rotate(x[0][:, :cut], x[1], heads + kv_heads)
        out = np.concatenate([rotated, x[0][:, cut : cut + kv_heads * dim]], 1)
        self._store(op.integer("layer"), out[:, heads * dim : cut], out[:, cut:], kv_heads)
        return out

    def _workspace(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return np.zeros((len(self._ids), self.graph.values[op.output].width), np.float32)

    def _attend(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
        dim = self.graph.values[op.output].width // heads
        out = np.empty((len(self._ids), heads, dim), np.float32)
        for t, (position, sequence) in enumerate(
            zip(self._positions, self._sequences, strict=True)
        ):
            keys, values = self._cache[op.integer("layer"), sequence]
            k, v = np.stack(keys[: position + 1]), np.stack(values[: position + 1])
            q = x[0][t, : heads * dim].reshape(kv_heads, heads // kv_heads, dim)
            scores = np.einsum("hgd,phd->hgp", q, k) * np.float32(op.attrs["scale"])
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            out[t] = np.einsum("hgp,phd->hgd", p, v).reshape(heads, dim)
        return out.reshape(len(self._ids), -1)

    def _attention(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        heads = op.integer("heads")
        dim = self.graph.values[op.output].width // heads
        kv_heads = self.graph.values[op.inputs[1].value].width // dim
        self._store(op.integer("layer"), x[1], x[2][:, : kv_heads * dim], kv_heads)
        return self._attend(op.with_attrs(kv_heads=kv_heads), x, w)

    def _store(self, layer: int, k: Array, v: Array, kv_heads: int) -> None:
        for t, (position, sequence) in enumerate(
            zip(self._positions, self._sequences, strict=True)
        ):
            keys, values = self._cache.setdefault((layer, sequence), ([], []))
            if position > len(keys):
                raise ValueError(f"position {position} follows {len(keys)} cached positions")
            keys[position:] = [k[t].reshape(kv_heads, -1)]
            values[position:] = [v[t].reshape(kv_heads, -1)]

    def _silu_mul(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        gate, up = x[0][:, :width], x[1][:, :width]
        result: Array = gate / (1 + np.exp(-gate)) * up
        return result

    def _add(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        return x[0][:, :width] + x[1][:, :width]

    def _gather(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return x[0][self._rows]
