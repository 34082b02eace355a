"""A Hugging Face ``config.json`` to a ModelSpec."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pronk.checkpoint.describe import LIMITS, Described, check_experts, describe, every
from pronk.checkpoint.families import ACTIVATIONS, FAMILIES, Family
from pronk.checkpoint.hf_rope import longest_context, read_ropes
from pronk.checkpoint.values import flag, integer, number, short, unknown
from pronk.errors import CheckpointError
from pronk.spec import ModelSpec, MoeSpec

__all__ = ["TEXT_PREFIX", "read_family", "read_spec", "text_part"]

TEXT_PREFIX = "language_model."
"""What the text model's tensors are called in files of a model that also sees."""

_WINDOWED = {"full_attention": False, "sliding_attention": True, "chunked_attention": True}


def text_part(path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The config of a model that also sees as that of its text model; and whether it is one."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    family = next((f for f in FAMILIES if f.wrapper and f.wrapper == name), None)
    if family is None:
        return config, False
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path} has no text_config, which a {family.wrapper} needs")
    return {**inner, "architectures": [family.architecture]}, True


def read_family(path: Path, config: dict[str, Any]) -> Family:
    """The family that a config names."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        arch = names[0]
        found = [family for family in FAMILIES if family.architecture == arch]
    else:
        arch = str(config.get("model_type"))
        found = [family for family in FAMILIES if family.name == arch]
    if not found:
        raise unknown(path, "architecture", arch, (f.architecture for f in FAMILIES))
    return found[0]


def read_spec(path: Path, config: dict[str, Any], tied: bool) -> ModelSpec:
    """The model a config describes; `tied` says that its embedding is its head regardless."""
    family = read_family(path, config)
    fixed = {"mlp_bias": (None, False), **family.fixed}
    for key, allowed in fixed.items():
        value = _look(path, config, key, allowed[0])
        if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            raise CheckpointError(
                f"{path} gives {key} as {short(value)}, which Pronk does not run for {family.name}"
            )
    config = {**family.defaults, **config}
    for key, theirs in family.fields.items():
        config[key] = _look(path, config, theirs, config.get(key))
    context = integer(
        path, "max_position_embeddings", config.get("max_position_embeddings", 2048), 1, 1 << 30
    )
    hidden = integer(path, "hidden_size", config.get("hidden_size"), *LIMITS["hidden_size"])
    heads = integer(
        path, "num_attention_heads", config.get("num_attention_heads"), *LIMITS["num_heads"]
    )
    count = integer(
        path, "num_hidden_layers", config.get("num_hidden_layers"), *LIMITS["num_layers"]
    )
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    head_dim = hidden // heads if head_dim is None else head_dim
    integer(path, "head_dim", head_dim, *LIMITS["head_dim"])
    ropes = read_ropes(path, config, context, head_dim, family.local_theta)
    sizes = {
        "vocab_size": config.get("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _width(path, config, family, hidden),
        "num_layers": count,
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "context_length": longest_context(context, *ropes),
    }
    roped = _roped(path, config, family, count)
    window = _window(path, config, family)
    biased = _flag(path, config, "attention_bias")
    name = config.get("_name_or_path")
    return describe(
        path,
        family,
        sizes,
        Described(
            window=window or 0,
            windowed=_windowed(path, config, family, roped),
            roped=roped,
            routed=_routed(path, config, family, count),
            rope=ropes[0],
            local_rope=ropes[1],
            moe=_experts(path, config, family),
            qk_norm=family.qk_norm if _flag(path, config, "use_qk_norm", True) else "",
            weights=_weights(path, config, count),
        ),
        name=name[:200] if isinstance(name, str) and name else path.resolve().name,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_embeddings=tied or _flag(path, config, "tie_word_embeddings"),
        attention_bias=family.qkv_bias or biased,
        output_bias=biased and not family.qkv_bias,
        activation=_activation(path, config),
        **_factors(path, config, family, hidden),
    )


def _look(path: Path, config: dict[str, Any], name: str, default: object) -> Any:
    """A field by its name, in an inner object where that has a dot."""
    outer, dot, inner = name.partition(".")
    if not dot:
        return config.get(outer, default)
    value = config.get(outer, {})
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} gives {outer} as something else than an object")
    return value.get(inner, default)


def _flag(path: Path, config: dict[str, Any], name: str, default: bool = False) -> bool:
    return flag(path, name, config.get(name, default))


def _width(path: Path, config: dict[str, Any], family: Family, hidden: int) -> object:
    """Width of a dense MLP."""
    if "expansion_ratio" in family.defaults:
        return hidden * integer(path, "expansion_ratio", config["expansion_ratio"], 1, 1024)
    if family.experts is not None and family.experts.shared:
        return config.get("intermediate_size_mlp", config.get("intermediate_size"))
    return config.get("intermediate_size")


def _activation(path: Path, config: dict[str, Any]) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise unknown(path, "activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def _list(path: Path, config: dict[str, Any], name: str, count: int) -> list[Any] | None:
    """A list of a value for each layer, or None where there is none."""
    value = config.get(name)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) < count:
        raise CheckpointError(f"{path} gives {name} as something else than a value for each layer")
    return value[:count]


def _roped(path: Path, config: dict[str, Any], family: Family, count: int) -> list[bool]:
    if not family.nope_period:
        return [not family.alibi] * count
    given = _list(path, config, "no_rope_layers", count)
    if given is not None:  # one where a layer has rope
        flags = (int(one) if isinstance(one, bool) else one for one in given)
        return [bool(integer(path, "no_rope_layers", one, 0, 1)) for one in flags]
    period = config.get("no_rope_layer_interval", family.nope_period)
    period = integer(path, "no_rope_layer_interval", period, 1, 10_000)
    return [not without for without in every(count, period)]


def _window(path: Path, config: dict[str, Any], family: Family) -> int | None:
    field = "attention_chunk_size" if family.chunked else "sliding_window"
    window = config.get(field)
    if not family.windows or window is None or not config.get("use_sliding_window", True):
        return None
    return integer(path, field, window, 1, 1 << 31)


def _windowed(
    path: Path, config: dict[str, Any], family: Family, roped: list[bool]
) -> list[bool]:  # fmt: skip
    count = len(roped)
    types = _list(path, config, "layer_types", count)
    if types is not None and family.windows:
        for one in types:
            if not isinstance(one, str) or one not in _WINDOWED:
                raise unknown(path, "layer type", one, _WINDOWED)
        return [_WINDOWED[one] for one in types]
    if family.windows == "upper":
        first = integer(path, "max_window_layers", config["max_window_layers"], 0, 10_000)
        return [i >= first for i in range(count)]
    if family.windows == "pattern":
        period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        period = family.period if period is None else period
        period = integer(path, "sliding_window_pattern", period, 1, 10_000)
        return [not whole for whole in every(count, period)]
    if family.windows in ("rope", "nope"):
        return [has == (family.windows == "rope") for has in roped]
    return [bool(family.windows)] * count


def _routed(path: Path, config: dict[str, Any], family: Family, count: int) -> list[bool]:
    if family.experts is None:
        return [False] * count
    named = config.get("moe_layers")
    if isinstance(named, list):
        return [i in named for i in range(count)]
    step = config.get("interleave_moe_layer_step", config.get("decoder_sparse_step", 1))
    step = integer(path, "the step of layers with experts", step, 1, 10_000)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError(f"{path} gives mlp_only_layers as something else than a list")
    return [has and i not in dense for i, has in enumerate(every(count, step))]


def _experts(path: Path, config: dict[str, Any], family: Family) -> MoeSpec | None:
    row = family.experts
    if row is None:
        return None
    width = config.get(row.width)
    return check_experts(
        path,
        MoeSpec(
            experts=config.get("num_local_experts", config.get("num_experts", 0)),
            top_k=config.get("num_experts_per_tok", 0),
            intermediate_size=width if isinstance(width, int) else 0,
            score=row.score,
            normalize=_flag(path, config, "norm_topk_prob", row.normalize),
            scales_input=row.scales_input,
            shared_size=width if row.shared and isinstance(width, int) else 0,
        ),
    )


def _weights(path: Path, config: dict[str, Any], count: int) -> list[int]:
    given = _list(path, config, "layer_weights", count)
    if given is None:
        return list(range(count))
    return [integer(path, "layer_weights", one, 0, count - 1) for one in given]


def _factors(path: Path, config: dict[str, Any], family: Family, hidden: int) -> dict[str, Any]:
    """The spec's factors, caps and slopes."""

    def positive(name: str) -> float | None:
        value = config.get(name)
        return None if value is None else number(path, name, value, 0, 1e6)

    out: dict[str, Any] = {}
    if family.scales_embeddings:
        out["embedding_scale"] = math.sqrt(hidden)
        out["attention_softcap"] = positive("attn_logit_softcapping") or 0.0
        out["logit_softcap"] = positive("final_logit_softcapping") or 0.0
        base = positive("query_pre_attn_scalar")
        out["attention_scale"] = None if base is None else 1 / math.sqrt(base)
    if "embedding_multiplier" in family.defaults:
        out["embedding_scale"] = positive("embedding_multiplier") or 1.0
        out["residual_scale"] = positive("residual_multiplier") or 1.0
        out["attention_scale"] = positive("attention_multiplier")
        out["logit_scale"] = 1 / (positive("logits_scaling") or 1.0)
    if family.alibi:
        out["alibi"] = positive("alibi_bias_max") or 0.0
    if "floor_scale" in family.defaults and _flag(path, config, "attn_temperature_tuning", True):
        span = integer(path, "floor_scale", config["floor_scale"], 1, 1 << 30)
        out["query_growth"] = (positive("attn_scale") or 0.0, span)
    return out
