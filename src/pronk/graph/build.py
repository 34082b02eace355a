"""The decoder graph of a ModelSpec: one builder, driven by the spec's data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pronk.graph.ir import Attr, Graph, Op, Ref, Value, Weight
from pronk.spec import ModelSpec, RopeSpec

__all__ = ["FREQUENCIES", "build_decoder", "rope_frequencies"]

FREQUENCIES = "rope.frequencies"  # a weight computed from the spec, not read from the checkpoint


def rope_frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """Radians per position of each rotated pair, float32 [head_dim / 2].

    The ``llama3`` rule is that of Llama 3.1: wavelengths beyond the original context over
    ``low_freq_factor`` are stretched by ``factor``, short ones kept, the rest blended.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(rope.theta), exponents)).astype(np.float32)
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low = rope.original_context / rope.low_freq_factor
        high = rope.original_context / rope.high_freq_factor
        smooth = (rope.original_context / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        frequencies = np.where(
            wavelengths > low,
            frequencies / rope.factor,
            np.where(wavelengths < high, frequencies, blended),
        )
    elif rope.kind != "default":
        raise ValueError(f"unknown rope kind {rope.kind!r}")
    result: NDArray[np.float32] = frequencies.astype(np.float32)
    return result


@dataclass
class _Builder:
    dtype_of: Callable[[str], str]
    ops: list[Op] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)

    def weight(self, name: str, rows: int, cols: int) -> str:
        dtype = "f32" if rows == 1 else self.dtype_of(name)
        self.weights[name] = Weight(name, rows, cols, dtype)
        return name

    def op(
        self,
        kind: str,
        inputs: tuple[str, ...],
        output: str,
        width: int,
        weights: tuple[str, ...] = (),
        rows: str = "T",
        **attrs: Attr,
    ) -> str:
        self.values[output] = Value(output, rows, width)
        self.ops.append(Op(kind, tuple(Ref(i) for i in inputs), output, weights, attrs))
        return output

    def linear(
        self, x: str, module: str, rows: int, cols: int, output: str, bias: bool = False
    ) -> str:
        weights = [self.weight(f"{module}.weight", rows, cols)]
        if bias:
            weights.append(self.weight(f"{module}.bias", 1, rows))
        return self.op("matmul", (x,), output, rows, tuple(weights), cols=cols)


def build_decoder(spec: ModelSpec, dtype_of: Callable[[str], str]) -> Graph:
    """Build the graph of a decoder before any pass.

    Parameters
    ----------
    spec : ModelSpec
    dtype_of : callable
        Runtime format of a matrix by its canonical name.

    Returns
    -------
    Graph
        Its output is ``logits`` [R, vocab].
    """
    b = _Builder(dtype_of)
    hidden, dim = spec.hidden_size, spec.head_dim
    q_width, kv_width = spec.num_heads * dim, spec.num_kv_heads * dim
    scale = 1.0 / math.sqrt(dim)

    table = b.weight("model.embed_tokens.weight", spec.vocab_size, hidden)
    x = b.op("embed", (), "embed", hidden, (table,))
    b.weight(FREQUENCIES, 1, dim // 2)
    angles = b.op("rope_table", (), "angles", dim, (FREQUENCIES,))

    def norm(x: str, name: str, output: str, rows: str = "T") -> str:
        weight = b.weight(name, 1, hidden)
        return b.op("rms_norm", (x,), output, hidden, (weight,), rows, eps=spec.norm_eps)

    for i in range(spec.num_layers):
        at, attn = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        bias = spec.attention_bias
        h = norm(x, f"{at}.input_layernorm.weight", f"{i}.norm1")
        q = b.linear(h, f"{attn}.q_proj", q_width, hidden, f"{i}.q", bias)
        k = b.linear(h, f"{attn}.k_proj", kv_width, hidden, f"{i}.k", bias)
        v = b.linear(h, f"{attn}.v_proj", kv_width, hidden, f"{i}.v", bias)
        q = b.op("rope", (q, angles), f"{i}.q_rope", q_width, heads=spec.num_heads)
        k = b.op("rope", (k, angles), f"{i}.k_rope", kv_width, heads=spec.num_kv_heads)
        a = b.op("attention", (q, k, v), f"{i}.attn", q_width, layer=i, heads=spec.num_heads,
                 scale=scale)  # fmt: skip
        o = b.linear(a, f"{attn}.o_proj", hidden, q_width, f"{i}.o", spec.output_bias)
        x = b.op("add", (x, o), f"{i}.x1", hidden)
        h = norm(x, f"{at}.post_attention_layernorm.weight", f"{i}.norm2")
        width = spec.intermediate_size
        gate = b.linear(h, f"{at}.mlp.gate_proj", width, hidden, f"{i}.gate")
        up = b.linear(h, f"{at}.mlp.up_proj", width, hidden, f"{i}.up")
        m = b.op("silu_mul", (gate, up), f"{i}.act", width)
        d = b.linear(m, f"{at}.mlp.down_proj", hidden, width, f"{i}.down")
        x = b.op("add", (x, d), f"{i}.x2", hidden)

    x = b.op("gather", (x,), "last", hidden, rows="R")
    x = norm(x, "model.norm.weight", "final", rows="R")
    head = table
    if not spec.tie_embeddings:
        head = b.weight("lm_head.weight", spec.vocab_size, hidden)
    logits = b.op("matmul", (x,), "logits", spec.vocab_size, (head,), rows="R", cols=hidden)
    graph = Graph(tuple(b.ops), b.values, b.weights, logits)
    graph.check()
    return graph
