"""GGUF files as checkpoints: llama.cpp's names and row order to Hugging Face's."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint, Span, TensorInfo
from pronk.checkpoint.blocks import BLOCK_SIZES, dequantize
from pronk.checkpoint.families import (
    FAMILIES,
    Family,
    build_spec,
    check_tensors,
    integer,
    number,
    rope_divisors,
)
from pronk.checkpoint.gguf_header import GgufArray, GgufHeader, StoredTensor, read_header
from pronk.checkpoint.io import open_file, read_exact
from pronk.errors import CheckpointError
from pronk.spec import ModelSpec, RopeSpec

if TYPE_CHECKING:
    from pronk.checkpoint.tokenizer import Tokenizer

__all__ = ["GgufCheckpoint"]

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufCheckpoint(Checkpoint):
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = "gguf"
        self._fd, _ = open_file(path)
        try:
            self.header = read_header(self._fd, path)
            self._family = _family(self.header)
            self._stored = _rename(self.header, self._family)
            self.tensors = MappingProxyType(
                {
                    name: TensorInfo(name, t.dtype, t.shape, t.nbytes)
                    for name, t in self._stored.items()
                }
            )
            self.spec = _spec(self.header, self._family, self._stored)
            check_tensors(path, self.spec, self.tensors)
        except BaseException:
            self.close()
            raise

    def _read(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        stored = self._stored[info.name]
        heads = self._paired_heads(info.name)
        if not heads:
            return self._rows(stored, info, start, stop)
        dim = self.spec.head_dim
        if len(info.shape) == 1:
            row = self._rows(stored, info, start, stop)
            pairs = row.reshape(len(row), heads, dim // 2, 2, -1)
            return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(row.shape)
        # The file keeps the two rows of a rotary pair side by side, head by head.
        first, last = start // dim, -(-stop // dim)
        rows = self._rows(stored, info, first * dim, last * dim)
        halves = rows.reshape(last - first, dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
        return np.ascontiguousarray(halves[start - first * dim : stop - first * dim])

    def span(self, name: str) -> Span | None:
        """Where a tensor lies; None for a vector whose elements change places."""
        stored = self._stored[name]
        if not self._paired_heads(name):
            return Span(self._fd, stored.offset)
        vector = len(stored.shape) == 1
        return None if vector else Span(self._fd, stored.offset, self.spec.head_dim)

    def _paired_heads(self, name: str) -> int:
        """Heads of a tensor whose rotary pairs lie side by side in the file; 0 for any other."""
        if not self._family.pairs_adjacent:
            return 0
        rotated = {"q_proj": self.spec.num_heads, "k_proj": self.spec.num_kv_heads}
        return rotated.get(name.split(".")[-2], 0)

    def _rows(
        self, stored: StoredTensor, info: TensorInfo, start: int, stop: int
    ) -> NDArray[np.uint8]:
        width = stored.nbytes // info.rows
        raw = read_exact(self._fd, stored.offset + start * width, (stop - start) * width, self.path)
        return raw.reshape(stop - start, width)

    @property
    def files(self) -> tuple[int, ...]:
        """The one file."""
        return (self._fd,)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer the metadata describes."""
        from pronk.checkpoint.tokenizer_gguf import from_gguf

        return from_gguf(self.header, self.spec.vocab_size)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _rename(header: GgufHeader, family: Family) -> dict[str, StoredTensor]:
    """The tensors under Hugging Face names; the rotary divisors are no weights."""
    out = {}
    for name, tensor in header.tensors.items():
        if name == "rope_freqs.weight":
            continue
        new = _TOP.get(name)
        if new is None:
            pieces = name.split(".")
            if len(pieces) == 4 and pieces[0] == "blk" and pieces[2] in _PARTS:
                new = f"model.layers.{pieces[1]}.{_PARTS[pieces[2]]}.{pieces[3]}"
        if new is None:
            raise CheckpointError(
                f"{header.path} has a tensor {name[:80]!r} that is no part of the {family.gguf} "
                f"architecture"
            )
        if len(tensor.shape) == 1 and BLOCK_SIZES[tensor.dtype][0] != 1:
            raise CheckpointError(f"{header.path} has vector {name!r} of type {tensor.dtype}")
        out[new] = tensor
    return out


def _family(header: GgufHeader) -> Family:
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise CheckpointError(f"{header.path} does not name its architecture")
    for family in FAMILIES:
        if family.gguf == arch:
            return family
    known = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES))
    raise CheckpointError(
        f"{header.path} has the unknown architecture {arch[:80]!r}; Pronk knows {known} "
        f"(Mistral's files call themselves llama)"
    )


def _spec(header: GgufHeader, family: Family, tensors: dict[str, StoredTensor]) -> ModelSpec:
    arch, path = family.gguf, header.path

    def get(key: str, default: Any = None) -> Any:
        return header.metadata.get(f"{arch}.{key}", default)

    def same(key: str, default: Any) -> Any:
        """A value that may come once or per layer; layers that differ are refused."""
        value = get(key, default)
        if isinstance(value, GgufArray):
            numbers = header.numbers(f"{arch}.{key}")
            if numbers is None or not len(numbers) or (numbers != numbers[0]).any():
                raise CheckpointError(
                    f"{path} has layers that differ in {key}, which Pronk does not run"
                )
            value = numbers[0].item()
        return value

    if get("expert_count", 0):
        raise CheckpointError(f"{path} is a mixture of experts, which Pronk does not run yet")
    embedding = tensors.get("model.embed_tokens.weight")
    hidden = integer(path, "the embedding length", get("embedding_length"), 1, 1 << 20)
    heads = integer(path, "the head count", same("attention.head_count", None), 1, 1 << 14)
    head_dim = get("attention.key_length", get("rope.dimension_count", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{path} has {key} {str(get(key))[:40]}, but Pronk needs it to be the head size "
                f"{str(head_dim)[:40]}"
            )
    vocab = embedding.shape[0] if embedding else None
    context = get("context_length")
    window = get("attention.sliding_window", 0)
    if window and isinstance(window, int) and isinstance(context, int) and window < context:
        raise CheckpointError(
            f"{path} attends to a sliding window of {window} tokens, which Pronk does not run yet"
        )
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": same("feed_forward_length", None),
        "num_layers": get("block_count"),
        "num_heads": heads,
        "num_kv_heads": same("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "context_length": context,
    }
    if get("vocab_size", vocab) != vocab:
        raise CheckpointError(
            f"{path} claims {str(get('vocab_size'))[:40]} tokens but embeds {vocab}"
        )
    name = header.metadata.get("general.name")
    rope_dim = integer(path, "the head size", head_dim, 2, 1 << 12)
    return build_spec(
        path,
        sizes,
        family=family.name,
        name=name[:200] if isinstance(name, str) and name else path.stem,
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope=_rope(header, arch, rope_dim),
        tie_embeddings="lm_head.weight" not in tensors,
        attention_bias=family.qkv_bias or "model.layers.0.self_attn.q_proj.bias" in tensors,
        output_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
    )


def _rope(header: GgufHeader, arch: str, head_dim: int) -> RopeSpec:
    path = header.path

    def get(key: str, default: Any) -> Any:
        return header.metadata.get(f"{arch}.rope.{key}", default)

    theta = number(path, "rope.freq_base", get("freq_base", 10000.0), 0, 1e12)
    # Files from before scaling had a type say linear by giving a scale.
    old_factor = get("scale_linear", None)
    kind = get("scaling.type", "none" if old_factor is None else "linear")
    factor = number(path, "rope.scaling.factor", get("scaling.factor", old_factor or 1.0), 0, 1e6)
    old = get("scaling.original_context_length", 8192)
    freqs = header.tensors.get("rope_freqs.weight")
    if freqs is not None:
        return _llama3(header, freqs, theta, factor, old, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1):
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    raise CheckpointError(
        f"{path} scales its rotary positions by {str(kind)[:40]!r}; Pronk knows none, linear "
        f"and llama3"
    )


def _llama3(
    header: GgufHeader,
    freqs: StoredTensor,
    theta: float,
    factor: float,
    original: object,
    head_dim: int,
) -> RopeSpec:
    """The parameters of Llama 3.1's rule that give the stored divisors."""
    path = header.path
    if freqs.dtype != "f32" or freqs.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{path} has rope_freqs.weight of another shape than its heads call for"
        )
    raw = read_exact(header.fd, freqs.offset, freqs.nbytes, path).reshape(1, -1)
    stored = dequantize(raw, "f32", head_dim // 2)[0]
    if (stored == 1).all():
        return RopeSpec(theta=theta)
    # The file keeps only the result: the slowest frequency shows the factor itself.
    contexts = {8192, integer(path, "rope.scaling.original_context_length", original, 1, 1 << 30)}
    for value in (float(stored[-1]), factor, 8.0, 32.0):
        if not 1 < value <= 1e6:
            continue
        for context in contexts:
            rope = RopeSpec(theta, "llama3", value, 1.0, 4.0, context)
            if np.allclose(stored, rope_divisors(rope, head_dim), rtol=1e-4, atol=0):
                return rope
    raise CheckpointError(
        f"{path} has rotary divisors (rope_freqs.weight) that are not Llama 3.1's, the only "
        f"ones Pronk knows"
    )
