"""The ``config.json`` that lets `transformers` and ``compressed-tensors`` read a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pronk.checkpoint.families import ACTIVATIONS, FAMILIES, family_of
from pronk.errors import RequestError
from pronk.spec import ModelSpec, RopeSpec

__all__ = ["GROUP", "check_bundled", "hf_config"]

GROUP = 32
"""Elements that share a scale, in every format Pronk writes."""

# Every Linear of a decoder is the target of exactly one group; some families store several as one.
_TARGETS = {
    "head": r"re:.*lm_head$",
    "attention": r"re:.*self_attn\.(q|k|v|o|qkv)_proj$",
    "gate_up": r"re:.*mlp\.(gate|up|gate_up)_proj$",
    "down": r"re:.*mlp\.down_proj$",
}


_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
_ACTIVATIONS["silu"] = "silu"  # its other name is of old configs


def check_bundled(spec: ModelSpec) -> None:
    """Refuse a model that no bundle can be written of.

    Raises
    ------
    RequestError
        If `transformers` could not read its family packed, or its config could not say what the
        layers are.
    """
    family = family_of(spec.family)
    if not family.bundles:
        known = ", ".join(family.name for family in FAMILIES if family.bundles)
        raise RequestError(
            f"a {spec.family} model cannot be written as a bundle: Pronk fits {known}"
        )
    if any(layer.weights is not None for layer in spec.layers):
        raise RequestError("a model with shared layers cannot be written as a bundle")
    windows, ropes = _windows(spec), _ropes(spec)
    whole, local = (spec.ropes[i] for i in ropes)
    alike = whole == local or (family.local_theta and local.kind == "default")
    alike = alike and all(
        layer.rope in (None, ropes[layer.attention == "window"])
        and (layer.attention == "global" or (layer.window, layer.sinks) == windows)
        for layer in spec.layers
    )
    if not alike or (windows and (not family.windows or windows[1])):
        raise RequestError(
            "a model whose windows or ropes its config cannot name cannot be written as a bundle"
        )


def _windows(spec: ModelSpec) -> tuple[int, int] | None:
    """Window and sinks of the first layer that has a window."""
    found = (layer for layer in spec.layers if layer.attention != "global")
    return next(((layer.window, layer.sinks) for layer in found), None)


def _ropes(spec: ModelSpec) -> tuple[int, int]:
    """Which rope global layers have, and which those with a window."""

    def first(windowed: bool, otherwise: int) -> int:
        of = (la.rope for la in spec.layers if (la.attention != "global") == windowed)
        return next((rope for rope in of if rope is not None), otherwise)

    whole = first(False, first(True, 0))
    return whole, first(True, whole)


def hf_config(
    spec: ModelSpec, formats: Mapping[str, str], bos: int | None, eos: Sequence[int]
) -> dict[str, Any]:
    """``config.json`` of a bundle with `formats` by tensor kind.

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
        "rms_norm_eps": spec.norm_eps,
        **_window_fields(spec),
        **_rope_fields(spec),
        **_factor_fields(spec),
        "tie_word_embeddings": False,
        # Scales are float16 and norms float32: in float32 both load without rounding.
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": _one_or_many(eos),
        "pad_token_id": None,  # some families default to one beyond a small vocabulary
        "quantization_config": _quantization(formats),
    }


def _window_fields(spec: ModelSpec) -> dict[str, Any]:
    """Which layers have a window, in the words of every family at once."""
    windows, family = _windows(spec), family_of(spec.family)
    fields: dict[str, Any] = {
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": windows is not None,
    }
    if family.nope_period:
        fields["no_rope_layers"] = [int(layer.rope is not None) for layer in spec.layers]
    if family.windows not in ("", "all"):  # else the window alone says it
        kinds = {"global": "full_attention", "window": "sliding_attention"}
        fields["layer_types"] = [kinds[layer.attention] for layer in spec.layers]
    return fields


def _factor_fields(spec: ModelSpec) -> dict[str, Any]:
    """Factors and caps, by the names of the families that have them."""
    defaults = family_of(spec.family).defaults
    scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
    fields = {
        "hidden_activation": _ACTIVATIONS[spec.activation],
        "query_pre_attn_scalar": round(scale**-2),  # transformers wants a whole number
        "attn_logit_softcapping": spec.attention_softcap or None,
        "final_logit_softcapping": spec.logit_softcap or None,
        "embedding_multiplier": spec.embedding_scale,
        "residual_multiplier": spec.residual_scale,
        "attention_multiplier": scale,
        "logits_scaling": 1 / spec.logit_scale,
    }
    named = {name: value for name, value in fields.items() if name in defaults}
    if "query_pre_attn_scalar" in named:
        # Where a header leaves a cap out, a family's own default would come in.
        named |= {name: value for name, value in fields.items() if name.endswith("softcapping")}
    return named


def _one_or_many(ids: Sequence[int]) -> int | list[int] | None:
    if len(ids) > 1:
        return list(ids)
    return ids[0] if ids else None


def _rope_fields(spec: ModelSpec) -> dict[str, Any]:
    whole, local = (spec.ropes[i] for i in _ropes(spec))
    context = spec.context_length
    if whole.kind == "dynamic":  # scaled from the context that the header states
        context = whole.original_context
    fields: dict[str, Any] = {
        "max_position_embeddings": context,
        "rope_theta": whole.theta,
        "rope_scaling": _rope_scaling(whole),
    }
    if family_of(spec.family).local_theta:
        fields["rope_local_base_freq"] = local.theta
    if whole.kind == "longrope":
        fields["original_max_position_embeddings"] = whole.original_context
    return fields


def _rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    """The fields of a rope that its kind reads."""
    if rope.kind == "default":
        return None
    fields: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        fields["low_freq_factor"] = rope.low_freq_factor
        fields["high_freq_factor"] = rope.high_freq_factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        fields["original_max_position_embeddings"] = rope.original_context
    if rope.kind in ("yarn", "longrope"):
        fields["attention_factor"] = rope.attention_factor
    if rope.kind == "yarn":
        fields["beta_fast"], fields["beta_slow"] = rope.beta_fast, rope.beta_slow
        fields["truncate"] = rope.truncate
    if rope.kind == "longrope":
        fields["short_factor"] = list(rope.short_factors)
        fields["long_factor"] = list(rope.long_factors)
    return fields


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
