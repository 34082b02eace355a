"""The tokenizer a GGUF file describes in its metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.gguf_header import GgufHeader
from pronk.checkpoint.tokenizer import Tokenizer, guarded
from pronk.checkpoint.tokenizer_backends import (
    CONTROL,
    UNKNOWN,
    USER,
    Backend,
    LibraryBackend,
    add_tokens,
    surround,
)
from pronk.checkpoint.tokenizer_pieces import read_pieces
from pronk.checkpoint.tokenizer_splits import COMPOSED, SPLITS, WHOLE_WORDS_FIRST
from pronk.errors import CheckpointError

__all__ = ["from_gguf"]

_NORMAL = 1
# Ends of a turn in files that name none, as llama.cpp finds them.
_TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
)
# Kinds whose generation configs name these ends besides the end of a turn.
_TEXT_ENDS = {
    "qwen2": ("<|endoftext|>",),
    "llama-bpe": ("<|end_of_text|>", "<|eom_id|>"),
    "llama4": ("<|end_of_text|>", "<|eom|>"),
    "phi3": ("<|endoftext|>",),
}


def from_gguf(header: GgufHeader, limit: int) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata, for a model of `limit` tokens."""
    path, meta = header.path, header.metadata
    model = meta.get("tokenizer.ggml.model")
    count = header.count("tokenizer.ggml.tokens")
    if not count:
        raise CheckpointError(f"{path} holds no tokenizer (tokenizer.ggml.tokens)")
    if count > limit:
        raise CheckpointError(f"{path} holds {count} tokens, but its model has only {limit}")
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path} has a tokenizer of unknown model {str(model)[:40]!r}; Pronk knows "
            "gpt2 and llama"
        )
    sentencepiece = model == "llama"
    kinds = _kinds(header, count)

    def mark(name: str, default: int | None = None) -> int | None:
        id = meta.get(f"tokenizer.ggml.{name}_token_id", default)
        # 0xFFFFFFFF is how llama.cpp writes "none".
        if id is None or id in (-1, 0xFFFFFFFF):
            return None
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < count:
            raise CheckpointError(
                f"{path} gives its {name} token the id {str(id)[:40]}, but holds {count} tokens"
            )
        return id

    bos, eos = mark("bos", 1 if sentencepiece else None), mark("eos", 2 if sentencepiece else None)
    unk, pad = mark("unknown", 0 if sentencepiece else None), mark("padding")
    ends = {id for id in (eos, mark("eot"), mark("eom")) if id is not None}
    pre = str(meta.get("tokenizer.ggml.pre", "default"))
    add_bos = meta.get("tokenizer.ggml.add_bos_token", sentencepiece or pre in WHOLE_WORDS_FIRST)
    before = [bos] if bos is not None and add_bos else []
    after = [eos] if eos is not None and meta.get("tokenizer.ggml.add_eos_token", False) else []
    # The beginning and the end of a text are never words.
    for id in (bos, eos):
        if id is not None and kinds[id] == _NORMAL:
            kinds[id] = CONTROL
    with guarded(f"{path} holds a tokenizer that Pronk cannot load"):
        backend: Backend = (
            read_pieces(header, kinds, unk, before, after)
            if sentencepiece
            else _byte_level(header, kinds, before, after)
        )
    kind = str(meta.get("general.architecture")) if sentencepiece else pre
    named = [*_TURN_ENDS, *_TEXT_ENDS.get(kind, ())]
    found = (backend.find(token) for token in named)
    ends.update(id for id in found if id is not None and kinds[id] == CONTROL)
    template = meta.get("tokenizer.chat_template")

    def text(id: int | None) -> str:
        return "" if id is None else backend.token(id)

    return Tokenizer(
        backend,
        limit=limit,
        bos_token=text(bos),
        eos_token=text(eos),
        unk_token=text(unk),
        pad_token=text(pad),
        eos_ids=ends,
        chat_template=template if isinstance(template, str) else None,
        where=path,
    )


def _kinds(header: GgufHeader, count: int) -> NDArray[np.uint8]:
    array = header.numbers("tokenizer.ggml.token_type")
    if array is None:
        return np.full(count, _NORMAL, np.uint8)
    if len(array) != count:
        raise CheckpointError(f"{header.path} holds {count} tokens but {len(array)} token types")
    return np.where((array >= 0) & (array <= 6), array, 0).astype(np.uint8)


def _byte_level(
    header: GgufHeader, kinds: NDArray[np.uint8], before: Sequence[int], after: Sequence[int]
) -> LibraryBackend:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    path = header.path
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise CheckpointError(
            f"{path} splits text by the unknown rule {str(pre)[:40]!r} (tokenizer.ggml.pre); "
            f"Pronk knows {', '.join(sorted(SPLITS))}"
        )
    tokens, vocab = header.vocabulary("tokenizer.ggml.tokens") or ([], {})
    if len(vocab) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocab[token] != id)
        raise CheckpointError(f"{path} holds the token {twice[:40]!r} twice")
    # A space comes as Ġ, so only a separating one is left; the first half is never empty.
    pairs = header.pairs("tokenizer.ggml.merges")
    if pairs is None:
        raise CheckpointError(f"{path} holds a gpt2 tokenizer without merges")
    whole = pre in WHOLE_WORDS_FIRST
    library = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole))
    if pre in COMPOSED:
        library.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[pre]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    library.decoder = decoders.ByteLevel()
    marked = [(tokens[id], kinds[id]) for id in np.flatnonzero(kinds != _NORMAL)]
    add_tokens(library, [token for token, kind in marked if kind in (CONTROL, UNKNOWN)], True)
    add_tokens(library, [token for token, kind in marked if kind == USER])
    surround(library, [(tokens[id], id) for id in before], [(tokens[id], id) for id in after])
    return LibraryBackend(library)
