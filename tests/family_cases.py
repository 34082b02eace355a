"""The families under test: one table for the parity matrix and for the page of families.

``python tests/family_cases.py`` writes the page again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pronk.checkpoint.families import FAMILIES

__all__ = ["CASES", "FORMATS", "Case", "page"]

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

FORMATS = ("hf-f32", "hf-bf16", "gguf-f32", "gguf-f16", "gguf-q8_0")
"""What each case is written as, unless it says less: the container and the type of matrices."""


@dataclass(frozen=True)
class Case:
    """A tiny model: its family, and what its config says besides `checkpoints.tiny_dir`."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = FORMATS


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
_HF = tuple(name for name in FORMATS if name.startswith("hf"))

CASES: dict[str, Case] = {
    "llama": Case("llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": False}),
    "llama-shared": Case("llama", {"num_hidden_layers": 4, "layer_weights": [0, 0, 2, 2]}, _HF),
    "mistral": Case("mistral", {"sliding_window": 12, "num_hidden_layers": 3}),
    "mistral-full": Case("mistral", {"sliding_window": None, "num_hidden_layers": 3}),
    "mixtral": Case("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "llama4_text": Case(
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "head_dim": 16,
            "intermediate_size": 96,
            "intermediate_size_mlp": 160,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 12,
            "floor_scale": 8,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3": Case("smollm3", {"num_hidden_layers": 5}),
    "qwen2": Case("qwen2"),
    "qwen2-yarn": Case("qwen2", {"rope_parameters": _YARN}),
    "qwen2-window": Case(
        "qwen2",
        {
            "num_hidden_layers": 3,
            "sliding_window": 12,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
        _HF,
    ),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3_moe": Case(
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe-dense": Case(
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
        },
        _HF,
    ),
    "olmoe": Case("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}),
    "gemma2": Case(
        "gemma2",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            # Small enough to bend these models' scores and logits.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": Case(
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": Case(
        "phi3",
        {
            "rope_parameters": _LONG,
            "original_max_position_embeddings": 32,
            "sliding_window": 24,
            "tie_word_embeddings": False,
        },
    ),
    "mpt": Case("mpt", {"num_attention_heads": 4}),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
    ),
}


def page() -> str:
    """What the page of families must be."""
    lines = [
        "# Families",
        "",
        "The families that Pronk reads, each a row of `pronk.checkpoint.families`. Tests write a "
        "tiny",
        "random model of each as every format named here, and compare logits with those of",
        "`transformers`: past the edge of its window, in chunks, token by token, and with two "
        "sequences",
        "in one step (`tests/test_families.py`). This table is made from the same rows, by",
        "`python tests/family_cases.py`.",
        "",
        "| family | class | GGUF | what is special | tested as | bundles |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in FAMILIES:
        seen = {f for case in CASES.values() if case.family == row.name for f in case.formats}
        tested = ", ".join(name.replace("-", " ") for name in FORMATS if name in seen)
        fits = "yes" if row.bundles else "no"
        wrapper = f", text of `{row.wrapper}`" if row.wrapper else ""
        names = f"{row.name} | `{row.architecture}`{wrapper} | `{row.gguf}`"
        lines.append(f"| {names} | {row.about} | {tested} | {fits} |")
    return "\n".join(lines) + "\n\n" + _REST


_REST = """## Ropes

`default`, `linear`, `dynamic`, `llama3`, `yarn` and `longrope`, from a config's `rope_parameters`
(those of each type of layer, where they differ) or `rope_scaling`, and from GGUF's keys, divisors
(`rope_freqs`) and factors (`rope_factors_long`, `rope_factors_short`). What depends on the length
that a sequence has reached (`dynamic`, `longrope`) is fixed for the context that a model is loaded
with.

## Shared layers

A config may carry `layer_weights`, a list with a layer for each layer: layer *i* runs with the
weights of layer `layer_weights[i]`. Only layers that name themselves have tensors in the files;
each is in memory once.

## Bundles

`pronk fit` and `pronk compress` write those whose files hold every matrix, and every expert, as a
linear layer of its own (`tests/test_bundle_families.py` compares logits with `transformers` on the
bundle). All experts get one format without minima, since `transformers` unpacks them together:
`pronk compress MODEL --recipe int8` or `int4-rtn`, `int4-mse`, `fp8`, `bf16`; recipes that are
calibrated refuse mixtures. Llama 4, MPT and shared layers are refused.

## What is refused

Another architecture, rope type, activation or type of layer, by its name and with the list of those
that are known; a head of which only a part is turned; and config fields that would change what a
model computes in a way that Pronk does not run, such as `clip_qkv`.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
