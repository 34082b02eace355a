"""What any tokenizer is held to: exact bytes, and what it saves loads in transformers."""

from __future__ import annotations

from pathlib import Path

from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.tokenizer import Tokenizer

TEXTS = [
    "def f(x):\n    return x**2 + 10_000  # it's WE'RE can't\n",
    "你好，世界！今天天气很好。日本語 かな 한국어",  # noqa: RUF001 (full-width marks are meant)
    "🙂👩‍👩‍👧 emoji é ñ ü ½ ² ٣",
    "a   b \t\n\n  c \r\n   trailing   ",
    "12345 3.14 0x1F",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    " ",
]


def load(path: Path) -> Tokenizer:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.load_tokenizer()


def check_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids, skip_special=False) == text
        plain = b"".join(tokenizer.token_bytes(id) for id in ids)
        assert plain.decode() == tokenizer.decode(ids)


def check_saved(tokenizer: Tokenizer, directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(directory)
    assert not list(directory.glob(".*.tmp"))
    loaded = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer.encode(text)
    assert loaded.eos_token_id in tokenizer.eos_ids
    assert loaded.bos_token_id == tokenizer.bos_id
    assert loaded.chat_template == tokenizer.chat_template
