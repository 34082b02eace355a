"""Block formats agree bit for bit with ggml's reference in the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pronk.checkpoint.base import row_bytes
from pronk.checkpoint.blocks import BLOCK_SIZES, dequantize, quantize
from pronk.errors import CheckpointError

NATIVE = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]


def weights(rows: int = 40, cols: int = 96) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    x *= rng.lognormal(0, 3, (rows, 1)).astype(np.float32)
    x[3] = 0
    x[4] = 0.25
    x[5, ::3] = -0.0
    x[6] = np.round(x[6] * 4) / 8  # ties
    return x


@pytest.mark.parametrize("dtype", NATIVE)
def test_quantize_and_dequantize_are_ggmls(dtype: str) -> None:
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    x = weights()
    mine = quantize(x, dtype)
    theirs = np.ascontiguousarray(gguf.quants.quantize(x, kind)).view(np.uint8)
    assert mine.dtype == np.uint8 and mine.shape == (40, row_bytes(dtype, 96))
    np.testing.assert_array_equal(mine, theirs.reshape(mine.shape))
    back = dequantize(mine, dtype, 96)
    reference = np.asarray(gguf.quants.dequantize(mine, kind), dtype=np.float32)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, reference.reshape(40, 96))


@pytest.mark.parametrize("dtype", NATIVE)
def test_large_tensors_are_converted_piece_by_piece_alike(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((70, 8192)).astype(np.float32)
    blocks = quantize(x, dtype)
    np.testing.assert_array_equal(blocks[69:], quantize(x[69:], dtype))
    whole = dequantize(blocks, dtype, 8192)
    np.testing.assert_array_equal(whole[69:], dequantize(blocks[69:], dtype, 8192))


def test_bf16_keeps_nan_and_infinity() -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 1.0]], dtype=np.float32)
    x.view(np.uint32)[0, 0] = 0x7F800001  # the NaN that truncation would make infinite
    back = dequantize(quantize(x, "bf16"), "bf16", 4)[0]
    assert np.isnan(back[0]) and back[1] == np.inf and back[2] == -np.inf and back[3] == 1


def test_sizes_are_ggufs() -> None:
    for dtype, size in BLOCK_SIZES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype.upper()]] == size, dtype


@pytest.mark.parametrize("dtype", sorted(set(BLOCK_SIZES) - set(NATIVE)))
def test_foreign_types_go_through_gguf(dtype: str) -> None:
    block, nbytes = BLOCK_SIZES[dtype]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 60, (3, 2 * nbytes), dtype=np.uint8)  # small bytes: finite halves
    out = dequantize(blocks, dtype, 2 * block)
    reference = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype.upper()])
    np.testing.assert_array_equal(out, reference)
    assert np.abs(out).max() > 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no multiple of the q4_0 block 32"):
        row_bytes("q4_0", 40)
    with pytest.raises(CheckpointError, match="'q9_9'"):
        row_bytes("q9_9", 32)
    with pytest.raises(CheckpointError, match="does not write"):
        quantize(np.zeros((1, 256), np.float32), "q4_k")
    with pytest.raises(ValueError, match="uint8"):
        dequantize(np.zeros((1, 33), np.uint8), "q8_0", 32)
