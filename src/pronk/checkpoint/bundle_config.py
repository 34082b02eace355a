"""The ``config.json`` that lets `transformers` and ``compressed-tensors`` read a bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pronk.checkpoint.arrange import expected_tensors
from pronk.checkpoint.families import ACTIVATIONS, FAMILIES, family_of
from pronk.checkpoint.kinds import EMBEDDING, HEAD, tensor_kind
from pronk.checkpoint.storage import Storage, storage_of
from pronk.errors import RequestError
from pronk.spec import ModelSpec, RopeSpec

__all__ = ["check_bundled", "experts_fit", "hf_config", "module_of"]

# Modules of a kind; some families store several as one.
_TARGETS = {
    "head": r"re:.*lm_head$",
    "attention": r"re:.*self_attn\.(q|k|v|o|qkv)_proj$",
    "gate_up": r"re:.*mlp\.(gate|up|gate_up)_proj$",
    "down": r"re:.*mlp\.down_proj$",
    "experts' gate_up": r"re:.*\.experts\.\d+\.(gate_proj|up_proj|w1|w3)$",
    "experts' down": r"re:.*\.experts\.\d+\.(down_proj|w2)$",
}


_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}

_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
_ACTIVATIONS["silu"] = "silu"  # its other name is of old configs


def check_bundled(spec: ModelSpec, formats: Mapping[str, str] | None = None) -> None:
    """Refuse a model that no bundle can be written of, with `formats` by tensor kind or name.

    Raises
    ------
    RequestError
        If `transformers` could not read its family packed, or its experts in these formats, or
        its config could not say what the layers are.
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
    if formats is not None and not experts_fit(spec, formats):
        raise RequestError(
            "experts of one format alone, without minima, can be written as a bundle: what loads "
            "them puts them together; take another recipe, such as int8 or int4-rtn"
        )


def experts_fit(spec: ModelSpec, formats: Mapping[str, str]) -> bool:
    """Whether all experts are of one format that `transformers` and others can unpack."""
    names = (name for name, _ in expected_tensors(spec) if ".experts." in name)
    found = {storage_of(formats, name) for name in names}
    return len(found) <= 1 and not any(storage.minimum for storage in found)


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
    spec: ModelSpec,
    formats: Mapping[str, str] | None,
    bos: int | None,
    eos: Sequence[int],
    static: bool = False,
) -> dict[str, Any]:
    """``config.json`` of a bundle with `formats` by tensor kind or name, or of float weights.

    In a bundle the embedding is never tied: the output head is a packed Linear, and the
    embedding table beside it, which `transformers` cannot keep packed, is float16. With `static`,
    integer weights are multiplied with int8 inputs whose scales are beside them.
    """
    check_bundled(spec, formats)
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
        **_expert_fields(spec),
        "tie_word_embeddings": spec.tie_embeddings and formats is None,
        # Scales are float16 and norms float32: in float32 both load without rounding.
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": _one_or_many(eos),
        "pad_token_id": None,  # some families default to one beyond a small vocabulary
        **_quantized(spec, formats, static),
    }


def _quantized(spec: ModelSpec, formats: Mapping[str, str] | None, static: bool) -> dict[str, Any]:
    if formats is None:
        return {}
    config = _quantization(spec, formats, static)
    return {"quantization_config": config} if config["config_groups"] else {}


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


def _expert_fields(spec: ModelSpec) -> dict[str, Any]:
    """Numbers and sizes of experts, in the words of every family at once."""
    row, moe = family_of(spec.family).experts, spec.moe
    if row is None or moe is None:
        return {}
    return {
        "num_local_experts": moe.experts,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize,
        row.width: moe.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(spec.layers) if layer.mlp != "moe"],
    }


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


def _quantization(spec: ModelSpec, formats: Mapping[str, str], static: bool) -> dict[str, Any]:
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
            "targets": _targets(spec, stored[storage], stored),
            "weights": storage.weights,
            "input_activations": _INPUTS if static and storage.kind == "int" else None,
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


def _targets(spec: ModelSpec, names: list[str], stored: Mapping[Storage, list[str]]) -> list[str]:
    """Patterns of the modules of one group: one for those that no other group has any of."""
    out, held = [], set(names)
    for kind, target in _TARGETS.items():
        of_kind = {n for part in stored.values() for n in part if _target_kind(n) == kind}
        if of_kind and of_kind <= held:
            out.append(target)
            held -= of_kind
    lone = (_pattern(module_of(spec, name)[0]) for name in names if name in held)
    return out + list(dict.fromkeys(lone))


def _target_kind(name: str) -> str:
    return ("experts' " if ".experts." in name else "") + (tensor_kind(name) or "")


def _pattern(module: str) -> str:
    """A module by its name, or that of every expert."""
    if "*" not in module:
        return module
    return "re:" + re.escape(module).replace(r"\*", r"\d+") + "$"


def module_of(spec: ModelSpec, name: str) -> tuple[str, tuple[str, ...]]:
    """The module that a family stores a weight in, and all weights it has, in their order.

    ``*`` counts experts, whose weights are one after the other in one of ours.
    """
    for into, parts in family_of(spec.family).hf_names.items():
        for part in parts:
            layer = name.removesuffix(f"{part}.weight")
            if layer != name:
                return f"{layer}{into}", tuple(f"{layer}{one}.weight" for one in parts)
    return name.removesuffix(".weight"), (name,)
