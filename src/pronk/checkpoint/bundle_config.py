"""The ``config.json`` that lets `transformers` and ``compressed-tensors`` read a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pronk.checkpoint.arrange import expected_tensors
from pronk.checkpoint.families import ACTIVATIONS, FAMILIES, family_of
from pronk.checkpoint.kinds import EMBEDDING, HEAD, tensor_kind
from pronk.checkpoint.storage import Storage, storage_of
from pronk.errors import RequestError
from pronk.spec import LayerSpec, ModelSpec

__all__ = ["check_bundled", "hf_config"]

# Modules of a kind.
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
    spec: ModelSpec, formats: Mapping[str, str], bos: int | None, eos: Sequence[int]
) -> dict[str, Any]:
    """``config.json`` of a bundle with `formats` by tensor kind or name.

    The embedding is never tied: the output head is a packed Linear, and the embedding table
    beside it, which `transformers` cannot keep packed, is float16.
    """
    check_bundled(spec)
    family = family_of(spec.family)
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
        "tie_word_embeddings": False,
        # Scales are float16 and norms float32: in float32 both load without rounding.
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": _one_or_many(eos),
        **_quantized(spec, formats),
    }


def _quantized(spec: ModelSpec, formats: Mapping[str, str]) -> dict[str, Any]:
    config = _quantization(spec, formats)
    return {"quantization_config": config} if config["config_groups"] else {}


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


def _quantization(spec: ModelSpec, formats: Mapping[str, str]) -> dict[str, Any]:
    """Every Linear of the decoder is the target of one group, or of none if it is float."""
    stored: dict[Storage, list[str]] = {}
    for name, shape in expected_tensors(spec):
        if tensor_kind(name) and len(shape) == 2 and name != EMBEDDING:
            stored.setdefault(storage_of(formats, name), []).append(name)
    if spec.tie_embeddings:
        stored.setdefault(storage_of(formats, EMBEDDING), []).append(HEAD)
    groups: dict[str, Any] = {}
    kinds = set()
    for storage in sorted(stored, key=str):
        if storage.weights is None:
            continue
        form = "float-quantized" if storage.kind == "fp8" else "pack-quantized"
        kinds.add(form)
        groups[f"group_{len(groups)}"] = {
            "targets": _targets(stored[storage], stored),
            "weights": storage.weights,
            "input_activations": None,
            "output_activations": None,
            "format": form,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
    }


def _targets(names: list[str], stored: Mapping[Storage, list[str]]) -> list[str]:
    """Patterns of the modules of one group: one for those that no other group has any of."""
    out, held = [], set(names)
    for kind, target in _TARGETS.items():
        of_kind = {n for part in stored.values() for n in part if tensor_kind(n) == kind}
        if of_kind and of_kind <= held:
            out.append(target)
            held -= of_kind
    return out + [name.removesuffix(".weight") for name in names if name in held]
