"""Formats that the kernels lack: converted at load, and said so."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import hf_tensors, tiny_gguf, tiny_llama_dir

from pronk import load
from pronk.checkpoint.blocks import dequantize
from pronk.cli import main
from pronk.graph.pack import runtime_dtype

IDS = list(range(3, 60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


def test_the_loss_is_the_one_there_is(tiny, tmp_path):
    import gguf

    dtype = "mxfp4"
    path = tiny_gguf(tmp_path / "m.gguf", tiny, dtype)
    with load(path, context=64) as model:
        (conversion,) = model.conversions
        converted = model.logits(IDS)
    matrices = [w for w in hf_tensors(tiny).values() if w.ndim == 2]
    assert (conversion.stored, conversion.runs_as) == (dtype, "q4_1")
    assert conversion.tensors == len(matrices)
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    difference = norm = 0.0
    for weight in matrices:
        exact = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        near = gguf.GGMLQuantizationType.Q4_1
        again = gguf.quants.dequantize(gguf.quants.quantize(exact, near), near)
        difference += float(((again - exact) ** 2).sum())
        norm += float((exact**2).sum())
    assert conversion.error == pytest.approx((difference / norm) ** 0.5, rel=1e-3)
    assert 0 < conversion.error < 0.1
    with load(tiny, context=64) as model:
        exact = model.logits(IDS)
    assert np.corrcoef(converted.ravel(), exact.ravel())[0, 1] > 0.8


def test_the_loss_is_printed(tiny, tmp_path, capsys):
    path = tiny_gguf(tmp_path / "m.gguf", tiny, "mxfp4")
    assert main(["run", str(path), "hello", "--max-tokens", "2"]) == 0
    assert "tensors stored as mxfp4 run as q4_1 (relative error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "nearest"), [("q4_k", "q4_k"), ("q6_k", "q6_k"), ("q5_k", "q5_k"), ("q2_k", "q4_1")]
)
def test_k_quants_run_as_they_are_or_in_the_nearest_format(dtype, nearest):
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype.upper()]]
    blocks = np.random.default_rng(0).integers(0, 60, (4, size), np.uint8)  # small, finite scales
    values = dequantize(blocks, dtype, block)
    assert runtime_dtype(dtype, block) == nearest
    assert np.isfinite(values).all()
    assert values.std() > 0
    assert runtime_dtype(dtype, 48) == "f32"  # rows that no group of 32 divides
