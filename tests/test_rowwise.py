"""The native row-wise ops of more families than Llama's compute what the interpreter says.

Specs are made from a small one and have no checkpoint: their weights are random.
"""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from engines import isas, run_whole
from test_graph import IDS, interpret

from pronk.engine.runner import Runner
from pronk.errors import CheckpointError
from pronk.graph import passes
from pronk.graph.build import build_decoder
from pronk.graph.memory import plan_layout
from pronk.graph.program import Limits, compile_program
from pronk.graph.reference import Reference
from pronk.graph.rope import model_frequencies
from pronk.spec import LayerSpec, ModelSpec

SPEC = ModelSpec(
    family="llama", name="", vocab_size=320, hidden_size=64, intermediate_size=160, num_heads=4,
    num_kv_heads=2, head_dim=16, norm_eps=1e-5, context_length=256, tie_embeddings=True,
    layers=(LayerSpec(),) * 2,
)  # fmt: skip
GEMMA = {"post_norms": True, "activation": "gelu_tanh", "embedding_scale": 8.0,
         "logit_softcap": 3.0}  # fmt: skip
PLAIN = {"layers": (LayerSpec(mlp="plain"),) * 2}
CHANGES = {
    "llama": {},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "plain": {"activation": "gelu", **PLAIN},
    "plain relu": {"activation": "relu", **PLAIN},
    "thresholds": {"layers": (LayerSpec(mlp_threshold=0.04), LayerSpec(mlp_threshold=0.08))},
    "plain thresholds": {"activation": "relu",
                         "layers": (LayerSpec(mlp="plain", mlp_threshold=0.3),) * 2},
    "layer norm": {"norm": "layer"},
    "layer norms after": {"norm": "layer", "post_norms": True},
    "post norms": {"post_norms": True},
    "gemma": GEMMA,
    "soft cap": {"logit_softcap": 2.0},
    "a wide head": {"logit_softcap": 2.0, "vocab_size": 9001},
    "factors": {"embedding_scale": 3.0, "residual_scale": 0.3, "logit_scale": 0.125},
    "factors and biases": {"embedding_scale": 0.5, "residual_scale": 1.4, "logit_scale": 2.0,
                           "attention_bias": True, "output_bias": True},
}  # fmt: skip
_EXPECTED: dict[tuple[str, str], np.ndarray] = {}  # the same for every ISA


def random_weights(runner: Runner, dtype: str) -> dict[str, np.ndarray]:
    """Fill a runner; what it got, as float32, by name."""
    program, rng, weights = runner.program, np.random.default_rng(5), {}
    for name, weight in program.graph.weights.items():
        offset = program.layout.weight_offsets[name]
        computed = model_frequencies(program.spec, name, program.limits.context)
        if weight.rows == 1:
            values = rng.normal(1, 0.3, weight.cols).astype(np.float32)
            weights[name] = values if computed is None else computed
            runner.executor.write(offset, weights[name])
            continue
        values = rng.normal(0, 0.1, (weight.rows, weight.cols)).astype(np.float32)
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        stored = gguf.quants.quantize(values, kind).view(np.uint8)
        weights[name] = gguf.quants.dequantize(stored, kind).reshape(values.shape)
        runner.executor.pack(weight.dtype, offset, weight.rows, weight.cols, 0, stored)
    return weights


def random_runner(spec: ModelSpec, dtype: str, isa: str = "", threads: int = 1, **limits: int):
    sizes = {"max_tokens": 32, "max_rows": 5, **limits}
    program = compile_program(spec, lambda name: dtype, Limits(256, kv_dtype="f32", **sizes))
    runner = Runner(program, threads, isa)
    return runner, random_weights(runner, dtype)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_native_computes_what_the_interpreter_says(change, isa, dtype):
    spec = replace(SPEC, **CHANGES[change])
    runner, weights = random_runner(spec, dtype, isa)
    native = run_whole(runner, IDS)
    # Before the passes, so that these are held to the meaning too; or where activations are
    # rounded, after them.
    if (change, dtype) not in _EXPECTED:
        graph = runner.program.graph
        graph = build_decoder(spec, lambda name: dtype) if dtype == "f32" else graph
        _EXPECTED[change, dtype] = interpret(graph, weights)
    expected = _EXPECTED[change, dtype]
    worst = np.abs(native - expected).max(1) / np.abs(expected).max()
    median, most = (1.5e-3, 1e-2) if dtype == "q8_0" else (2e-6, 2e-5)
    assert np.median(worst) < median
    assert worst.max() < most


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "llama"])
def test_every_change_shows(change):
    spec = replace(SPEC, **CHANGES[change])
    _, weights = random_runner(spec, "f32")
    llama = build_decoder(replace(SPEC, vocab_size=spec.vocab_size), lambda name: "f32")
    for name, weight in llama.weights.items():  # what the other has no use for
        weights.setdefault(name, np.ones((weight.rows, weight.cols), np.float32))
    ids = IDS[:20]
    found, other = (
        Reference(graph, weights).step(ids, range(20), [0] * 20, range(20))
        for graph in (build_decoder(spec, lambda name: "f32"), llama)
    )
    assert np.abs(found - other).max() > 0.02 * np.abs(found).max()


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_threads_and_chunks_give_the_same_bits(dtype):
    spec = replace(SPEC, **GEMMA, vocab_size=9001)
    whole = run_whole(random_runner(spec, dtype, threads=1)[0], IDS)
    for threads, chunk in ((3, 32), (2, 1), (2, 17)):
        runner, _ = random_runner(spec, dtype, threads=threads)
        assert (run_whole(runner, IDS, chunk) == whole).all(), (threads, chunk)


def test_logits_are_capped_where_they_lie():
    spec = replace(SPEC, logit_softcap=2.0)
    runner, _ = random_runner(spec, "f32")
    layout, output = runner.program.layout, runner.program.graph.output
    assert layout.value_offsets[output] == layout.value_offsets["logits"]
    logits = run_whole(runner, IDS)
    uncapped = run_whole(random_runner(SPEC, "f32")[0], IDS)
    assert np.abs(uncapped).max() > 2 > np.abs(logits).max() > 1
    np.testing.assert_allclose(logits, 2 * np.tanh(uncapped / 2), rtol=2e-6)


@pytest.mark.parametrize("count", range(1, len(passes.CPU_PASSES) + 1))
def test_passes_keep_the_meaning(count):
    spec = replace(SPEC, **GEMMA, residual_scale=0.7, norm="rms")
    graph = build_decoder(spec, lambda name: "f32")
    _, weights = random_runner(spec, "f32")
    after = passes.run_passes(graph, passes.CPU_PASSES[:count])
    np.testing.assert_allclose(
        interpret(after, weights), interpret(graph, weights), rtol=1e-4, atol=1e-5
    )


def waits(spec: ModelSpec) -> int:
    """Barriers of a step: one a chain."""
    graph = compile_program(spec, lambda name: "q8_0", Limits(64)).graph
    return sum(op.kind != "workspace" and not op.attrs.get("chained") for op in graph.ops)


def test_norms_after_attention_and_mlp_cost_one_barrier_a_model():
    # The norm before the head alone has nothing but a gather to be chained to.
    assert waits(replace(SPEC, post_norms=True)) == waits(SPEC) + 1
    graph = compile_program(replace(SPEC, **GEMMA), lambda name: "q8_0", Limits(64)).graph
    chains = [(a.kind, b.kind) for a, b in zip(graph.ops, graph.ops[1:], strict=False)
              if b.attrs.get("chained")]  # fmt: skip
    assert chains == [
        ("embed", "rope_table"), ("rope_table", "rms_norm"),
        *[("rms_norm", "rms_norm")] * 3, ("gather", "rms_norm"),
    ]  # fmt: skip


def test_values_of_a_chain_do_not_overlap():
    graph = compile_program(replace(SPEC, **GEMMA), lambda name: "q8_0", Limits(64)).graph
    layout = plan_layout(graph, 32, 5)

    def span(name: str) -> tuple[int, int]:
        value = graph.values[name]
        start = layout.value_offsets[name]
        return start, start + value.bytes_of(32 if value.rows == "T" else 5)

    chain: list[str] = []
    seen = 0
    for op in graph.ops:
        if not op.attrs.get("chained"):
            chain = []
        for name in chain:  # what another thread may still read or has just written
            (start, end), (low, high) = span(name), span(op.output)
            assert end <= low or high <= start, (name, op.output)
            seen += 1
        chain += [op.output, *(ref.value for ref in op.inputs)]
        chain = list(dict.fromkeys(chain))
    assert seen > 10


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 96, "intermediate_size": 32, "head_dim": 48},
        {"head_dim": 80, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 317},
        {"head_dim": 112, "num_heads": 2, "num_kv_heads": 2},
        {"head_dim": 256, "num_heads": 1, "num_kv_heads": 1, "vocab_size": 2},
    ],
)
def test_sizes_that_the_kernels_take(sizes):
    spec = replace(SPEC, **sizes)
    runner, weights = random_runner(spec, "f32")
    ids = [i % spec.vocab_size for i in IDS]
    expected = interpret(runner.program.graph, weights, ids)
    native = run_whole(runner, ids)
    assert np.abs(native - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 80},
        {"intermediate_size": 144},
        {"head_dim": 24},
        {"head_dim": 272},
        {"num_heads": 3, "num_kv_heads": 1},
        {"num_kv_heads": 3},
        {"num_kv_heads": 0},
        {"vocab_size": 1},
    ],
)
def test_sizes_that_they_do_not_take(sizes):
    with pytest.raises(CheckpointError, match="cannot run"):
        compile_program(replace(SPEC, **sizes), lambda name: "f32", Limits(64))
