"""A Hugging Face ``config.json`` to a ModelSpec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pronk.checkpoint.families import FAMILIES, Family, build_spec, integer, number
from pronk.errors import CheckpointError
from pronk.spec import ModelSpec, RopeSpec

__all__ = ["read_spec"]


def read_spec(path: Path, config: dict[str, Any], tied: bool) -> ModelSpec:
    """The model a config describes; `tied` says that its embedding is its head regardless.

    Both the older layout (``rope_theta``, ``rope_scaling``) and that of transformers 5
    (``rope_parameters``) are read.
    """
    family = _family(path, config)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{path} uses the activation {str(config.get('hidden_act'))[:40]!r}; Pronk runs silu"
        )
    if config.get("mlp_bias"):
        raise CheckpointError(f"{path} has biases in its MLP (mlp_bias), which Pronk does not run")
    context = integer(
        path, "max_position_embeddings", config.get("max_position_embeddings", 2048), 1, 1 << 30
    )
    _refuse_window(path, config, family, context)
    hidden = integer(path, "hidden_size", config.get("hidden_size"), 1, 1 << 20)
    heads = integer(path, "num_attention_heads", config.get("num_attention_heads"), 1, 1 << 14)
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    sizes = {
        "vocab_size": config.get("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.get("intermediate_size"),
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": hidden // heads if head_dim is None else head_dim,
        "context_length": context,
    }
    biased = _flag(path, config, "attention_bias")
    name = config.get("_name_or_path")
    return build_spec(
        path,
        sizes,
        family=family.name,
        name=name[:200] if isinstance(name, str) and name else path.resolve().name,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope(path, config, context),
        tie_embeddings=tied or _flag(path, config, "tie_word_embeddings"),
        attention_bias=family.qkv_bias or biased,
        output_bias=biased and not family.qkv_bias,
    )


def _flag(path: Path, config: dict[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path} gives {field} as something else than true or false")
    return value


def _family(path: Path, config: dict[str, Any]) -> Family:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        arch = names[0]
        found = [family for family in FAMILIES if family.architecture == arch]
    else:
        arch = str(config.get("model_type"))
        found = [family for family in FAMILIES if family.name == arch]
    if not found:
        raise CheckpointError(
            f"{path} has the unknown architecture {arch[:80]!r}; Pronk knows "
            f"{', '.join(family.architecture for family in FAMILIES)}"
        )
    return found[0]


def _refuse_window(path: Path, config: dict[str, Any], family: Family, context: int) -> None:
    """Refuse a config whose layers would attend to less than their whole past."""
    window = config.get("sliding_window", family.window)
    if window is None or not config.get("use_sliding_window", family.uses_window):
        return
    window = integer(path, "sliding_window", window, 1, 1 << 31)
    if window < context:
        raise CheckpointError(
            f"{path} attends to a sliding window of {window} tokens, which Pronk does not run yet"
        )


def _rope(path: Path, config: dict[str, Any], context: int) -> RopeSpec:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    scaling = new if new is not None else old if old is not None else {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{path} gives its rotary scaling as something else than an object")
    base = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    theta = number(path, "rope_theta", base, 0, 1e12)
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise CheckpointError(
            f"{path} rotates only a part of each head (partial_rotary_factor), which Pronk does "
            f"not run"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta)

    def factor(field: str) -> float:
        return number(path, field, scaling.get(field), 0, 1e6)

    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor("factor"))
    if kind == "llama3":
        low, high = factor("low_freq_factor"), factor("high_freq_factor")
        if low >= high:
            raise CheckpointError(f"{path} has low_freq_factor not below high_freq_factor")
        original = scaling.get("original_max_position_embeddings", context)
        original = integer(path, "original_max_position_embeddings", original, 1, 1 << 30)
        return RopeSpec(theta, "llama3", factor("factor"), low, high, original)
    raise CheckpointError(
        f"{path} scales its rotary positions by {str(kind)[:40]!r}; Pronk knows default, linear "
        f"and llama3"
    )
