"""The ``config.json`` that lets `transformers` and ``compressed-tensors`` read a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pronk.checkpoint.families import ACTIVATIONS, FAMILIES, family_of
from pronk.errors import RequestError
from pronk.spec import LayerSpec, ModelSpec

__all__ = ["GROUP", "check_bundled", "hf_config"]

GROUP = 32
"""Elements that share a scale, in every format Pronk writes."""

# Every Linear of a Llama decoder is the target of exactly one group.
_TARGETS = {
    "head": r"re:.*lm_head$",
    "attention": r"re:.*self_attn\.(q|k|v|o)_proj$",
    "gate_up": r"re:.*mlp\.(gate|up)_proj$",
    "down": r"re:.*mlp\.down_proj$",
}


_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(list(ACTIVATIONS.items()))}


def check_bundled(spec: ModelSpec) -> None:
    """Refuse a model that no bundle can be written of yet.

    Raises
    ------
    RequestError
        If its family is none of those, or its layers are not all alike and global.
    """
    if not family_of(spec.family).bundles:
        known = ", ".join(family.name for family in FAMILIES if family.bundles)
        raise RequestError(
            f"a {spec.family} model cannot be written as a bundle yet: Pronk fits {known}"
        )
    kinds = {rope.kind for rope in spec.ropes} - {"default", "linear", "llama3"}
    if kinds or any(layer != LayerSpec() for layer in spec.layers):
        what = f"{min(kinds)} rope" if kinds else "windows or shared layers"
        raise RequestError(f"a model with {what} cannot be written as a bundle yet")


def hf_config(
    spec: ModelSpec, formats: Mapping[str, str] | None, bos: int | None, eos: Sequence[int]
) -> dict[str, Any]:
    """``config.json`` of a bundle with `formats` by tensor kind, or of float weights without.

    In a bundle the embedding is never tied: the output head is a packed Linear, and the
    embedding table beside it, which `transformers` cannot keep packed, is float16.
    """
    check_bundled(spec)
    family = family_of(spec.family)
    packed = {} if formats is None else {"quantization_config": _quantization(formats)}
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": _ACTIVATIONS[spec.activation],
        "attention_bias": spec.attention_bias and not family.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.context_length,
        "rope_theta": spec.ropes[0].theta,
        "rope_scaling": _rope_scaling(spec),
        "tie_word_embeddings": spec.tie_embeddings and formats is None,
        # Scales are float16 and norms float32: in float32 both load without rounding.
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": _one_or_many(eos),
        **packed,
    }


def _one_or_many(ids: Sequence[int]) -> int | list[int] | None:
    if len(ids) > 1:
        return list(ids)
    return ids[0] if ids else None


def _rope_scaling(spec: ModelSpec) -> dict[str, Any] | None:
    rope = spec.ropes[0]
    if rope.kind == "default":
        return None
    if rope.kind == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    return {
        "rope_type": rope.kind,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }


def _quantization(formats: Mapping[str, str]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for dtype in sorted({formats[kind] for kind in _TARGETS}):
        groups[f"group_{len(groups)}"] = {
            "targets": [target for kind, target in _TARGETS.items() if formats[kind] == dtype],
            "weights": _weights(dtype),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
    }


def _weights(dtype: str) -> dict[str, Any]:
    weights = {
        "num_bits": 8 if dtype == "q8_0" else 4,
        "type": "int",
        "symmetric": dtype != "q4_1",
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
    }
    if dtype == "q4_1":
        # A minimum is no whole multiple of its scale, and rounding it to one would cost as much
        # as the rounding to 4 bits did. Strategy "group" packs zero points as whole numbers (and
        # compressed-tensors 0.20 cannot load those); "tensor_group", with a global scale of one,
        # computes the same and keeps them in zp_dtype.
        weights |= {"strategy": "tensor_group", "zp_dtype": "torch.float32"}
    return weights
