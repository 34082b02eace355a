"""Passes keep the meaning; the native executor computes what the interpreter says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import tiny_dir, tiny_gguf, tiny_llama_dir
from engines import isas, make_runner, reference_weights, run_whole
from safetensors.numpy import load_file, save_file

from pronk.checkpoint.open import open_checkpoint
from pronk.engine.runner import Runner
from pronk.graph import passes
from pronk.graph.build import build_decoder
from pronk.graph.memory import plan_layout
from pronk.graph.pack import ACT_RANGE, ACTIVATIONS, GROUPED, block_dtype
from pronk.graph.program import Limits, compile_program, stored_dtypes
from pronk.graph.reference import Reference, fake_quantize
from pronk.graph.rope import KEY_CENTER, computed_weight, rope_frequencies
from pronk.model import compile_checkpoint
from pronk.spec import RopeSpec

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 75)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"), attention_bias=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """As wide as the blocks of 256."""
    path = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    return tiny_llama_dir(path, attention_bias=True, **sizes)


def interpret(graph, weights, ids=IDS):
    """All logits of one sequence, in two steps so that the cache is used."""
    reference = Reference(graph, weights)
    out = []
    for part in (range(40), range(40, len(ids))):
        rows = list(range(len(part)))
        out.append(reference.step([ids[i] for i in part], list(part), [0] * len(rows), rows))
    return np.concatenate(out)


@pytest.mark.parametrize("count", range(1, len(passes.CPU_PASSES) + 1))
def test_passes_keep_the_meaning(tiny, count):
    with open_checkpoint(tiny) as checkpoint:
        before = build_decoder(checkpoint.spec, lambda name: "f32")
        after = passes.run_passes(before, passes.CPU_PASSES[:count])
        weights = reference_weights(checkpoint, before)
        # Equal but for the order of additions in a wider matrix product.
        np.testing.assert_allclose(
            interpret(after, weights), interpret(before, weights), rtol=1e-4, atol=1e-5
        )


def test_quantization_passes_keep_the_meaning(tiny):
    with open_checkpoint(tiny) as checkpoint:
        graph = build_decoder(checkpoint.spec, lambda name: "q8_0")
        weights = reference_weights(checkpoint, graph)
        explicit = passes.run_passes(graph, (passes.quantize_activations,))
        assert [op.kind for op in explicit.ops].count("quantize") == 9
        fused = passes.run_passes(graph, passes.CPU_PASSES)
        # Attention's output is quantized by an op of its own; norms and activations do it alone.
        assert [op.kind for op in fused.ops].count("quantize") == 2
        np.testing.assert_allclose(
            interpret(fused, weights), interpret(explicit, weights), rtol=1e-4, atol=1e-5
        )


def test_fusion_leaves_few_ops(tiny):
    with open_checkpoint(tiny) as checkpoint:
        program = compile_checkpoint(checkpoint, Limits(64))
    kinds = [op.kind for op in program.graph.ops]
    layer = ["rms_norm", "matmul", "rope_store", "workspace", "attend", "matmul", "rms_norm",
             "matmul", "activate", "matmul"]  # fmt: skip
    assert kinds == ["embed", "rope_table", *layer, *layer, "gather", "rms_norm", "matmul"]


def test_a_float_among_quantized_siblings_joins_them(tiny):
    with open_checkpoint(tiny) as checkpoint:
        spec = checkpoint.spec
        stored = {name: ("q4_0", info.cols) for name, info in checkpoint.tensors.items()}
    for odd, runs in (("self_attn.v_proj", "q8_0"), ("self_attn.o_proj", "f16")):
        name = f"model.layers.1.{odd}.weight"
        program = compile_program(spec, stored_dtypes(stored | {name: ("f16", 64)}), Limits(64))
        assert program.graph.weights[name].dtype == runs
        assert program.graph.weights[name.replace("layers.1", "layers.0")].dtype == "q4_0"
        Runner(program, 1)  # the native executor has every op


def test_values_that_live_together_do_not_overlap(tiny):
    with open_checkpoint(tiny) as checkpoint:
        graph = compile_checkpoint(checkpoint, Limits(64)).graph
    layout = plan_layout(graph, 16, 4)
    last = {graph.output: len(graph.ops)}
    for i, op in enumerate(graph.ops):
        for ref in op.inputs:
            last[ref.value] = max(last.get(ref.value, 0), i)
    spans = {}
    for i, op in enumerate(graph.ops):
        value = graph.values[op.output]
        size = value.row_bytes * (16 if value.rows == "T" else 4)
        start = layout.value_offsets[value.name]
        assert start % 64 == 0
        assert start + size <= layout.arena_bytes
        for other, (lo, hi) in spans.items():
            inplace = op.attrs.get("inplace") and op.inputs[0].value == other
            if last.get(other, -1) >= i and not inplace:
                assert start + size <= lo or hi <= start, (value.name, other)
        spans[value.name] = (start, start + size)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    ("dtype", "activations"),
    [(d, "int12") for d in ("f32", "f16", "bf16")]
    + [(d, activations) for d in GROUPED for activations in ACTIVATIONS],
)
def test_native_computes_what_the_interpreter_says(wide, tmp_path, isa, dtype, activations):
    path = tiny_gguf(tmp_path / "model.gguf", wide, dtype)
    runner = make_runner(
        path, isa=isa, kv_dtype="f32", activations=activations, max_tokens=32, max_rows=5
    )
    weights = runner.program.graph.weights.values()
    assert {block_dtype(w.dtype) for w in weights if w.rows > 1} == {dtype}
    rounded = {v.dtype for v in runner.program.graph.values.values()} - {"f32"}
    assert rounded == ({ACTIVATIONS[activations]} if dtype in GROUPED else set())
    with open_checkpoint(path) as checkpoint:
        graph = runner.program.graph
        expected = interpret(graph, reference_weights(checkpoint, graph))
    native = run_whole(runner, IDS)
    worst = np.abs(native - expected).max(1) / np.abs(expected).max()
    # A last-bit difference before a rounding of activations can become a whole step, and every
    # step makes more of them.
    median, most = (1.5e-3, 5e-3) if rounded else (2e-6, 2e-5)
    if rounded == {"a8"}:
        median, most = 16 * median, 16 * most  # as much larger as its steps
    assert np.median(worst) < median
    assert worst.max() < most


@pytest.mark.parametrize("isa", isas())
def test_a_rounded_cache_is_close_to_float32(tiny, isa):
    exact = run_whole(make_runner(tiny, isa=isa, kv_dtype="f32"), IDS)
    for kv_dtype, most in {"bf16": 0.02, "int8": 0.02, "int4": 0.2, "int4_plain": 0.2}.items():
        rounded = run_whole(make_runner(tiny, isa=isa, kv_dtype=kv_dtype), IDS)
        difference = np.abs(exact - rounded).max()
        assert 0 < difference < most * np.abs(exact).max(), kv_dtype


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A model whose keys have biases as Qwen's: far larger than keys, where rope turns slowly."""
    path = tiny_dir(tmp_path_factory.mktemp("biased"), "qwen2", rope_theta=1e6)
    tensors = {n: np.array(t) for n, t in load_file(path / "model.safetensors").items()}
    for name, bias in tensors.items():
        if name.endswith("k_proj.bias"):
            # Of halves of 8, the last pair turns by 0.02 in the 4,096 positions of the mean.
            bias.reshape(-1, 8)[:, 7] = 150
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("isa", isas())
def test_large_biases_of_keys_are_kept_out_of_the_cache(biased, isa):
    exact = run_whole(make_runner(biased, isa=isa, kv_dtype="f32"), IDS)
    with open_checkpoint(biased) as checkpoint:
        graph = compile_checkpoint(checkpoint, Limits(256)).graph
        weights = reference_weights(checkpoint, graph)
    centers = {name: 0 * w for name, w in weights.items() if name.startswith(KEY_CENTER)}
    assert len(centers) == 2
    plain = interpret(graph, {**weights, **centers})
    assert np.abs(plain - interpret(graph, weights)).max() < 1e-3 * np.abs(plain).max()
    for kv_dtype, most in {"bf16": 0.02, "int8": 0.05, "int4": 0.2}.items():
        rounded = run_whole(make_runner(biased, isa=isa, kv_dtype=kv_dtype), IDS)
        assert np.abs(exact - rounded).max() < most * np.abs(exact).max(), kv_dtype


def test_the_center_of_keys_is_the_mean_of_their_rotated_bias(biased):
    with open_checkpoint(biased) as checkpoint:
        spec = replace(checkpoint.spec, ropes=(RopeSpec(theta=1e4, attention_factor=1.5),))
        center = computed_weight(spec, f"{KEY_CENTER}.1", 256, checkpoint.read_float)
        bias = checkpoint.read_float("model.layers.1.self_attn.k_proj.bias").reshape(-1)
    angles = np.outer(np.arange(4096), rope_frequencies(spec.ropes[0], spec.head_dim))
    a, b = np.split(bias.reshape(spec.num_kv_heads, -1), 2, axis=1)
    cos, sin = 1.5 * np.cos(angles).mean(0), 1.5 * np.sin(angles).mean(0)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)
    np.testing.assert_allclose(center, expected.reshape(-1), rtol=1e-3, atol=1e-5)


def test_fake_quantize_bounds_the_error():
    x = np.random.default_rng(1).standard_normal((4, 96), np.float32)
    top = np.abs(x).reshape(4, 3, 32).max(-1)
    for steps in ACT_RANGE.values():
        error = np.abs(fake_quantize(x, steps) - x).reshape(4, 3, 32).max(-1)
        assert (error <= top / steps * 0.501).all()
    assert not fake_quantize(np.zeros((1, 32), np.float32), 127).any()


def test_a_graph_without_its_passes_is_refused(tiny):
    with open_checkpoint(tiny) as checkpoint:
        program = compile_program(checkpoint.spec, lambda name: "f32", Limits(64), passes=())
    with pytest.raises(ValueError, match="a pass is missing"):
        Runner(program, 1)


def test_a_program_prints_one_line_an_op(tiny):
    with open_checkpoint(tiny) as checkpoint:
        graph = compile_checkpoint(checkpoint, Limits(64)).graph
    lines = graph.format().splitlines()
    assert len(lines) == len(graph.ops)
    assert lines[0].startswith("embed: f32[Tx64] = embed(model.embed_tokens.weight:f32[320x64]")
