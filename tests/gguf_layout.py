"""What llama.cpp's converter writes for a Hugging Face model: metadata, names, order of rows.

It shares nothing with the reader that is tested: names come from the tables of ``gguf``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "llama4_text": "llama4",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
PERMUTED = ("llama", "mistral", "mixtral", "smollm3", "granite")
EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def gguf_metadata(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture and the metadata of a model, but for its tokenizer."""
    family = config["model_type"]
    arch = ARCHITECTURES.get(family, family)
    values: dict[str, Any] = _mpt(config) if family == "mpt" else _usual(config)
    values |= _special(family, config)
    return arch, {f"{arch}.{key}": value for key, value in values.items() if value is not None}


def _mpt(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "block_count": config["n_layers"],
        "context_length": config["max_seq_len"],
        "embedding_length": config["d_model"],
        "feed_forward_length": 4 * config["d_model"],
        "attention.head_count": config["n_heads"],
        "attention.layer_norm_epsilon": 1e-5,
        "attention.max_alibi_bias": float(config["attn_config"]["alibi_bias_max"]),
    }


def _usual(config: dict[str, Any]) -> dict[str, Any]:
    rope = rope_of(config)
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
    }
    if config["model_type"] not in ("qwen2", "phi3"):  # the converter writes these for no other
        dim = head_dim(config)
        values |= {"attention.key_length": dim, "attention.value_length": dim}
        values |= {"rope.dimension_count": dim, "vocab_size": config["vocab_size"]}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    # The converter does not write Llama 3.1's, which is 8192 in all its models.
    if kind in ("yarn", "longrope", "llama3"):
        original = rope["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    if kind == "longrope":
        stretch = math.log(config["max_position_embeddings"] / original) / math.log(original)
        values["rope.scaling.attn_factor"] = math.sqrt(1 + stretch)
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    return values


def _special(family: str, config: dict[str, Any]) -> dict[str, Any]:
    if family in ("mistral", "phi3"):
        return {"attention.sliding_window": config.get("sliding_window")}
    if family == "qwen3_moe":
        return {"expert_feed_forward_length": config["moe_intermediate_size"]}
    if family in ("gemma2", "gemma3_text"):
        dim, scalar = head_dim(config), config["query_pre_attn_scalar"]
        return {
            "attention.sliding_window": config["sliding_window"],
            "attn_logit_softcapping": config["attn_logit_softcapping"],
            "final_logit_softcapping": config["final_logit_softcapping"],
            # llama.cpp takes the head size's, but for the largest of each family.
            "attention.scale": None if scalar == dim else scalar**-0.5,
        }
    if family == "granite":
        return {
            "attention.scale": config["attention_multiplier"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": config["logits_scaling"],
        }
    if family == "llama4_text":
        return {
            "feed_forward_length": config["intermediate_size_mlp"],
            "expert_feed_forward_length": config["intermediate_size"],
            "interleave_moe_layer_step": config["interleave_moe_layer_step"],
            "expert_gating_func": 2,
            # llama.cpp takes 8192 for these, whatever the file says.
            "attention.sliding_window": config["attention_chunk_size"],
            "attention.temperature_length": config["floor_scale"],
            "attention.temperature_scale": config["attn_scale"],
        }
    return {}


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rope parameters of most layers."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("full_attention", rope)


def head_dim(config: dict[str, Any]) -> int:
    """Elements of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def gguf_tensors(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a model under GGUF's names, arranged as GGUF has them."""
    import gguf

    family = config["model_type"]
    heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    arch = next(
        a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == ARCHITECTURES.get(family, family)
    )
    names = gguf.get_tensor_name_map(arch, 64)
    out = {}
    for name, weight in _parted(tensors).items():
        for at, part in enumerate(("q_proj", "k_proj")):
            if family in PERMUTED and f"self_attn.{part}." in name:
                weight = permute(weight, heads[at] or 0)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        out[found] = weight
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        out["rope_freqs.weight"] = llama3_factors(config, rope)
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            out[f"rope_factors_{length}.weight"] = factors
    return out


def _parted(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts put together, and what is stored transposed turned and cut."""
    out: dict[str, np.ndarray] = {}
    experts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, weight in tensors.items():
        if ".experts." in name and name.endswith(".weight"):
            before, _, after = name.partition(".experts.")
            number, which, _ = after.split(".")
            before = before.replace("block_sparse_moe", "mlp")
            merged = f"{before}.experts.{EXPERTS.get(which, which)}.weight"
            experts.setdefault(merged, []).append((int(number), weight))
        elif name.endswith("experts.gate_up_proj"):
            gate, up = np.split(weight.swapaxes(1, 2), 2, axis=1)
            out[name.replace("gate_up_proj", "gate_proj.weight")] = gate
            out[name.replace("gate_up_proj", "up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            out[f"{name}.weight"] = weight.swapaxes(1, 2)
        else:
            out[name] = weight
    for name, found in experts.items():
        out[name] = np.stack([weight for _, weight in sorted(found, key=lambda pair: pair[0])])
    return out


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in the order GGUF keeps: rotary pairs adjacent."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def llama3_factors(config: dict[str, Any], rope: dict[str, Any]) -> np.ndarray:
    """Llama 3.1's frequency divisors as llama.cpp's converter writes them."""
    dim = config["head_dim"]
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    freqs = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    old = rope["original_max_position_embeddings"]
    out = []
    for length in 2 * np.pi / freqs:
        if length < old / high:
            out.append(1.0)
        elif length > old / low:
            out.append(factor)
        else:
            smooth = (old / length - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)
