"""The decoder graph of a ModelSpec: one builder, driven by the spec's data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from pronk.graph.ir import Attr, Graph, Op, Ref, Value, Weight
from pronk.graph.rope import FREQUENCIES, KEY_CENTER
from pronk.spec import LayerSpec, ModelSpec

__all__ = ["build_decoder"]


@dataclass
class _Builder:
    spec: ModelSpec
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
        factor: float = 1.0,
        **attrs: Attr,
    ) -> str:
        if factor != 1:
            attrs["scale"] = factor
        self.values[output] = Value(output, rows, width)
        self.ops.append(Op(kind, tuple(Ref(i) for i in inputs), output, weights, attrs))
        return output

    def linear(
        self, x: str, module: str, rows: int, cols: int, output: str, bias: bool = False,
        scale: float = 1.0,
    ) -> str:  # fmt: skip
        weights = [self.weight(f"{module}.weight", rows, cols)]
        if bias:
            weights.append(self.weight(f"{module}.bias", 1, rows))
        return self.op("matmul", (x,), output, rows, tuple(weights), cols=cols, factor=scale)

    def norm(self, x: str, module: str, output: str, rows: str = "T") -> str:
        width = self.spec.hidden_size
        weight = self.weight(f"{module}.weight", 1, width)
        kind = f"{self.spec.norm}_norm"
        return self.op(kind, (x,), output, width, (weight,), rows, eps=self.spec.norm_eps)


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
    b = _Builder(spec, dtype_of)
    hidden = spec.hidden_size
    table = b.weight("model.embed_tokens.weight", spec.vocab_size, hidden)
    x = b.op("embed", (), "embed", hidden, (table,), factor=spec.embedding_scale)
    used = sorted({layer.rope for layer in spec.layers if layer.rope is not None})
    for rope in used:
        frequencies = b.weight(f"{FREQUENCIES}.{rope}", 1, spec.head_dim // 2)
        b.op("rope_table", (), f"angles.{rope}", spec.head_dim, (frequencies,),
             factor=spec.ropes[rope].attention_factor)  # fmt: skip
    for i, layer in enumerate(spec.layers):
        at = f"model.layers.{i if layer.weights is None else layer.weights}"
        x = _attention(b, layer, i, at, x)
        x = _mlp(b, layer, i, at, x)
    x = b.op("gather", (x,), "last", hidden, rows="R")
    x = b.norm(x, "model.norm", "final", rows="R")
    head = table
    if not spec.tie_embeddings:
        head = b.weight("lm_head.weight", spec.vocab_size, hidden)
    x = b.op("matmul", (x,), "logits", spec.vocab_size, (head,), "R", cols=hidden,
             factor=spec.logit_scale)  # fmt: skip
    if spec.logit_softcap:
        x = b.op("softcap", (x,), "capped", spec.vocab_size, rows="R", cap=spec.logit_softcap,
                 inplace=True)  # fmt: skip
    graph = Graph(tuple(b.ops), b.values, b.weights, x)
    graph.check()
    return graph


def _attention(b: _Builder, layer: LayerSpec, i: int, at: str, x: str) -> str:
    spec = b.spec
    dim, hidden, attn = spec.head_dim, spec.hidden_size, f"{at}.self_attn"
    widths = {"q": spec.num_heads * dim, "k": spec.num_kv_heads * dim}
    h = b.norm(x, f"{at}.input_layernorm", f"{i}.norm1")
    parts = {
        name: b.linear(h, f"{attn}.{name}_proj", widths.get(name, widths["k"]), hidden,
                       f"{i}.{name}", spec.attention_bias)
        for name in "qkv"
    }  # fmt: skip
    for name, width in widths.items():
        part, heads = parts[name], width // dim
        if layer.qk_norm in ("head", "full"):
            groups = heads if layer.qk_norm == "head" else 1
            weight = b.weight(f"{attn}.{name}_norm.weight", 1, width // groups)
            part = b.op("head_norm", (part,), f"{i}.{name}_norm", width, (weight,), heads=groups,
                        eps=spec.norm_eps)  # fmt: skip
        if layer.rope is not None:
            part = b.op("rope", (part, f"angles.{layer.rope}"), f"{i}.{name}_rope", width,
                        heads=heads)  # fmt: skip
        if layer.qk_norm == "l2":
            part = b.op("head_norm", (part,), f"{i}.{name}_unit", width, heads=heads,
                        eps=spec.norm_eps)  # fmt: skip
        parts[name] = part
    attrs: dict[str, Attr] = {"layer": i, "heads": spec.num_heads}
    attrs["scale"] = spec.attention_scale or 1.0 / math.sqrt(dim)
    if layer.attention != "global":
        attrs |= {"window": layer.window, "chunked": layer.attention == "chunked"}
        attrs |= {"sinks": layer.sinks} if layer.sinks else {}
    if spec.attention_softcap:
        attrs["softcap"] = spec.attention_softcap
    if spec.alibi:
        attrs["alibi"] = spec.alibi
    if spec.query_growth and layer.rope is None:
        attrs["growth"], attrs["growth_span"] = spec.query_growth
    center: tuple[str, ...] = ()
    if spec.attention_bias and not layer.qk_norm and not spec.attention_softcap:
        center = (b.weight(f"{KEY_CENTER}.{i}", 1, widths["k"]),)
    a = b.op("attention", tuple(parts.values()), f"{i}.attn", widths["q"], center)
    b.ops[-1] = b.ops[-1].with_attrs(**attrs)
    o = b.linear(a, f"{attn}.o_proj", hidden, widths["q"], f"{i}.o", spec.output_bias,
                 spec.residual_scale)  # fmt: skip
    if spec.post_norms:
        o = b.norm(o, f"{at}.post_attention_layernorm", f"{i}.post1")
    return b.op("add", (x, o), f"{i}.x1", hidden)


def _mlp(b: _Builder, layer: LayerSpec, i: int, at: str, x: str) -> str:
    spec = b.spec
    before = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    h = b.norm(x, f"{at}.{before}", f"{i}.norm2")
    if layer.mlp == "moe":
        d = _experts(b, i, f"{at}.mlp", h)
    else:
        d = _feed_forward(b, f"{at}.mlp", f"{i}", spec.intermediate_size, h, layer.mlp == "gated",
                          layer.mlp_threshold)  # fmt: skip
    if spec.post_norms:
        d = b.norm(d, f"{at}.post_feedforward_layernorm", f"{i}.post2")
    return b.op("add", (x, d), f"{i}.x2", spec.hidden_size)


def _feed_forward(
    b: _Builder, at: str, name: str, width: int, h: str, gated: bool, threshold: float = 0.0
) -> str:
    spec = b.spec
    projections = ("gate", "up") if gated else ("up",)
    inputs = tuple(
        b.linear(h, f"{at}.{p}_proj", width, spec.hidden_size, f"{name}.{p}") for p in projections
    )
    m = b.op("activate", inputs, f"{name}.act", width, fn=spec.activation)
    if threshold:
        b.ops[-1] = b.ops[-1].with_attrs(threshold=threshold)
    return b.linear(m, f"{at}.down_proj", spec.hidden_size, width, f"{name}.down",
                    scale=spec.residual_scale)  # fmt: skip


def _experts(b: _Builder, i: int, at: str, h: str) -> str:
    spec, moe = b.spec, b.spec.moe
    if moe is None:
        raise ValueError(f"layer {i} has experts, but the spec has no sizes of them")
    hidden, width, rows = spec.hidden_size, moe.intermediate_size, moe.experts
    logits = b.linear(h, f"{at}.router", rows, hidden, f"{i}.router")
    routes = b.op("route", (logits,), f"{i}.routes", 2 * moe.top_k, top_k=moe.top_k,
                  experts=rows, score=moe.score, normalize=moe.normalize,
                  threshold=moe.threshold, least=moe.least)  # fmt: skip
    weights = (
        b.weight(f"{at}.experts.gate_proj.weight", rows * width, hidden),
        b.weight(f"{at}.experts.up_proj.weight", rows * width, hidden),
        b.weight(f"{at}.experts.down_proj.weight", rows * hidden, width),
    )
    d = b.op("experts", (h, routes), f"{i}.experts", hidden, weights, experts=rows,
             top_k=moe.top_k, fn=spec.activation, scales_input=moe.scales_input,
             factor=spec.residual_scale)  # fmt: skip
    if not moe.shared_size:
        return d
    shared = _feed_forward(b, f"{at}.shared", f"{i}.shared", moe.shared_size, h, gated=True)
    return b.op("add", (d, shared), f"{i}.moe", hidden)
