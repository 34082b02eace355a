"""A GGUF file's metadata to a ModelSpec.

Where llama.cpp fixes something for an architecture rather than write it into the file, the
architecture's row says so, and a key that is there all the same is believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.blocks import dequantize
from pronk.checkpoint.describe import LIMITS, Described, check_experts, describe, every
from pronk.checkpoint.families import ACTIVATIONS, FAMILIES, Family
from pronk.checkpoint.gguf_header import GgufArray, GgufHeader
from pronk.checkpoint.hf_rope import longest_context, yarn_factor
from pronk.checkpoint.io import read_exact
from pronk.checkpoint.values import integer, number, unknown
from pronk.errors import CheckpointError
from pronk.spec import ModelSpec, MoeSpec, RopeSpec

__all__ = ["ROPE_TENSORS", "read_family", "read_spec", "rope_divisors"]

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of rotary frequencies, which are no weights."""

_SCORES = {1: "softmax", 2: "sigmoid"}
_ROPE_TYPES = ("none", "linear", "yarn", "longrope", "llama3 (rope_freqs.weight)")


def read_family(header: GgufHeader) -> Family:
    """The family that a header names."""
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise CheckpointError(f"{header.path} does not name its architecture")
    rows = [family for family in FAMILIES if family.gguf == arch]
    if not rows:
        known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES))
        raise CheckpointError(
            f"{header.path} has the unknown architecture {arch[:80]!r}; Pronk knows {known} "
            f"(the files of Mistral and Mixtral call themselves llama)"
        )
    routed = bool(header.metadata.get(f"{arch}.expert_count", 0))
    return next((row for row in rows if (row.experts is not None) == routed), rows[0])


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata of one architecture."""

    header: GgufHeader
    arch: str

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.arch}.{key}", default)

    def same(self, key: str, default: Any) -> Any:
        """A value that may come once or per layer; layers that differ are refused."""
        value = self.get(key, default)
        if isinstance(value, GgufArray):
            numbers = self.header.numbers(f"{self.arch}.{key}")
            if numbers is None or not len(numbers) or (numbers != numbers[0]).any():
                raise CheckpointError(
                    f"{self.header.path} has layers that differ in {key}, which Pronk does not run"
                )
            value = numbers[0].item()
        return value

    def positive(self, key: str, default: float = 0.0) -> float:
        """A number above zero; where it is none or zero, the default."""
        value = self.get(key)
        return number(self.header.path, key, value, 0, 1e6) if value else default

    def refuse(self, key: str, *allowed: object) -> None:
        """Refuse a value other than those allowed."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(
                f"{self.header.path} gives {key} as {str(value)[:40]}, which Pronk does not run"
            )


def read_spec(header: GgufHeader, family: Family) -> ModelSpec:
    """The model that a file's metadata and tensor table describe."""
    keys, path, tensors = _Keys(header, family.gguf), header.path, header.tensors
    embedding = tensors.get("token_embd.weight")
    hidden = integer(path, "the embedding length", keys.get("embedding_length"), 1, 1 << 20)
    heads = integer(path, "the head count", keys.same("attention.head_count", None), 1, 1 << 14)
    count = integer(path, "the block count", keys.get("block_count"), *LIMITS["num_layers"])
    head_dim = _head_dim(keys, hidden // heads)
    vocab = embedding.shape[0] if embedding else None
    if keys.get("vocab_size", vocab) != vocab:
        raise CheckpointError(
            f"{path} claims {str(keys.get('vocab_size'))[:40]} tokens but embeds {vocab}"
        )
    context = integer(path, "the context length", keys.get("context_length"), 1, 1 << 30)
    rope = _rope(keys, family, context, head_dim)
    local = rope
    if family.local_theta:
        base = keys.get("rope.freq_base_swa", family.local_theta)
        local = RopeSpec(theta=number(path, "rope.freq_base_swa", base, 0, 1e12))
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": keys.same("feed_forward_length", None),
        "num_layers": count,
        "num_heads": heads,
        "num_kv_heads": keys.same("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "context_length": longest_context(context, rope),
    }
    window, windowed = _windows(keys, family, count)
    roped = [not family.alibi] * count
    # A file of Llama 4 that gives its window as zero has rope in all layers.
    if family.nope_period and not (family.chunked and keys.get("attention.sliding_window") == 0):
        roped = [not without for without in every(count, family.nope_period)]
    if family.windows in ("rope", "nope"):
        windowed = [has == (family.windows == "rope") for has in roped]
    moe = _experts(keys, family)
    l2 = family.qk_norm == "l2" and moe is not None and moe.experts == 128
    name = header.metadata.get("general.name")
    return describe(
        path,
        family,
        sizes,
        Described(
            window=window,
            windowed=windowed,
            roped=roped,
            routed=[f"blk.{i}.ffn_gate_inp.weight" in tensors for i in range(count)]
            if moe
            else [False] * count,
            rope=rope,
            local_rope=local,
            moe=moe,
            qk_norm="" if l2 else family.qk_norm,  # llama.cpp's rule for Maverick
            weights=range(count),
        ),
        name=name[:200] if isinstance(name, str) and name else path.stem,
        norm_eps=keys.get(
            "attention.layer_norm_epsilon"
            if family.norm == "layer"
            else "attention.layer_norm_rms_epsilon"
        ),
        tie_embeddings="output.weight" not in tensors,
        attention_bias=family.qkv_bias or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        activation=ACTIVATIONS[_activation(family)],
        **_factors(keys, family, hidden, heads, count, any(windowed) and window > 0),
    )


def _activation(family: Family) -> str:
    return str(family.defaults.get("hidden_activation", family.defaults.get("hidden_act", "silu")))


def _head_dim(keys: _Keys, default: int) -> int:
    given = keys.get("rope.dimension_count", default)
    head_dim = integer(keys.header.path, "the head size", keys.get("attention.key_length", given),
                       *LIMITS["head_dim"])  # fmt: skip
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{keys.header.path} has {key} {str(keys.get(key))[:40]}, but Pronk needs it to "
                f"be the head size {head_dim}"
            )
    return head_dim


def _windows(keys: _Keys, family: Family, count: int) -> tuple[int, list[bool]]:
    """The window, 0 for none, and the layers that have it."""
    path = keys.header.path
    default = family.defaults.get("attention_chunk_size" if family.chunked else "", 0)
    if family.name == "gemma2":
        default = family.defaults["sliding_window"]
    window = keys.get("attention.sliding_window", default)
    window = integer(path, "attention.sliding_window", window, 0, 1 << 31)
    pattern = keys.get("attention.sliding_window_pattern", family.period)
    if isinstance(pattern, GgufArray):
        array = keys.header.numbers(f"{keys.arch}.attention.sliding_window_pattern")
        if array is None or len(array) != count:
            raise CheckpointError(f"{path} has a window pattern that is none of its {count} layers")
        return window, [bool(one) for one in array]
    if family.windows == "pattern":
        pattern = integer(path, "attention.sliding_window_pattern", pattern, 1, 10_000)
        return window, [not whole for whole in every(count, pattern)]
    # llama.cpp knows no window for the first layers alone, and writes Mistral's as Llama's.
    return window, [True] * count


def _experts(keys: _Keys, family: Family) -> MoeSpec | None:
    path, row, count = keys.header.path, family.experts, keys.get("expert_count", 0)
    if not count:
        return None
    if row is None:
        raise CheckpointError(
            f"{path} has experts, which Pronk does not know in a {family.gguf} model"
        )
    keys.refuse("expert_weights_scale", 0, 1)
    gating = keys.get("expert_gating_func") or 0
    if gating not in (0, *_SCORES):
        raise unknown(
            path, "expert_gating_func", gating, (f"{n} ({s})" for n, s in _SCORES.items())
        )
    width = keys.same("expert_feed_forward_length", keys.same("feed_forward_length", 0))
    width = integer(path, "the width of an expert", width, 1, 1 << 22)
    normalize = keys.get("expert_weights_norm")
    shared = keys.get("expert_shared_feed_forward_length", width) if row.shared else 0
    return check_experts(
        path,
        MoeSpec(
            experts=count,
            top_k=keys.get("expert_used_count", 0),
            intermediate_size=width,
            score=_SCORES.get(gating, row.score),
            normalize=normalize if isinstance(normalize, bool) else row.normalize,
            scales_input=row.scales_input,
            shared_size=integer(path, "the width of a shared expert", shared, 0, 1 << 22),
        ),
    )


def _factors(
    keys: _Keys, family: Family, hidden: int, heads: int, count: int, chunks: bool
) -> dict[str, Any]:
    """The spec's factors, caps and slopes."""
    keys.refuse("attention.clamp_kqv", 0)
    keys.refuse("rope.scaling.yarn_log_multiplier", 0)
    scale = keys.positive("attention.scale")
    if not scale and count == family.wide_scale_layers:
        scale = 1 / math.sqrt(hidden / heads)
    out: dict[str, Any] = {
        "attention_scale": scale or None,
        "embedding_scale": keys.positive("embedding_scale", 1.0),
        "residual_scale": keys.positive("residual_scale", 1.0),
        "logit_scale": 1 / keys.positive("logit_scale", 1.0),
    }
    if family.scales_embeddings:
        defaults: Mapping[str, Any] = family.defaults
        out["embedding_scale"] = math.sqrt(hidden)
        out["attention_softcap"] = keys.positive(
            "attn_logit_softcapping", defaults.get("attn_logit_softcapping", 0.0)
        )
        out["logit_softcap"] = keys.positive(
            "final_logit_softcapping", defaults.get("final_logit_softcapping", 0.0)
        )
    if family.alibi:
        out["alibi"] = keys.positive("attention.max_alibi_bias")
        if not out["alibi"]:
            raise CheckpointError(
                f"{keys.header.path} has no linear biases (attention.max_alibi_bias): Pronk does "
                f"not run learned positions"
            )
    if "floor_scale" in family.defaults and chunks:
        span = keys.get("attention.temperature_length", family.defaults["floor_scale"])
        span = integer(keys.header.path, "attention.temperature_length", span, 1, 1 << 30)
        growth = keys.positive("attention.temperature_scale", family.defaults["attn_scale"])
        out["query_growth"] = (growth, span)
    return out


def _rope(keys: _Keys, family: Family, context: int, head_dim: int) -> RopeSpec:
    path = keys.header.path
    theta = keys.get("rope.freq_base", 10000.0)
    theta = number(path, "rope.freq_base", theta, 0, 1e12)
    # Files from before scaling had a type say linear by giving a scale.
    old_factor = keys.get("rope.scale_linear")
    kind = keys.get("rope.scaling.type", "none" if old_factor is None else "linear")
    factor = keys.get("rope.scaling.factor", old_factor or 1.0)
    factor = number(path, "rope.scaling.factor", factor, 0, 1e6)
    stated = keys.get("rope.scaling.original_context_length")
    original = integer(path, "rope.scaling.original_context_length", stated or context, 1, 1 << 30)
    attention = keys.positive("rope.scaling.attn_factor", 1.0)
    if "rope_factors_long.weight" in keys.header.tensors:
        stretch = context / original
        return RopeSpec(
            theta, "longrope", stretch if factor == 1 else factor, original_context=original,
            attention_factor=attention,
            short_factors=tuple(_divisors(keys.header, "rope_factors_short.weight", head_dim)),
            long_factors=tuple(_divisors(keys.header, "rope_factors_long.weight", head_dim)),
        )  # fmt: skip
    if "rope_freqs.weight" in keys.header.tensors:
        return _llama3(keys.header, theta, factor, stated or 8192, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1):
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        attention *= keys.positive("rope.scaling.yarn_attn_factor", 1.0)
        return RopeSpec(
            theta, "yarn", factor, original_context=original,
            attention_factor=attention * yarn_factor(factor),
            beta_fast=keys.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.positive("rope.scaling.yarn_beta_slow", 1.0),
        )  # fmt: skip
    raise unknown(path, "rope type", kind, _ROPE_TYPES)


def _divisors(header: GgufHeader, name: str, head_dim: int) -> list[float]:
    """The divisors in a tensor that is none of the model's."""
    return [float(value) for value in _divisor_array(header, name, head_dim)]


def _divisor_array(header: GgufHeader, name: str, head_dim: int) -> NDArray[np.float32]:
    tensor, path = header.tensors.get(name), header.path
    if tensor is None or tensor.dtype != "f32" or tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{path} has {name} of another shape than its heads call for")
    raw = read_exact(header.fd, tensor.offset, tensor.nbytes, path).reshape(1, -1)
    values: NDArray[np.float32] = dequantize(raw, "f32", head_dim // 2)[0]
    if not (np.isfinite(values) & (values > 0)).all():
        raise CheckpointError(f"{path} has divisors in {name} that are not above zero")
    return values


def _llama3(
    header: GgufHeader, theta: float, factor: float, original: object, head_dim: int
) -> RopeSpec:
    """The parameters of Llama 3.1's rule that give the stored divisors."""
    path = header.path
    stored = _divisor_array(header, "rope_freqs.weight", head_dim)
    if (stored == 1).all():
        return RopeSpec(theta=theta)
    # The file keeps only the result: the slowest frequency shows the factor itself.
    contexts = {8192, integer(path, "rope.scaling.original_context_length", original, 1, 1 << 30)}
    for value in (float(stored[-1]), factor, 8.0, 32.0):
        if not 1 < value <= 1e6:
            continue
        for context in contexts:
            rope = RopeSpec(theta, "llama3", value, 1.0, 4.0, context)
            if np.allclose(stored, rope_divisors(rope, head_dim), rtol=1e-4, atol=0):
                return rope
    raise CheckpointError(
        f"{path} has rotary divisors (rope_freqs.weight) that are not Llama 3.1's, the only "
        f"ones Pronk knows"
    )


def rope_divisors(rope: RopeSpec, head_dim: int) -> list[float]:
    """What Llama 3.1's rule divides each rotary frequency by, [head_dim / 2]."""
    out = []
    for i in range(0, head_dim, 2):
        length = 2 * math.pi * rope.theta ** (i / head_dim)
        turns = rope.original_context / length
        if turns > rope.high_freq_factor:
            out.append(1.0)
        elif turns < rope.low_freq_factor:
            out.append(rope.factor)
        else:
            span = rope.high_freq_factor - rope.low_freq_factor
            smooth = (turns - rope.low_freq_factor) / span
            out.append(1 / ((1 - smooth) / rope.factor + smooth))
    return out
