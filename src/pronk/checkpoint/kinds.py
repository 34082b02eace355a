"""The kinds of weights that are given a format each."""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["EMBEDDING", "EMBEDDING_DTYPE", "HEAD", "KINDS", "tensor_kind"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

KINDS = ("head", "attention", "gate_up", "down")
"""Output head and embedding; q, k, v and o; gate and up; down."""

EMBEDDING_DTYPE = "q8_0"
"""What a bundle's embedding table runs as, where it is not the output head too.

`transformers` keeps none packed, so the file holds its values in float16.
"""

_KIND = MappingProxyType(
    {
        "embed_tokens": "head",
        "lm_head": "head",
        "q_proj": "attention",
        "k_proj": "attention",
        "v_proj": "attention",
        "o_proj": "attention",
        "gate_proj": "gate_up",
        "up_proj": "gate_up",
        "down_proj": "down",
    }
)


def tensor_kind(name: str) -> str | None:
    """The kind of a weight by its canonical name; None for norms and biases."""
    module, _, leaf = name.rpartition(".")
    return _KIND.get(module.rpartition(".")[2]) if leaf == "weight" else None
