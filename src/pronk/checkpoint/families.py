"""Model families: checked sizes to a ModelSpec, and the tensors such a model must have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronk.checkpoint.base import TensorInfo
from pronk.errors import CheckpointError
from pronk.spec import LayerSpec, ModelSpec, RopeSpec

__all__ = [
    "FAMILIES",
    "Family",
    "build_spec",
    "check_tensors",
    "expected_tensors",
    "integer",
    "number",
    "rope_divisors",
]


@dataclass(frozen=True, slots=True)
class Family:
    """How one family's files differ from the others'. The decoder they describe is the same.

    Parameters
    ----------
    name : str
        Hugging Face's ``model_type``.
    architecture : str
        Hugging Face's class.
    gguf : str
        GGUF's ``general.architecture``.
    pairs_adjacent : bool
        GGUF keeps the two rows of a rotary pair side by side, not half a head apart.
    qkv_bias : bool
        q, k and v always have biases and o never; otherwise a config's ``attention_bias``
        gives them to all four.
    window : int or None
        Sliding window of a config that leaves it out.
    uses_window : bool
        Whether a config that does not say ``use_sliding_window`` uses its window.
    """

    name: str
    architecture: str
    gguf: str
    pairs_adjacent: bool = True
    qkv_bias: bool = False
    window: int | None = None
    uses_window: bool = True


FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama"),
    Family("mistral", "MistralForCausalLM", "llama", window=4096),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        pairs_adjacent=False,
        qkv_bias=True,
        window=4096,
        uses_window=False,
    ),
)
"""In GGUF, the first of those that share an architecture stands for all."""

_LIMITS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 22),
    "num_layers": (1, 10_000),
    "num_heads": (1, 1 << 14),
    "num_kv_heads": (1, 1 << 14),
    "head_dim": (2, 1 << 12),
    "context_length": (1, 1 << 30),
}


def integer(path: Path, field: str, value: object, low: int, high: int) -> int:
    """A whole number of an untrusted header, within its range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(
            f"{path} gives {field} as {_short(value)}, not a whole number from {low} to {high}"
        )
    return value


def number(path: Path, field: str, value: object, low: float, high: float) -> float:
    """A finite number of an untrusted header, above `low` and at most `high`."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not low < value <= high:  # type: ignore[operator]
        raise CheckpointError(
            f"{path} gives {field} as {_short(value)}, not a number above {low:g} "
            f"and up to {high:g}"
        )
    return float(value)  # type: ignore[arg-type]


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def build_spec(
    path: Path,
    sizes: Mapping[str, object],
    *,
    family: str,
    name: str,
    norm_eps: object,
    rope: RopeSpec,
    tie_embeddings: bool,
    attention_bias: bool,
    output_bias: bool,
) -> ModelSpec:
    """A ModelSpec from header fields, each within its range and consistent with the others."""
    checked: dict[str, Any] = {f: integer(path, f, sizes.get(f), *_LIMITS[f]) for f in _LIMITS}
    if checked["num_heads"] % checked["num_kv_heads"]:
        raise CheckpointError(
            f"{path} has {checked['num_heads']} attention heads, no multiple of its "
            f"{checked['num_kv_heads']} key-value heads"
        )
    if checked["head_dim"] % 2:
        raise CheckpointError(f"{path} has the odd head size {checked['head_dim']}")
    layers = checked.pop("num_layers")
    return ModelSpec(
        family=family,
        name=name,
        norm_eps=number(path, "the norm epsilon", norm_eps, 0, 1),
        tie_embeddings=tie_embeddings,
        layers=(LayerSpec(),) * layers,
        ropes=(rope,),
        attention_bias=attention_bias,
        output_bias=output_bias,
        **checked,
    )


def expected_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors a model of this spec consists of."""
    hidden, mlp = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield "model.embed_tokens.weight", (spec.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    attention["o_proj"] = (hidden, q)
    gated = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    for i in range(spec.num_layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        for part, shape in attention.items():
            yield f"{layer}self_attn.{part}.weight", shape
            if spec.output_bias if part == "o_proj" else spec.attention_bias:
                yield f"{layer}self_attn.{part}.bias", shape[:1]
        for part, shape in gated.items():
            yield f"{layer}mlp.{part}.weight", shape


def check_tensors(path: Path, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those its spec calls for."""
    found = 0
    for name, shape in expected_tensors(spec):
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{path} has no tensor {name!r}, which a model of {spec.num_layers} layers needs"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{path} has tensor {name!r} of shape {info.shape} where its header "
                f"calls for {shape}"
            )
        found += 1
    if found != len(tensors):
        known = {name for name, _ in expected_tensors(spec)}
        extra = next(name for name in tensors if name not in known)
        raise CheckpointError(
            f"{path} has a tensor {extra!r} that is no part of the {spec.family} architecture"
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
