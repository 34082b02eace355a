"""Tokenizers of SentencePiece's kind: the ids are SentencePiece's own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    CORPUS,
    mixed_lines,
    tiny_gguf,
)
from tokenizer_checks import TEXTS, check_saved, load

from pronk.checkpoint.gguf_header import read_header
from pronk.checkpoint.tokenizer import Tokenizer
from pronk.checkpoint.tokenizer_gguf import from_gguf
from pronk.device.memory import resident_memory
from pronk.errors import CheckpointError


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_sentencepieces(tmp_path: Path, hf_dir: Path, prefix: bool) -> None:
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ids = range(model.vocab_size())
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in ids
    ]
    path = tiny_gguf(
        tmp_path / "m.gguf",
        hf_dir,
        tokenizer__ggml__model="llama",
        tokenizer__ggml__tokens=[model.id_to_piece(i) for i in ids],
        tokenizer__ggml__scores=[float(model.get_score(i)) for i in ids],
        tokenizer__ggml__token_type=kinds,
        tokenizer__ggml__merges=None,
        tokenizer__ggml__add_bos_token=None,
        tokenizer__ggml__add_space_prefix=prefix,
    )
    tokenizer = load(path)
    for text in [*CORPUS, *TEXTS]:
        if not text or "<|" in text:
            continue
        got = tokenizer.encode(text)
        assert got == [1, *model.encode(text)], text
        assert tokenizer.decode(got) == text
        streamed = b"".join(tokenizer.token_bytes(id) for id in got).decode()
        assert streamed == (" " + text if prefix else text)
    assert tokenizer.encode("a<s>b")[1:].count(1) == 1
    check_saved(tokenizer, tmp_path / "saved")


def small_pieces(tmp_path: Path, hf_dir: Path, arch: str, **fields: Any) -> Tokenizer:
    """The tokenizer of a GGUF file with a few pieces of SentencePiece's kind."""
    words = [("<unk>", 2), ("<s>", 3), ("<|end|>", 3), ("\u2581", 1), ("a", 1), ("\u2581a", 1)]
    tokens = [word for word, _ in words] + [f"<0x{byte:02X}>" for byte in range(256)]
    header = {
        "model": "llama",
        "tokens": tokens,
        "scores": [-float(id) for id in range(len(tokens))],
        "token_type": [kind for _, kind in words] + [6] * 256,
        "merges": None,
        "add_bos_token": None,
        "unknown_token_id": 0,
        **fields,
    }
    path = tiny_gguf(tmp_path / "m.gguf", hf_dir)
    changed = {f"tokenizer__ggml__{key}": value for key, value in header.items()}
    path = tiny_gguf(tmp_path / "m.gguf", hf_dir, **changed)
    fd = os.open(path, os.O_RDONLY)
    try:
        head = read_header(fd, path)
        head.metadata["general.architecture"] = arch
        return from_gguf(head, 320)
    finally:
        os.close(fd)


def test_phi3s_marks_take_the_white_space_behind_them(tmp_path: Path, hf_dir: Path) -> None:
    phi3 = small_pieces(tmp_path, hf_dir, "phi3")
    assert phi3.encode("a<|end|>\n \u00a0a") == [1, 5, 2, 5]
    assert phi3.encode("<s> a", add_special=False) == [1, 3, 5]
    assert phi3.eos_ids == {2}
    other = small_pieces(tmp_path, hf_dir, "llama")
    assert other.encode("a<|end|>\na") == [1, 5, 2, 3, 6 + 10, 4]
    assert other.encode("a<|end|>\na", parse_special=False)[2:-2] == [
        6 + byte for byte in b"<|end|>"
    ]
    check_saved(phi3, tmp_path / "saved")


def test_bytes_that_are_no_character(tmp_path: Path, hf_dir: Path) -> None:
    from tokenizers import Tokenizer as Library

    tokenizer = small_pieces(tmp_path, hf_dir, "llama")
    tokenizer.save(tmp_path / "saved")
    library = Library.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    for raw in (b"\xe4\xbd\xa0", b"\xe4\xbd", b"\xe4\xbda", b"\xff\xfe"):
        ids = [5, *(6 + byte for byte in raw), 4]
        assert tokenizer.decode(ids) == library.decode(ids)
        assert b"".join(tokenizer.token_bytes(id) for id in ids) == b" a" + raw + b"a"
    assert tokenizer.decode([1, 5, 2], skip_special=False) == "<s> a<|end|>"


def test_broken_pieces_are_refused(tmp_path: Path, hf_dir: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"scores": [0.0] * 3}, "without a score"),
        ({"scores": [float("nan")] * 262}, "no number"),
        ({"tokens": ["a"] * 262}, "holds the token 'a' twice"),
        ({"tokens": ["a" * 3000, *map(str, range(261))], "token_type": [1] * 262}, "3000 bytes"),
    ]
    for fields, words in bad:
        with pytest.raises(CheckpointError, match=words) as caught:
            small_pieces(tmp_path, hf_dir, "llama", **fields)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_real_gemma_tokenizer(tmp_path: Path, gemma: Path) -> None:
    from sentencepieces import processor
    from transformers import AddedToken, GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    fd = os.open(gemma, os.O_RDONLY)
    header = read_header(fd, gemma)
    before, start = resident_memory(), time.process_time()
    tokenizer = from_gguf(header, 262144)
    assert time.process_time() - start < 1  # 27 ms
    assert resident_memory() - before < 24e6  # 8 MB
    tokens = header.strings("tokenizer.ggml.tokens") or []
    scores, kinds = (
        header.numbers(f"tokenizer.ggml.{k}").tolist() for k in ("scores", "token_type")
    )
    os.close(fd)
    # llama.cpp's converter writes these with spaces, and the unknown piece as a control one.
    pieces = [t.replace(" ", "\u2581") if k == 4 else t for t, k in zip(tokens, kinds, strict=True)]
    model = processor(pieces, scores, [2 if id == 3 else k for id, k in enumerate(kinds)], False)
    # It also writes a score of -1000 for pieces that had the best.
    best = [0.0 if kind == 4 else s for s, kind in zip(scores, kinds, strict=True)]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = generate_merges(vocab, list(zip(pieces, best, strict=True)))
    reference = GemmaTokenizer(vocab, merges)
    marked = [(p, kind) for p, kind in zip(pieces, kinds, strict=True) if kind in (3, 4)]
    reference.add_tokens([AddedToken(p, special=k == 3, normalized=False) for p, k in marked])
    # The character that stands for a space is the one that cannot be told from it.
    lines = [line for line in mixed_lines(5001) if "\u2581" not in line]
    assert len(lines) == 5000
    for text in [*lines, *(" " * n + "x" + "\n" * n for n in range(70))]:
        ids = tokenizer.encode(text)
        assert ids == [2, *model.encode(text)] == [2, *reference(text).input_ids], text
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(id) for id in ids).decode() == text
    turns = "<start_of_turn>user\n  hi<end_of_turn>\n"
    assert tokenizer.encode(turns) == [2, 105, 2364, 107, 138, 2202, 106, 107]
    assert tokenizer.encode(turns)[1:] == reference(turns).input_ids
    assert tokenizer.encode(turns, parse_special=False)[1:] == model.encode(turns)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (262144, 2)
    assert tokenizer.eos_ids == {1, 106}  # the end of a turn, too
    check_saved(tokenizer, tmp_path / "saved")
