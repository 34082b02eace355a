"""Round-to-nearest quantization, streamed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pronk.compress.quantize as module
from pronk.checkpoint.base import Checkpoint, TensorInfo
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.loss import ErrorSum
from pronk.compress.quantize import RoundToNearest, quantize_tensor
from pronk.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj.weight"


class Fake(Checkpoint):
    """One tensor in memory, which counts the rows it is asked for."""

    def __init__(self, values: np.ndarray, dtype: str = "f32", name: str = NAME) -> None:
        self.path = Path("fake")
        self.blocks = quantize(values, dtype)
        info = TensorInfo(name, dtype, values.shape, self.blocks.nbytes)
        self.tensors = {name: info}
        self.most = 0

    def _read(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        self.most = max(self.most, stop - start)
        return self.blocks[start:stop]

    def load_tokenizer(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def collect(ckpt: Checkpoint, dtype: str, error: ErrorSum | None = None) -> np.ndarray:
    at, parts = 0, []
    for start, blocks in quantize_tensor(ckpt, NAME, dtype, error):
        assert start == at
        at += len(blocks)
        parts.append(blocks)
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_1", "q4_0"])
def test_chunks_give_what_the_whole_gives(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 96 * 5)
    values = np.random.default_rng(0).standard_normal((23, 96)).astype(np.float32)
    ckpt, error = Fake(values), ErrorSum()
    blocks = collect(ckpt, dtype, error)
    assert ckpt.most == 5
    np.testing.assert_array_equal(blocks, quantize(values, dtype))
    lost = dequantize(blocks, dtype, 96).astype(np.float64) - values
    expected = math.sqrt((lost**2).sum() / (values.astype(np.float64) ** 2).sum())
    assert error.relative_rms == pytest.approx(expected, rel=1e-5)
    assert 0 < error.relative_rms < (0.01 if dtype == "q8_0" else 0.1)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_1", "q4_0"])
def test_the_same_format_passes_through(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    ckpt, error = Fake(values, dtype), ErrorSum()
    np.testing.assert_array_equal(collect(ckpt, dtype, error), ckpt.blocks)
    assert error.relative_rms == 0
    assert error.norm > 0


def test_errors_by_kind() -> None:
    values = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float32)
    rounding = RoundToNearest()
    assert len(list(rounding(Fake(values), NAME, "q4_0"))) == 1
    head = Fake(values, "q8_0", "lm_head.weight")
    assert len(list(rounding(head, "lm_head.weight", "q8_0"))) == 1
    assert set(rounding.errors) == {"gate_up", "head"}
    assert rounding.errors["head"] == 0 < rounding.errors["gate_up"]
    assert ErrorSum().relative_rms == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38, 1e8])
def test_values_that_cannot_be_held(bad: float) -> None:
    values = np.ones((2, 32), dtype=np.float32)
    values[1, 5] = bad
    with pytest.raises(CheckpointError, match=r"up_proj.*(finite|too large)"):
        collect(Fake(values), "q4_0")


def test_no_such_tensor() -> None:
    with pytest.raises(CheckpointError, match="no tensor"):
        list(quantize_tensor(Fake(np.ones((1, 32), dtype=np.float32)), "x.weight", "q8_0"))
