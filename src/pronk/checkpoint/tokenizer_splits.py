"""What byte-level tokenizers split a text by before they look for words: data, nothing else."""

from __future__ import annotations

__all__ = ["COMPOSED", "SPLITS", "WHOLE_WORDS_FIRST"]

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
_GPT4O = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
]
_BLOOM = [r" ?[^(\s|.,!?…。，、।۔،)]+"]  # noqa: RUF001 (full-width marks are meant)
_PLAIN = [_GPT2]
_DIGITS = [r"\p{N}", _GPT2]
_DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "falcon-h1", "lfm2")

# What each kind splits a text by, one pattern after the other: the names are llama.cpp's.
# SmolLM3 is written as smaug-bpe, OLMo 2 as dbrx, Granite 3 as refact, Phi-4-mini as gpt-4o.
SPLITS: dict[str, list[str]] = {
    "default": _DEFAULT,
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4", "trillion", "jais"), _PLAIN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), _BLOOM),
    "tekken": _TEKKEN,
}
WHOLE_WORDS_FIRST = frozenset((*_LLAMA3_NAMES, "tekken"))
COMPOSED = frozenset(("qwen2", "deepseek-r1-qwen", "megrez", "olmo", "mpt"))
