"""Weights read natively: the same bits as through Python, and an error where the file ends."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_dir, tiny_gguf, tiny_llama_dir

import pronk.engine.weights as weights
from pronk import _native, load
from pronk.checkpoint.gguf import GgufCheckpoint
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.safetensors import SafetensorsCheckpoint
from pronk.engine.runner import Runner
from pronk.engine.weights import load_weights
from pronk.errors import CheckpointError
from pronk.graph.program import Limits
from pronk.model import compile_checkpoint

IDS = list(range(3, 60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


@pytest.mark.parametrize("dtype", [*DTYPES, "directory"])
def test_natively_read_weights_are_those_read_by_rows(tiny, tmp_path, monkeypatch, dtype):
    path = tiny if dtype == "directory" else tiny_gguf(tmp_path / "m.gguf", tiny, dtype)
    calls = hold_against_rows(path, monkeypatch)
    assert not calls


def test_a_family_keeps_its_order_of_rows(tmp_path, monkeypatch):
    """Qwen2's files leave the rows of queries and keys as they are, and it has biases."""
    path = tiny_gguf(tmp_path / "m.gguf", tiny_dir(tmp_path / "hf", "qwen2"), "q4_1")
    assert not hold_against_rows(path, monkeypatch)


def hold_against_rows(path, monkeypatch):
    """Check that rows read through Python give the same logits; gives what was read so anyway."""
    calls = []
    pack = _native.Executor.pack
    monkeypatch.setattr(
        _native.Executor, "pack", lambda *args: calls.append(args[1]) or pack(*args)
    )
    with load(path, context=64, threads=2) as model:
        natively = model.logits(IDS)
    through_python = list(calls)
    for kind in (GgufCheckpoint, SafetensorsCheckpoint):
        monkeypatch.setattr(kind, "span", lambda *_: None)
    with load(path, context=64) as model:
        assert np.array_equal(model.logits(IDS), natively)
    assert len(calls) > len(through_python)
    return through_python


def test_a_file_that_has_become_shorter_is_refused(tiny, tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", tiny, "q4_1")
    with open_checkpoint(path) as checkpoint:
        runner = Runner(compile_checkpoint(checkpoint, Limits(64)), 2)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 4096)
        with pytest.raises(CheckpointError, match="ended while its tensors were read"):
            load_weights(checkpoint, runner)


def test_the_last_bytes_wait(tiny, tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "m.gguf", tiny, "q4_1")
    events: list[int | str] = []

    def native(executor, matrices):
        events.append(len(matrices))
        return _native.load_weights(executor, matrices)

    monkeypatch.setattr(weights, "load_native", native)
    done = []
    with open_checkpoint(path) as checkpoint:
        runner = Runner(compile_checkpoint(checkpoint, Limits(64)), 2)
        count = len(runner.program.graph.weights) - 1  # without the rotary frequencies

        def wait():
            events.append("waited")

        load_weights(checkpoint, runner, before_last=wait)
        load_weights(checkpoint, runner, last=1, before_last=wait)
        load_weights(checkpoint, runner, last=1 << 40, before_last=wait)
        load_weights(checkpoint, runner, lambda *at: done.append(at))
    assert events == [count, "waited", count - 1, "waited", 1, "waited", count, count]
    total = sum(t.nbytes for t in checkpoint.tensors.values())
    assert done[-1] == (total, total)
    assert done == sorted(done)


def test_a_broken_tokenizer_is_said_though_it_is_read_aside(tiny, tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "m.gguf", tiny, "q4_1")

    def broken(_: object) -> None:
        raise CheckpointError("the tokenizer is broken")

    monkeypatch.setattr(GgufCheckpoint, "load_tokenizer", broken)
    with pytest.raises(CheckpointError, match="the tokenizer is broken"):
        load(path, context=64)
