"""Hugging Face directories and bundles: read right, and refused in one sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import hf_tensors, tiny_dir, tiny_llama_dir

from pronk.checkpoint.blocks import quantize
from pronk.checkpoint.open import open_checkpoint
from pronk.errors import CheckpointError
from pronk.spec import Budget


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("hf"), tie_word_embeddings=False)


@pytest.fixture
def hf_dir(tmp_path: Path, source: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def change(path: Path, **fields: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    config.update(fields)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", [None, "100KB"])
def test_rows_are_the_stored_weights(tmp_path: Path, dtype: str, shard: str | None) -> None:
    tiny_llama_dir(tmp_path, dtype=dtype, shard=shard, attention_bias=True)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard is not None)
    weights = hf_tensors(tmp_path)
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "safetensors" and checkpoint.spec.attention_bias
        assert set(checkpoint.tensors) == set(weights) - {"lm_head.weight"}
        for name, info in checkpoint.tensors.items():
            want = quantize(weights[name].reshape(info.rows, info.cols), short)
            assert info.dtype == short
            np.testing.assert_array_equal(checkpoint.read_rows(name, 0, info.rows), want)
            if info.rows > 9:
                np.testing.assert_array_equal(checkpoint.read_rows(name, 4, 9), want[4:9])


def test_config_layouts_old_and_new(hf_dir: Path) -> None:
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 256
    new = {**rope, "rope_type": "llama3", "rope_theta": 5e5}
    with open_checkpoint(change(hf_dir, rope_parameters=new)) as checkpoint:
        first = checkpoint.spec.ropes[0]
    old = {**rope, "type": "llama3"}
    change(hf_dir, rope_parameters=None, rope_scaling=old, rope_theta=5e5)
    with open_checkpoint(hf_dir) as checkpoint:
        second = checkpoint.spec.ropes[0]
    assert first == second
    assert (first.kind, first.theta, first.original_context) == ("llama3", 5e5, 256)
    change(hf_dir, rope_scaling={"type": "linear", "factor": 2.0}, head_dim=None)
    with open_checkpoint(hf_dir) as checkpoint:
        assert (checkpoint.spec.ropes[0].kind, checkpoint.spec.ropes[0].factor) == ("linear", 2.0)
        assert checkpoint.spec.head_dim == 16


def test_the_window_of_mistral(hf_dir: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    for window in (None, 512, 4096, 128):
        with open_checkpoint(change(hf_dir, **mistral, sliding_window=window)) as checkpoint:
            spec = checkpoint.spec
            assert spec.family == "mistral"
            seen = ("window", 128) if window == 128 else ("global", 0)
            assert {(layer.attention, layer.window) for layer in spec.layers} == {seen}


def test_a_stray_head_of_a_tied_model_is_left_out(hf_dir: Path) -> None:
    with open_checkpoint(change(hf_dir, tie_word_embeddings=True)) as checkpoint:
        assert checkpoint.spec.tie_embeddings and "lm_head.weight" not in checkpoint.tensors


def test_a_tied_bundle_embeds_with_its_head(hf_dir: Path) -> None:
    weights = hf_tensors(hf_dir)
    (hf_dir / "pronk.json").write_text('{"format": 1, "tied": true}')
    with open_checkpoint(hf_dir) as checkpoint:
        assert checkpoint.format == "bundle" and checkpoint.spec.tie_embeddings
        assert "lm_head.weight" not in checkpoint.tensors
        embedded = checkpoint.read_float("model.embed_tokens.weight", 5, 9)
        np.testing.assert_array_equal(embedded, weights["lm_head.weight"][5:9])
        assert not np.array_equal(embedded, weights["model.embed_tokens.weight"][5:9])
    (hf_dir / "pronk.json").write_text('{"format": 1, "tied": false}')
    with open_checkpoint(hf_dir) as checkpoint:
        assert checkpoint.format == "bundle" and not checkpoint.spec.tie_embeddings
        assert checkpoint.budget is None
    fitted = {"format": 1, "tied": False, "budget": {"memory": 10**8, "context": 256},
              "plan": {"overhead": 5}}  # fmt: skip
    (hf_dir / "pronk.json").write_text(json.dumps(fitted))
    with open_checkpoint(hf_dir) as checkpoint:
        assert checkpoint.budget == Budget(memory=10**8, context=256, overhead=5)
    (hf_dir / "pronk.json").write_text('{"format": 1, "budget": {"memory": "1G"}}')
    with pytest.raises(CheckpointError, match="budget"):
        open_checkpoint(hf_dir)
    (hf_dir / "pronk.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match="bundle of format 2"):
        open_checkpoint(hf_dir)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["MambaForCausalLM"]}, "unknown architecture 'MambaForCausalLM'"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": 5000}, "no tensor 'model.layers.2"),
    ({"num_hidden_layers": 1}, "no part of"),
    ({"num_hidden_layers": True}, "whole number"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"vocab_size": 319}, "shape"),
    ({"num_key_value_heads": 3}, "no multiple"),
    ({"head_dim": 15}, "odd"),
    ({"rms_norm_eps": "tiny"}, "norm epsilon"),
    ({"rms_norm_eps": float("nan")}, "norm epsilon"),
    ({"attention_bias": True}, "bias"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "abf"}}, "'abf'; Pronk knows default, linear, dynamic"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "four"}}, "factor"),
    ({"hidden_act": "relu6"}, "'relu6'; Pronk knows silu"),
    ({"layer_weights": [0, 2]}, "layer_weights"),
    ({"layer_weights": [1, 0]}, "layer_weights|none of its own"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
    ({"rope_parameters": []}, "object"),
    ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
]


def test_a_window_that_is_off_or_wide_is_none(tmp_path: Path) -> None:
    path = tiny_dir(tmp_path, "qwen2")
    config = json.loads((path / "config.json").read_text())
    for fields in (
        {"sliding_window": 64, "use_sliding_window": False},
        {"sliding_window": 64, "use_sliding_window": None},
        {"sliding_window": 512, "use_sliding_window": True},
    ):
        kept = {key: value for key, value in fields.items() if value is not None}
        config.pop("use_sliding_window", None)
        (path / "config.json").write_text(json.dumps(config | kept))
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.spec.family == "qwen2" and not checkpoint.spec.output_bias
            assert {layer.attention for layer in checkpoint.spec.layers} == {"global"}
    on = {"sliding_window": 64, "use_sliding_window": True, "layer_types": None}
    with open_checkpoint(change(path, **on, max_window_layers=1)) as checkpoint:
        assert [layer.window for layer in checkpoint.spec.layers] == [0, 64]


def test_configs_that_are_refused(hf_dir: Path) -> None:
    config = (hf_dir / "config.json").read_text()
    for fields, words in CONFIGS:
        (hf_dir / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(change(hf_dir, **fields))
        assert "\n" not in str(caught.value)


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FILES: list[tuple[bytes, str]] = [
    (b"1234", "truncated"),
    (raw(b"{}", length=10**10), "claims a header of 10000000000 bytes, but the file has 10"),
    (raw(b"[1]"), "no JSON object"),
    (raw(b"{broken"), "broken JSON"),
    (raw(b'{"a": 1, "a": 2}'), "twice"),
    (raw(b"[" * 200_000), "broken JSON"),
    (raw(b'{"a": ' + b"9" * 5000 + b"}"), "broken JSON"),
    (raw({"a": 1}), "object"),
    (raw({"a": entry([4], [0, 16], "F8_E9")}, bytes(16)), "F8_E9"),
    (raw({"a": entry([4], [0, 16], ["F32"])}, bytes(16)), "cannot read"),
    (raw({"a": entry([5], [0, 16])}, bytes(16)), "16 bytes where its shape takes 20"),
    (raw({"a": entry([1 << 62, 4], [0, 16])}, bytes(16)), "cannot hold"),
    (raw({"a": entry([-4], [0, 16])}, bytes(16)), "cannot hold"),
    (raw({"a": entry([4], [8, 24])}, bytes(16)), "truncated or damaged: tensor 'a'"),
    (raw({"a": entry([4], [1 << 70, 1])}, bytes(16)), "outside"),
    (raw({"a": entry([4], [0, 16]), "b": entry([4], [8, 24])}, bytes(24)), "overlapping"),
    (raw({"a": entry([4], [0, 16], "I32")}, bytes(16)), "type I32"),
    (raw({"model.layers.0.x.weight": entry([4], [0, 16])}, bytes(16)), "no tensor"),
]


def test_files_that_are_refused(hf_dir: Path) -> None:
    for data, words in FILES:
        (hf_dir / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(hf_dir)
        assert "\n" not in str(caught.value)


def test_a_header_of_ten_gigabytes_in_one_sentence(hf_dir: Path) -> None:
    file = hf_dir / "model.safetensors"
    file.write_bytes(raw(b"{}", length=10**10))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(hf_dir)
    assert str(caught.value) == (
        f"{file} is truncated or damaged: it claims a header of 10000000000 bytes, but the file "
        f"has 10"
    )


def test_a_huge_header_of_a_huge_file_is_refused_unread(hf_dir: Path) -> None:
    with (hf_dir / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 10**10))
        file.truncate(2 * 10**10)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match="above the limit of 100000000"):
        open_checkpoint(hf_dir)


def test_shards_stay_in_their_directory(tmp_path: Path) -> None:
    tiny_llama_dir(tmp_path, shard="100KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    for shard in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", 7, "x"):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], name: shard}}))
        with pytest.raises(CheckpointError, match=r"plain file name|no safetensors file"):
            open_checkpoint(tmp_path)
    index.write_text(
        json.dumps({"weight_map": {**good["weight_map"], "made.up": good["weight_map"][name]}})
    )
    with pytest.raises(CheckpointError, match=r"no tensor 'made\.up'"):
        open_checkpoint(tmp_path)


def test_directories_that_are_no_checkpoints(tmp_path: Path, hf_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(hf_dir)
    with pytest.raises(CheckpointError, match="give the directory"):
        open_checkpoint(hf_dir / "model.safetensors")
