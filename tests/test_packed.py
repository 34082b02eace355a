"""Packed weights agree with the compressed-tensors package in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import hf_tensors, tiny_llama_dir
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.fp8 import row_scales, to_e4m3, unpack_e4m3
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.packed import assemble, narrow, pack_blocks, widen
from pronk.errors import CheckpointError


def scheme(bits: int, symmetric: bool, group: int | None) -> QuantizationScheme:
    strategy = "group" if group else "channel"
    weights = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def blocks_of(dtype: str, rows: int, cols: int) -> np.ndarray:
    x = np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32)
    return quantize(x, dtype)


@pytest.mark.parametrize(("dtype", "bits"), [("q8_0", 8), ("q4_0", 4)])
@pytest.mark.parametrize("rows", [16, 13])
def test_what_we_pack_compressed_tensors_unpacks(dtype: str, bits: int, rows: int) -> None:
    blocks = blocks_of(dtype, rows, 96)
    packed = pack_blocks(blocks, 96)
    assert packed["weight_scale"].dtype == np.float16
    words = packed["weight_packed"].view(np.uint8)
    scale = packed["weight_scale"].astype(np.float32)
    np.testing.assert_array_equal(assemble(words, scale, None, dtype), blocks)
    packed["weight_shape"] = np.array([rows, 96])
    state = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in packed.items()}
    state["weight_scale"] = state["weight_scale"].float()
    plain = PackedQuantizationCompressor.decompress(state, scheme(bits, True, 32))
    np.testing.assert_array_equal(dequantize(blocks, dtype, 96), plain["weight"].numpy())


CASES = [(8, True, 32), (8, True, None), (4, True, 64), (4, True, 32), (4, False, 32)]
CASES += [(4, False, None), (3, True, 64), (2, True, 32), (3, True, None)]


def packed_dir(path: Path, bits: int, symmetric: bool, group: int | None) -> dict[str, Any]:
    """A tiny checkpoint compressed by compressed-tensors; what it decompresses to."""
    tiny_llama_dir(path, tie_word_embeddings=False, intermediate_size=128)
    plan = scheme(bits, symmetric, group)
    out, expected = {}, {}
    for name, weight in hf_tensors(path).items():
        tensor = torch.from_numpy(weight)
        if "_proj" not in name:
            out[name], expected[name] = tensor, weight
            continue
        parts = tensor.reshape(len(tensor), -1, group or tensor.shape[1])
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        if symmetric:
            scale, zero = torch.maximum(-low, high) / (2 ** (bits - 1) - 1), torch.zeros_like(low)
        else:
            scale = (high - low) / (2**bits - 1)
            zero = torch.round(-low / scale) - 2 ** (bits - 1)
        scale = scale.half().float()
        state = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        state = PackedQuantizationCompressor.compress(state, plan)
        module = name.removesuffix(".weight")
        plain = PackedQuantizationCompressor.decompress(dict(state), plan)["weight"]
        expected[name] = plain.numpy()
        state["weight_scale"] = scale.half()
        out.update({f"{module}.{key}": value.contiguous() for key, value in state.items()})
    save_file(out, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": json.loads(plan.model_dump_json())},
    }
    (path / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize(("bits", "symmetric", "group"), CASES)
def test_reads_what_compressed_tensors_wrote(
    tmp_path: Path, bits: int, symmetric: bool, group: int | None
) -> None:
    expected = packed_dir(tmp_path, bits, symmetric, group)
    with open_checkpoint(tmp_path) as checkpoint:
        dtype = "q8_0" if bits == 8 else "q4_0" if symmetric else "q4_1"
        assert checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].dtype == dtype
        assert checkpoint.tensors["lm_head.weight"].dtype == "f32"
        for name, info in checkpoint.tensors.items():
            want = expected[name].reshape(info.rows, info.cols)
            got = checkpoint.read_float(name)
            tolerance = 1e-3 if dtype == "q4_1" else 0
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=name)
            rows = checkpoint.read_rows(name, 0, info.rows)
            assert rows.nbytes == info.nbytes
            if info.rows > 20:
                np.testing.assert_array_equal(checkpoint.read_rows(name, 3, 13), rows[3:13])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "gptq"}, "'gptq'"),
    ({"format": "naive-quantized"}, "'naive-quantized'"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ({"config_groups": {}}, "config_groups"),
    ({"config_groups": {"W4A16": ["Linear"]}}, "config group"),
    ({"config_groups": {"a": {"weights": {"num_bits": 5, "group_size": 32}}}}, "5-bit"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 48}}}}, "48"),
    ({"config_groups": {"a": {"weights": {"num_bits": 8, "strategy": "tensor"}}}}, "'tensor'"),
    ({"config_groups": {"a": {"weights": {"type": "float", "group_size": 32}}}}, "'float'"),
    ({"config_groups": {"a": {"weights": {"num_bits": 8, "group_size": 64}}}}, "does not name"),
]


def test_other_quantizations_are_refused_in_a_sentence(tmp_path: Path) -> None:
    packed_dir(tmp_path, 4, True, 32)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in BAD:
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path)


def test_whole_zero_points_of_three_bits_are_refused(tmp_path: Path) -> None:
    packed_dir(tmp_path, 3, False, 32)
    with pytest.raises(CheckpointError, match="whole zero points"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_round_trip(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = np.random.default_rng(bits).integers(8 - half, 8 + half, (3, 64), np.uint8)
    words = codes[:, 0::2] | (codes[:, 1::2] << 4)
    packed = narrow(words.view("<i4"), bits)
    assert packed.shape == (3, 2 * bits)
    np.testing.assert_array_equal(widen(packed.view(np.uint8), bits), words)
    with pytest.raises(ValueError, match="do not hold"):
        narrow(np.zeros((1, 4), "<i4"), bits)


def test_e4m3_is_as_torch_has_it() -> None:
    values = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32) * 50
    values[0, :9] = [0, -0.0, 448, 464, 2**-9, 2**-10, 3 * 2**-10, 17, 19]
    codes = to_e4m3(values.clip(-448, 448))
    want = torch.from_numpy(values.clip(-448, 448)).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(codes, want.view(torch.uint8).numpy())
    one = np.ones((256, 1), np.float32)
    every = np.arange(256, dtype=np.uint8)[:, None]
    theirs = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(unpack_e4m3(every, one), theirs)
    np.testing.assert_array_equal(row_scales(np.float32([[448], [449], [0], [-7]])),
                                  np.float32([[1], [2], [1], [2**-6]]))  # fmt: skip
