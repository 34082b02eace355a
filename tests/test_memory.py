"""Memory used is memory planned, to the byte inside and to a few percent for the process."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from checkpoints import tiny_gguf, tiny_llama_dir

from pronk import _native, load
from pronk.checkpoint.base import row_bytes
from pronk.checkpoint.blocks import BLOCK_SIZES
from pronk.checkpoint.bundle import write_bundle
from pronk.checkpoint.kinds import KINDS
from pronk.checkpoint.open import open_checkpoint
from pronk.compress.quantize import RoundToNearest
from pronk.errors import BudgetError
from pronk.graph import pack
from pronk.graph.program import Limits
from pronk.model import compile_checkpoint


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", *pack.GROUPED, *pack.PLANES])
def test_sizes_are_those_of_the_native_core(dtype):
    for rows in (1, 16, 17, 320):
        for cols in (
            (32, 96, 1536) if BLOCK_SIZES[pack.block_dtype(dtype)][0] <= 32 else (256, 1536)
        ):
            expected = _native.packed_bytes(dtype, rows, cols)
            assert pack.packed_bytes(dtype, rows, cols) == expected
            if cols % 512 == 0 and rows % 16 == 0 and dtype in pack.GROUPED:
                assert expected == rows * row_bytes(dtype, cols)  # no larger than stored
    for precision in ("f32", *pack.ACT_RANGE):
        assert pack.act_row_bytes(96, precision) == _native.act_row_bytes(96, precision)


def test_the_executor_allocates_the_plan(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", tiny_llama_dir(tmp_path / "hf"), "q4_1")
    with open_checkpoint(path) as checkpoint:
        planned = compile_checkpoint(checkpoint, Limits(256)).memory(0)
    with load(path, context=256) as model:
        executor = model._open().executor
        assert executor.weight_bytes == planned.weights == model.memory.weights
        assert executor.kv_bytes == planned.kv == model.memory.kv
        assert executor.arena_bytes == planned.arena == model.memory.arena


@pytest.mark.parametrize(
    ("kv_dtype", "head_dim", "row"),
    [
        ("int8", 64, 64 + 4),  # a scale for each row of a head
        ("int4", 64, 32 + 2 * 2),  # a scale for each 32 elements
        ("int4", 80, 40 + 5 * 2),  # or 16
    ],
)
def test_a_rounded_cache_takes_what_is_planned(tmp_path, kv_dtype, head_dim, row):
    path = tiny_llama_dir(tmp_path / "hf", head_dim=head_dim)
    with load(path, context=256, kv_dtype=kv_dtype) as model:
        executor, program = model._open().executor, model.program
        assert executor.kv_bytes == model.memory.kv
        assert executor.past_bytes == executor.threads * program.past_bytes > 0
        held = model.memory.kv
    planned = measured("inspect", path, "--context", 256, "--kv", kv_dtype)["memory"]["kv"]
    whole = measured("inspect", path, "--context", 256)["memory"]["kv"]
    assert planned == held
    assert held / whole == row / (head_dim * 2)


def test_a_step_takes_no_memory_that_was_not_there(tmp_path):
    path = tiny_llama_dir(tmp_path / "hf", head_dim=256, max_position_embeddings=1024)
    code = """
        import sys
        from pronk import SamplingParams, load
        from pronk.device.memory import resident_memory
        with load(sys.argv[1], threads=8, kv_dtype=sys.argv[2], packed_cache=False) as model:
            before = resident_memory()
            list(model.generate([5] * 700, SamplingParams(max_tokens=2)))
            print(resident_memory() - before)
    """

    def grown(kv_dtype):
        command = [sys.executable, "-c", textwrap.dedent(code), str(path), kv_dtype]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    # What Python takes for the first request, but not what 8 threads expand a past to (4 MB).
    assert max(grown("int8"), grown("int4")) < 3_000_000


def test_packed_weights_are_no_larger_than_the_file(smollm2):
    with open_checkpoint(smollm2) as checkpoint:
        planned = compile_checkpoint(checkpoint, Limits(256)).memory(0)
        stored = sum(t.nbytes for t in checkpoint.tensors.values())
    assert planned.weights <= stored * 1.001


def measured(*arguments: object) -> dict[str, int]:
    command = [sys.executable, "-m", "pronk", *map(str, arguments), "--json"]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def test_the_process_takes_what_inspect_says(smollm2):
    planned = measured("inspect", smollm2, "--context", 1024)["memory"]["total"]
    peak = measured("run", smollm2, "Name a colour.", "--context", 1024, "--max-tokens", 40)
    assert peak["peak_memory"] == pytest.approx(planned, rel=0.05)


def test_a_bundle_refuses_a_context_that_breaks_its_budget(tmp_path):
    source = tiny_llama_dir(tmp_path / "hf", head_dim=64, max_position_embeddings=8192)
    out = tmp_path / "fitted"
    budget = measured("inspect", source, "--context", 64)["memory"]["total"] + 2_000_000
    measured("fit", source, "--memory", budget, "--context", 64, "-o", out)
    assert measured("run", out, "hello", "--max-tokens", 2)["peak_memory"] <= budget
    assert measured("inspect", out)["context"] == 64  # the one it was fitted to
    command = [sys.executable, "-m", "pronk", "run", out, "hello", "--context", "8192"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "was fitted to" in refused.stderr


@pytest.mark.parametrize("more", [{"kv_dtype": "f32"}, {"kv_tokens": 4096}, {"context": 4096}])
def test_a_bundle_refuses_what_takes_more_than_was_fitted(tmp_path, more):
    source = tiny_llama_dir(tmp_path / "hf", head_dim=64, max_position_embeddings=8192)
    # The plan of any load is over the budget: what was measured at the context is believed.
    meta = {"budget": {"memory": 1_000_000, "context": 2048}, "plan": {"overhead": 900_000}}
    bundle = tmp_path / "fitted"
    with open_checkpoint(source) as checkpoint:
        write_bundle(checkpoint, dict.fromkeys(KINDS, "q8_0"), bundle,
                     quantize=RoundToNearest(), meta=meta)  # fmt: skip
    for same in ({}, {"context": 1024}, {"kv_dtype": "int8"}, {"activations": "int8"}):
        load(bundle, threads=1, **same).close()
    with pytest.raises(BudgetError, match="was fitted to"):
        load(bundle, threads=1, **more)
