"""The tokenizer a GGUF file describes in its metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pronk.checkpoint.gguf_header import GgufHeader
from pronk.checkpoint.tokenizer import Tokenizer, guarded
from pronk.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["from_gguf"]

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_MAX_PIECE = 512
# Ends of a turn in files that name none, as llama.cpp finds them.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end_of_turn|>", "<end_of_turn>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = [rf"{_SUFFIX}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"]
_QWEN2 = [rf"{_SUFFIX}|{_WORDS}|\p{{N}}|{_REST}"]
_TEKKEN = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
]
_PLAIN = [_GPT2]
_DIGITS = [r"\p{N}", _GPT2]
_DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]

# What each kind splits a text by, one pattern after the other.
_PRE: dict[str, list[str]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4"), _PLAIN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"))
_COMPOSED = frozenset(("qwen2", "deepseek-r1-qwen", "megrez"))
# Families whose generation configs name these ends besides the end of a turn.
_TEXT_ENDS = {"qwen2": ("<|endoftext|>",)}


def from_gguf(header: GgufHeader, limit: int) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata, for a model of `limit` tokens."""
    path = header.path
    meta = header.metadata
    model = meta.get("tokenizer.ggml.model")
    tokens, vocab = header.vocabulary("tokenizer.ggml.tokens") or ([], {})
    if not tokens:
        raise CheckpointError(f"{path} holds no tokenizer (tokenizer.ggml.tokens)")
    if len(tokens) > limit:
        raise CheckpointError(f"{path} holds {len(tokens)} tokens, but its model has only {limit}")
    if len(vocab) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocab[token] != id)
        raise CheckpointError(f"{path} holds the token {twice[:40]!r} twice")
    kinds = _kinds(header, len(tokens))
    marked = [(id, kinds[id]) for id in np.flatnonzero(np.array(kinds, np.int32) != _NORMAL)]
    sentencepiece = model == "llama"

    def mark(name: str, default: int | None = None) -> int | None:
        id = meta.get(f"tokenizer.ggml.{name}_token_id", default)
        # 0xFFFFFFFF is how llama.cpp writes "none".
        if id is None or id in (-1, 0xFFFFFFFF):
            return None
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < len(tokens):
            raise CheckpointError(
                f"{path} gives its {name} token the id {str(id)[:40]}, but holds "
                f"{len(tokens)} tokens"
            )
        return id

    bos, eos = mark("bos", 1 if sentencepiece else None), mark("eos", 2 if sentencepiece else None)
    unk, pad = mark("unknown", 0 if sentencepiece else None), mark("padding")
    ends = {id for id in (eos, mark("eot"), mark("eom")) if id is not None}
    named = [*_TURN_ENDS, *_TEXT_ENDS.get(str(meta.get("tokenizer.ggml.pre")), ())]
    ends.update(vocab[t] for t in named if t in vocab and kinds[vocab[t]] == _CONTROL)
    with guarded(f"{path} holds a tokenizer that Pronk cannot load"):
        if sentencepiece:
            backend = _sentencepiece(header, tokens, vocab, kinds, unk)
            add_bos = True
        elif model == "gpt2":
            backend, add_bos = _byte_level(header, vocab)
        else:
            raise CheckpointError(
                f"{path} has a tokenizer of unknown model {str(model)[:40]!r}; Pronk knows gpt2 "
                f"and llama"
            )
        special = [tokens[id] for id, kind in marked if kind in (_CONTROL, _UNKNOWN)]
        special += [tokens[id] for id in (bos, eos) if id is not None and kinds[id] == _NORMAL]
        _add(backend, special, special=True)
        _add(backend, [tokens[id] for id, kind in marked if kind == _USER])
        before = [bos] if meta.get("tokenizer.ggml.add_bos_token", add_bos) else []
        after = [eos] if meta.get("tokenizer.ggml.add_eos_token", False) else []
        _surround(backend, tokens, before, after)
    template = meta.get("tokenizer.chat_template")

    def text(id: int | None) -> str:
        return "" if id is None else tokens[id]

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


def _kinds(header: GgufHeader, count: int) -> list[int]:
    array = header.numbers("tokenizer.ggml.token_type")
    if array is None:
        return [_NORMAL] * count
    if len(array) != count:
        raise CheckpointError(f"{header.path} holds {count} tokens but {len(array)} token types")
    kinds: list[int] = array.tolist()
    return kinds


def _add(backend: Backend, tokens: Sequence[str], special: bool = False) -> None:
    from tokenizers import AddedToken

    added = [AddedToken(t, special=special, normalized=False) for t in tokens if t]
    if special:
        backend.add_special_tokens(added)
    else:
        backend.add_tokens(added)


def _surround(
    backend: Backend, tokens: list[str], before: list[int | None], after: list[int | None]
) -> None:
    """Have every text begin and end with the given tokens."""
    from tokenizers.processors import TemplateProcessing

    first = [(tokens[id], id) for id in before if id is not None]
    last = [(tokens[id], id) for id in after if id is not None]
    if not first and not last:
        return
    single = [f"{t}:0" for t, _ in first] + ["$A:0"] + [f"{t}:0" for t, _ in last]
    pair = [piece.replace("$A:0", "$B:1").removesuffix(":0") for piece in single]
    pair = [p if p == "$B:1" else f"{p}:1" for p in pair]
    backend.post_processor = TemplateProcessing(
        single=single, pair=single + pair, special_tokens=list(dict.fromkeys(first + last))
    )


def _byte_level(header: GgufHeader, vocab: dict[str, int]) -> tuple[Backend, bool]:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    path = header.path
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE:
        raise CheckpointError(
            f"{path} splits text by the unknown rule {str(pre)[:40]!r} (tokenizer.ggml.pre); "
            f"Pronk knows {', '.join(sorted(_PRE))}"
        )
    # A space comes as Ġ, so only a separating one is left; the first half is never empty.
    pairs = header.pairs("tokenizer.ggml.merges")
    if pairs is None:
        raise CheckpointError(f"{path} holds a gpt2 tokenizer without merges")
    whole = pre in _WHOLE_WORDS_FIRST
    backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole))
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PRE[pre]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, whole


def _sentencepiece(
    header: GgufHeader,
    tokens: list[str],
    vocab: dict[str, int],
    kinds: list[int],
    unk: int | None,
) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    scores = header.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(
            f"{header.path} holds a llama tokenizer without a score for each token"
        )
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges(header, tokens, vocab, kinds, scores.tolist()),
            unk_token=None if unk is None else tokens[unk],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("\u2581")] if prefix else []
    steps.append(normalizers.Replace(" ", "\u2581"))
    backend.normalizer = normalizers.Sequence(steps)
    back: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        back.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(back)
    return backend


def _merges(
    header: GgufHeader,
    tokens: list[str],
    vocab: dict[str, int],
    kinds: list[int],
    scores: list[float],
) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: any two pieces merge into a third, the best score first."""
    plain = {t: id for t, id in vocab.items() if kinds[id] == _NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for token, id in plain.items():
        if len(token) > _MAX_PIECE:
            raise CheckpointError(f"{header.path} holds a token of {len(token)} characters")
        for cut in range(1, len(token)):
            left = plain.get(token[:cut])
            if left is None:
                continue
            right = plain.get(token[cut:])
            if right is not None:
                found.append((-scores[id], left, right, token[:cut], token[cut:]))
    found.sort()
    return [(left, right) for *_, left, right in found]
