"""GGUF files: the same model as the Hugging Face directory, and damage in one sentence."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import hf_tensors, tiny_dir, tiny_gguf, tiny_llama_dir

from pronk.checkpoint.blocks import quantize
from pronk.checkpoint.open import open_checkpoint
from pronk.errors import CheckpointError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(
        tmp_path_factory.mktemp("hf"), tie_word_embeddings=False, attention_bias=True
    )


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_rows_are_those_of_hugging_face(tmp_path: Path, hf_dir: Path, dtype: str) -> None:
    weights = hf_tensors(hf_dir)
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", hf_dir, dtype)) as checkpoint:
        assert set(checkpoint.tensors) == set(weights)
        for name, info in checkpoint.tensors.items():
            want = weights[name].reshape(info.rows, info.cols)
            assert info.shape == weights[name].shape
            assert info.dtype == (dtype if len(info.shape) == 2 else "f32")
            rows = checkpoint.read_rows(name, 0, info.rows)
            np.testing.assert_array_equal(rows, quantize(want, info.dtype), err_msg=name)
            assert rows.nbytes == info.nbytes
            if info.rows > 1:
                for start, stop in [(0, 1), (5, 23), (7, 7), (info.rows - 1, info.rows)]:
                    part = checkpoint.read_rows(name, start, stop)
                    np.testing.assert_array_equal(part, rows[start:stop], err_msg=name)


def test_spec_is_that_of_the_config(tmp_path: Path, hf_dir: Path, tied_dir: Path) -> None:
    qwen_dir = tiny_dir(tmp_path / "qwen", "qwen2", tie_word_embeddings=False)
    for directory in (hf_dir, tied_dir, qwen_dir):
        with open_checkpoint(directory) as hf:
            theirs = hf.spec
        with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", directory)) as checkpoint:
            spec = checkpoint.spec
        assert checkpoint.format == "gguf"
        for field in ("family", "vocab_size", "hidden_size", "intermediate_size", "num_heads"):
            assert getattr(spec, field) == getattr(theirs, field)
        for field in ("num_kv_heads", "head_dim", "context_length", "layers", "ropes"):
            assert getattr(spec, field) == getattr(theirs, field)
        assert spec.tie_embeddings == theirs.tie_embeddings == (directory == tied_dir)
        assert spec.attention_bias == theirs.attention_bias == (directory != tied_dir)
        assert spec.output_bias == theirs.output_bias == (directory == hf_dir)
        assert spec.norm_eps == pytest.approx(theirs.norm_eps)


def test_llama3_divisors_give_the_rule(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "hf", rope_parameters=LLAMA3, head_dim=64)
    path = tiny_gguf(tmp_path / "m.gguf", directory)
    with open_checkpoint(path) as checkpoint, open_checkpoint(directory) as hf:
        assert checkpoint.spec.ropes[0] == hf.spec.ropes[0]
        assert checkpoint.spec.ropes[0].kind == "llama3" and checkpoint.spec.ropes[0].factor == 32
    data = path.read_bytes()
    reader = gguf.GGUFReader(path)
    at = next(t.data_offset for t in reader.tensors if t.name == "rope_freqs.weight")
    path.write_bytes(data[:at] + struct.pack("<f", 1.5) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"not Llama 3\.1's"):
        open_checkpoint(path)


def test_linear_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    directory = tiny_llama_dir(tmp_path / "hf", rope_parameters=rope)
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", directory)) as checkpoint:
        assert (checkpoint.spec.ropes[0].kind, checkpoint.spec.ropes[0].factor) == ("linear", 4.0)


def test_head_count_kv_absent_or_an_array(tmp_path: Path, tied_dir: Path) -> None:
    key = "llama__attention__head_count_kv"
    full = tiny_llama_dir(tmp_path / "full", num_key_value_heads=4)
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", full, **{key: None})) as checkpoint:
        assert checkpoint.spec.num_kv_heads == 4
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", tied_dir, **{key: [2, 2]})) as checkpoint:
        assert checkpoint.spec.num_kv_heads == 2
    with pytest.raises(CheckpointError, match="layers that differ in attention"):
        open_checkpoint(tiny_gguf(tmp_path / "m.gguf", tied_dir, **{key: [2, 4]}))


def sentence(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 + len(str(path))
    return text.replace(str(path), "FILE")


def test_a_truncated_header(tmp_path: Path, tied_dir: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", tied_dir)
    path.write_bytes(path.read_bytes()[:2000])
    assert sentence(path) == (
        "FILE is truncated: its header runs past the end of the file at byte 2000, "
        "so fetch it again"
    )


def test_truncated_data_or_an_offset_past_the_end(tmp_path: Path, tied_dir: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", tied_dir)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert sentence(path).startswith("FILE is truncated or damaged: tensor 'output_norm.weight'")
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8 + 4  # name, count, dimension, type, offset
    path.write_bytes(data[:at] + struct.pack("<Q", 1 << 40) + data[at + 8 :])
    start = gguf.GGUFReader(tiny_gguf(tmp_path / "good.gguf", tied_dir)).data_offset
    assert sentence(path) == (
        f"FILE is truncated or damaged: tensor 'output_norm.weight' ends at byte "
        f"{start + (1 << 40) + 256}, but the file ends at byte {len(data)}, so fetch it again"
    )


def test_an_unknown_architecture(tmp_path: Path, tied_dir: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", tied_dir, general__architecture="mamba")
    assert sentence(path) == (
        "FILE has the unknown architecture 'mamba'; Pronk knows llama, llama4, smollm3, qwen2, "
        "qwen3, qwen3moe, olmoe, gemma2, gemma3, phi3, mpt, granite (the files of Mistral and "
        "Mixtral call themselves llama)"
    )


def header(*pairs: bytes, tensors: int = 0, count: int | None = None, version: int = 3) -> bytes:
    count = len(pairs) if count is None else count
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, count) + b"".join(pairs)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    raw = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return raw + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


BROKEN = {
    "nested arrays, above": header(
        pair("a", 9, struct.pack("<IQ", 9, 5000) + struct.pack("<IQ", 0, 0) * 5000)
    ),
    "metadata values, above": header(count=70_000) + bytes(13 * 70_000),
    "no GGUF file": b"PK\x03\x04" + bytes(60),
    "version 1": header(version=1),
    "big-endian": header(version=3 << 24),
    "runs past": header(tensors=1 << 60),
    "header runs past": header(count=1 << 63),
    "past the end": header(pair("a", 8, struct.pack("<Q", 1 << 62))) + bytes(64),
    "past the end of": header(pair("a", 9, struct.pack("<IQ", 8, 1 << 61))) + bytes(64),
    "past the end of the file": header(pair("a", 9, struct.pack("<IQ", 12, 1 << 61))) + bytes(64),
    "deeper than 4": header(pair("a", 9, nested(5))),
    "twice": header(pair("a", 0, b"\0"), pair("a", 0, b"\0")),
    "unknown type 77": header(pair("a", 77, bytes(8))),
    "general.alignment": header(pair("general.alignment", 4, struct.pack("<I", 24))),
    "alignment as 0": header(pair("general.alignment", 4, struct.pack("<I", 0))),
    "UTF-8": header(pair("a", 8, struct.pack("<Q", 2) + b"\xff\xff")),
    "the tensor 'x' twice": header(tensors=2) + tensor("x", (4,)) * 2 + bytes(64),
    "0 dimensions": header(tensors=1) + tensor("x", ()) + bytes(64),
    "cannot hold": header(tensors=1) + tensor("x", (1 << 33, 1 << 33)) + bytes(64),
    "cannot hold$": header(tensors=1) + tensor("x", (0, 1)) + bytes(64),
    "no multiple of the q4_0": header(tensors=1) + tensor("x", (48,), 2) + bytes(64),
    "off its alignment": header(tensors=1) + tensor("x", (1,), 0, 8) + bytes(64),
    "type 99": header(tensors=1) + tensor("x", (1,), 99) + bytes(64),
    "overlapping": header(tensors=2) + tensor("x", (16,)) + tensor("y", (16,), 0, 32) + bytes(256),
    "not name its architecture": header(),
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_headers(tmp_path: Path, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(BROKEN[words])
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


@pytest.mark.parametrize("alignment", [8, 4096])
def test_general_alignment_is_honoured(tmp_path: Path, tied_dir: Path, alignment: int) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", tied_dir, general__alignment=alignment)
    with open_checkpoint(path) as checkpoint:
        got = checkpoint.read_float("model.norm.weight")[0]
    np.testing.assert_array_equal(got, hf_tensors(tied_dir)["model.norm.weight"])


def test_sizes_must_agree_with_the_tensors(tmp_path: Path, tied_dir: Path) -> None:
    for key, value, words in [
        ("llama__block_count", 3, "no tensor 'model.layers.2"),
        ("llama__block_count", 1, "no part of"),
        ("llama__block_count", 1_000_000_000, "block|layers|num_layers"),
        ("llama__feed_forward_length", 192, "shape"),
        ("llama__attention__head_count", 0, "head count"),
        ("llama__attention__head_count", 3, "key-value heads"),
        ("llama__attention__value_length", 8, "value_length"),
        ("llama__rope__freq_base", float("nan"), "freq_base"),
        ("llama__vocab_size", 7, "claims 7 tokens"),
        ("llama__expert_count", 8, "experts of a token"),
        ("llama__attention__clamp_kqv", 1.0, "clamp_kqv"),
        ("llama__attention__sliding_window", -1.0, "sliding_window"),
        ("llama__rope__scaling__type", "su", "'su'; Pronk knows none, linear, yarn, longrope"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tiny_gguf(tmp_path / "m.gguf", tied_dir, **{key: value}))


def test_rows_out_of_range_and_unknown_names(tmp_path: Path, tied_dir: Path) -> None:
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", tied_dir)) as checkpoint:
        with pytest.raises(ValueError, match="out of range"):
            checkpoint.read_rows("model.norm.weight", 0, 2)
        with pytest.raises(CheckpointError, match="no tensor named"):
            checkpoint.read_float("lm_head.weight")


def test_things_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="no regular file"):
        open_checkpoint(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "missing.gguf")


def test_the_real_file(smollm2: Path) -> None:
    with open_checkpoint(smollm2) as checkpoint:
        spec = checkpoint.spec
        assert (spec.num_layers, spec.hidden_size) == (30, 576)
        assert (spec.num_heads, spec.num_kv_heads) == (9, 3)
        assert spec.tie_embeddings and spec.ropes[0].theta == 100000
        assert checkpoint.tensors["model.embed_tokens.weight"].dtype == "q8_0"
        q = checkpoint.read_float("model.layers.3.self_attn.q_proj.weight")
        part = checkpoint.read_float("model.layers.3.self_attn.q_proj.weight", 70, 130)
        np.testing.assert_array_equal(part, q[70:130])
        raw = checkpoint.header.tensors["blk.3.attn_q.weight"]
        rows = np.fromfile(smollm2, np.uint8, raw.nbytes, offset=raw.offset).reshape(576, -1)
        stored = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q4_1)
        pairs = stored.reshape(9, 32, 2, 576)
        np.testing.assert_array_equal(q.reshape(9, 2, 32, 576), pairs.swapaxes(1, 2))
