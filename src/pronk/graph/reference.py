"""The NumPy interpreter: what every op means, in plain arithmetic, for any graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.graph.ir import Graph, Op
from pronk.graph.pack import ACT_RANGE, GROUP

__all__ = ["Reference", "alibi_slopes", "fake_quantize", "normed"]

Array = NDArray[Any]


def fake_quantize(x: Array, steps: int, group: int = GROUP) -> Array:
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


def _unit(x: Array, op: Op) -> Array:
    """Rows divided by their root mean square."""
    mean = np.mean(x * x, -1, keepdims=True)
    result: Array = x / np.sqrt(mean + np.float32(op.attrs["eps"]))
    return result


def normed(op: Op, x: Array, weight: Array) -> Array:
    """What an op of kind ``rms_norm`` or ``layer_norm`` makes of rows."""
    if op.kind == "layer_norm":
        x = x - x.mean(-1, keepdims=True)
    result: Array = weight * _unit(x, op)
    return result


def _scaled(op: Op, x: Array) -> Array:
    result: Array = x * np.float32(op.attrs["scale"]) if "scale" in op.attrs else x
    return result


def _erf(x: Array) -> Array:
    result: Array = np.vectorize(math.erf, otypes=[np.float64])(x)
    return result


_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def alibi_slopes(heads: int, most: float) -> Array:
    """What a position further back costs each head's scores (arXiv:2108.12409), float32 [heads].

    A number of heads that is no power of two takes every other slope of the next power.
    """
    if not most:
        return np.zeros(heads, np.float32)
    power = 1 << math.ceil(math.log2(heads))
    slopes = 2.0 ** -(np.arange(1, power + 1) * most / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def _seen(op: Op, position: int) -> list[int]:
    """The positions that one attends to."""
    window = int(op.attrs.get("window", 0))
    if not window:
        return list(range(position + 1))
    chunked = op.attrs.get("chunked", False)
    first = position // window * window if chunked else max(0, position - window + 1)
    sinks = min(int(op.attrs.get("sinks", 0)), first)
    return [*range(sinks), *range(first, position + 1)]


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
        steps = ACT_RANGE.get(self.graph.values[op.output].dtype)
        if steps:
            result = fake_quantize(result, steps)
        return np.asarray(result, dtype=np.float32)

    def _embed(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return _scaled(op, w[0][self._ids])

    def _rope_table(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        angles = np.asarray(self._positions, np.float32)[:, None] * w[0]
        return _scaled(op, np.concatenate([np.cos(angles), np.sin(angles)], 1))

    def _rms_norm(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        out = normed(op, x[0], w[0])
        return out + x[1] if len(x) > 1 else out

    def _layer_norm(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return normed(op, x[0], w[0])

    def _head_norm(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        heads = x[0][:, :width].reshape(len(x[0]), op.integer("heads"), -1)
        out = _unit(heads, op)
        return (out * w[0] if w else out).reshape(-1, width)

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
        out = _scaled(op, np.concatenate(parts, 1))
        return out + x[1][:, : out.shape[1]] if len(x) > 1 else out

    def _head(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        """All logits: those that may be left out are minus infinity nowhere."""
        return _scaled(op, x[0][:, : op.integer("cols")] @ w[0].T)

    def _rope(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        return _rotate(x[0][:, :width], x[1], op.integer("heads"))

    def _rope_store(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        heads, kv_heads, dim = op.integer("heads"), op.integer("kv_heads"), op.integer("head_dim")
        ends = (heads * dim, (heads + kv_heads) * dim, (heads + 2 * kv_heads) * dim)
        parts = [x[0][:, : ends[0]], x[0][:, ends[0] : ends[1]]]
        norm = op.attrs.get("qk_norm", "")
        for i, count in enumerate((heads, kv_heads)):
            if norm in ("head", "full"):
                grouped = parts[i].reshape(len(x[0]), count if norm == "head" else 1, -1)
                parts[i] = (_unit(grouped, op) * w[i]).reshape(parts[i].shape)
            if len(x) > 1:
                parts[i] = _rotate(parts[i], x[1], count)
            if norm == "l2":
                grouped = parts[i].reshape(len(x[0]), count, -1)
                parts[i] = _unit(grouped, op).reshape(parts[i].shape)
        if op.attrs.get("centered"):
            parts[1] = parts[1] - w[-1]
        v = x[0][:, ends[1] : ends[2]]
        self._store(op.integer("layer"), parts[1], v, kv_heads)
        return np.concatenate([*parts, v], 1)

    def _workspace(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return np.zeros((len(self._ids), self.graph.values[op.output].width), np.float32)

    def _attend(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
        dim = self.graph.values[op.output].width // heads
        slopes = alibi_slopes(heads, float(op.attrs.get("alibi", 0))).reshape(kv_heads, -1, 1)
        cap = np.float32(op.attrs.get("softcap", 0))
        out = np.empty((len(self._ids), heads, dim), np.float32)
        for t, (position, sequence) in enumerate(
            zip(self._positions, self._sequences, strict=True)
        ):
            keys, values = self._cache[op.integer("layer"), sequence]
            seen = _seen(op, position)
            k, v = np.stack([keys[p] for p in seen]), np.stack([values[p] for p in seen])
            q = x[0][t, : heads * dim].reshape(kv_heads, heads // kv_heads, dim)
            if "growth" in op.attrs:
                spans = (position + 1) // op.integer("growth_span")
                q = q * np.float32(1 + float(op.attrs["growth"]) * np.log1p(spans))
            scores = np.einsum("hgd,phd->hgp", q, k) * np.float32(op.attrs["scale"])
            if cap:
                scores = cap * np.tanh(scores / cap)
            scores = scores + slopes * (np.array(seen, np.float32) - position)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            out[t] = np.einsum("hgp,phd->hgd", p, v).reshape(heads, dim)
        return out.reshape(len(self._ids), -1)

    def _attention(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        heads = op.integer("heads")
        dim = self.graph.values[op.output].width // heads
        kv_heads = self.graph.values[op.inputs[1].value].width // dim
        k = x[1] - w[0] if w else x[1]
        self._store(op.integer("layer"), k, x[2][:, : kv_heads * dim], kv_heads)
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

    def _activate(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        out = _ACTIVATIONS[str(op.attrs["fn"])](x[0][:, :width])
        if len(x) > 1:
            out = out * x[1][:, :width]
        small = np.abs(out) < np.float32(op.attrs.get("threshold", 0))
        result: Array = np.where(small, 0, out)
        return result

    def _softcap(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        cap = np.float32(op.attrs["cap"])
        result: Array = cap * np.tanh(x[0] / cap)
        return result

    def _route(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        """The chosen experts, the likeliest first, -1 where fewer are; then their weights."""
        logits, most = x[0][:, : op.integer("experts")].astype(np.float64), op.integer("top_k")
        out = np.zeros((len(logits), 2 * most), np.float32)
        for t, row in enumerate(logits):
            scores = 1 / (1 + np.exp(-row))
            if op.attrs["score"] == "softmax":
                scores = np.exp(row - row.max())
                scores /= scores.sum()
            best = np.argsort(-row, kind="stable")[:most]
            weights, count = scores[best], most
            if float(op.attrs["threshold"]) < 1:
                reached = np.cumsum(weights) >= float(op.attrs["threshold"]) * scores.sum()
                count = max(
                    op.integer("least"), int(reached.argmax()) + 1 if reached.any() else most
                )
            weights[count:] = 0
            if op.attrs["normalize"]:
                weights = weights / weights.sum()
            out[t, :most], out[t, most:] = best, weights
            out[t, count:most] = -1
        return out

    def _experts(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        experts, most = op.integer("experts"), op.integer("top_k")
        hidden = self.graph.values[op.output].width
        gate, up, down = (m.reshape(experts, -1, m.shape[1]) for m in w)
        act, steps = _ACTIVATIONS[str(op.attrs["fn"])], ACT_RANGE.get(str(op.attrs.get("between")))
        out = np.zeros((len(x[0]), hidden), np.float32)
        for t, row in enumerate(x[1]):
            for expert, weight in zip(row[:most].astype(int), row[most:], strict=True):
                if expert < 0:
                    continue
                h = x[0][t, : gate.shape[2]]
                inner, outer = (weight, 1) if op.attrs["scales_input"] else (1, weight)
                m = act(inner * (gate[expert] @ h)) * (inner * (up[expert] @ h))
                m = fake_quantize(m[None].astype(np.float32), steps)[0] if steps else m
                out[t] += outer * (down[expert] @ m)
        out = _scaled(op, out)
        return out + x[2][:, :hidden] if len(x) > 2 else out

    def _dispatch(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        """Token, choice and expert of each row, in the order of the experts."""
        most = op.integer("top_k")
        chosen = x[0][:, :most].astype(int)
        pairs = [(t, j) for t in range(len(chosen)) for j in range(most) if chosen[t, j] >= 0]
        pairs.sort(key=lambda pair: chosen[pair])
        return np.array([(t, j, chosen[t, j]) for t, j in pairs])

    def _expert_gather(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        result: Array = x[0][x[1][:, 0].astype(int), :width]
        return result

    def _expert_matmul(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        experts = [m.reshape(op.integer("experts"), -1, m.shape[1]) for m in w]
        rows, chosen = x[0][:, : op.integer("cols")], x[1][:, 2].astype(int)
        out = np.empty((len(rows), self.graph.values[op.output].width), np.float32)
        for expert in np.unique(chosen):
            of = chosen == expert
            out[of] = np.concatenate([rows[of] @ m[expert].T for m in experts], 1)
        return out

    def _expert_activate(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        gate, up, routes, plan = x[0][:, :width], x[1][:, :width], x[2], x[3].astype(int)
        if op.attrs["scales_input"]:
            weights = routes[plan[:, 0], op.integer("top_k") + plan[:, 1], None]
            gate, up = weights * gate, weights * up
        result: Array = _ACTIVATIONS[str(op.attrs["fn"])](gate) * up
        return result

    def _combine(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        y, routes, plan = x[0], x[1], x[2].astype(int)
        width = self.graph.values[op.output].width
        out = np.zeros((len(routes), width), np.float32)
        for row in np.argsort(plan[:, 1], kind="stable"):
            token, choice = plan[row, :2]
            weight = routes[token, op.integer("top_k") + choice]
            out[token] += (1 if op.attrs["scales_input"] else weight) * y[row, :width]
        out = _scaled(op, out)
        return out + x[3][:, :width] if len(x) > 3 else out

    def _add(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        width = self.graph.values[op.output].width
        return x[0][:, :width] + x[1][:, :width]

    def _gather(self, op: Op, x: list[Array], w: list[Array]) -> Array:
        return x[0][self._rows]
