"""Experts: their pass keeps the meaning, and the native executor computes what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engines import Held, fill_runner, isas, random_weights, run_whole

from pronk.engine.runner import Runner
from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.experts import expert_load, format_load
from pronk.graph import passes
from pronk.graph.build import build_decoder
from pronk.graph.experts import apply_experts
from pronk.graph.moe import expert_rows
from pronk.graph.program import Limits, compile_program, stored_dtypes
from pronk.graph.reference import Reference
from pronk.spec import LayerSpec, ModelSpec, MoeSpec

MOE = MoeSpec(experts=8, top_k=2, intermediate_size=96)
SPEC = ModelSpec(
    family="mixtral", name="", vocab_size=320, hidden_size=64, intermediate_size=160, num_heads=4,
    num_kv_heads=2, head_dim=16, norm_eps=1e-5, context_length=512, tie_embeddings=True,
    layers=(LayerSpec(mlp="moe"), LayerSpec(), LayerSpec(mlp="moe")), moe=MOE)  # fmt: skip
KINDS = {
    "mixtral": MOE,
    "qwen3": replace(MOE, experts=24, top_k=5, intermediate_size=32),
    "olmoe": replace(MOE, normalize=False),
    "all": replace(MOE, experts=2),
    "llama4": replace(
        MOE, top_k=1, score="sigmoid", normalize=False, scales_input=True, shared_size=64
    ),
    "shared": replace(MOE, score="sigmoid", shared_size=32),
    "dynamic": replace(MOE, top_k=4, threshold=0.5, least=1),
    "least": replace(MOE, top_k=6, threshold=0.3, least=2),
}
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 75)]


def spec_of(kind: str, **changes: object) -> ModelSpec:
    return replace(SPEC, moe=KINDS[kind], **changes)


def dtype_of(dtype: str):
    return lambda name: "f32" if "router" in name else dtype


def make(spec: ModelSpec, dtype: str = "q8_0", *, threads: int = 2, isa: str = "", **limits):
    """A runner with random weights, and these for the interpreter."""
    limits = {"context": 256, "kv_dtype": "f32"} | limits
    program = compile_program(spec, dtype_of(dtype), Limits(**limits))
    exact, rows = random_weights(program.graph, spec)
    return fill_runner(Runner(program, threads, isa), exact, rows), exact


def interpret(graph, weights, ids=IDS):
    """All logits of one sequence, in two steps so that the cache is used."""
    reference = Reference(graph, weights)
    out = []
    for part in (range(40), range(40, len(ids))):
        rows = list(range(len(part)))
        out.append(reference.step([ids[i] for i in part], list(part), [0] * len(rows), rows))
    return np.concatenate(out)


def assert_near(got, expected, dtype):
    """Equal but for rounding, which may become a whole step of a quantized activation."""
    worst = np.abs(got - expected).max(1) / np.abs(expected).max()
    median, most = (2e-6, 3e-5) if dtype in ("f32", "bf16") else (2e-3, 1e-2)
    assert np.median(worst) < median
    # Where two experts are near equal, it may choose another one.
    assert np.quantile(worst, 0.9) < most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_taking_experts_apart_keeps_the_meaning(kind, dtype):
    spec = spec_of(kind, residual_scale=0.5)
    graph = build_decoder(spec, dtype_of(dtype))
    at = passes.CPU_PASSES.index(passes.split_experts)
    before = passes.run_passes(graph, passes.CPU_PASSES[:at])
    after = passes.run_passes(before, passes.CPU_PASSES[at:])
    assert "experts" not in {op.kind for op in after.ops}
    weights, _ = random_weights(graph, spec)
    assert_near(interpret(after, weights), interpret(before, weights), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0", "q4_0"])
def test_native_experts_are_what_the_interpreter_says(kind, dtype):
    spec = spec_of(kind)
    runner, weights = make(spec, dtype, max_tokens=32, max_rows=5)
    expected = interpret(runner.program.graph, weights)
    native = run_whole(runner, IDS)
    assert_near(native, expected, dtype)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "llama4", "least"])
@pytest.mark.parametrize("dtype", ["f32", "q4_0"])
def test_chunks_and_threads_do_not_matter(kind, dtype, isa):
    spec = spec_of(kind)
    whole = run_whole(make(spec, dtype, threads=1, isa=isa)[0], IDS)
    for threads, chunk in ((1, 7), (2, 32), (3, 75), (2, 1)):
        runner, _ = make(spec, dtype, threads=threads, isa=isa, max_tokens=chunk)
        np.testing.assert_array_equal(run_whole(runner, IDS, chunk), whole)


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_company_does_not_matter(dtype):
    runner, _ = make(SPEC, dtype, kv_tokens=512)
    prompts = [IDS[:40], IDS[20:60], IDS[60:]]
    alone = [run_whole(runner, prompt) for prompt in prompts]
    held = Held(runner, 3)
    got = [[] for _ in prompts]
    for start in range(0, 40, 9):
        ids, positions, sequences = [], [], []
        for i, prompt in enumerate(prompts):
            part = prompt[start : start + 9]
            ids += part
            positions += range(start, start + len(part))
            sequences += [i] * len(part)
        tables = held.tables(positions, sequences)
        logits = runner.step(ids, positions, sequences, tables, list(range(len(ids))))
        for i, row in zip(sequences, logits, strict=True):
            got[i].append(row)
    for rows, expected in zip(got, alone, strict=True):
        np.testing.assert_array_equal(np.stack(rows), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_counted(kind):
    spec = spec_of(kind)
    runner, weights = make(spec, "f32", max_tokens=16)
    graph = runner.program.graph
    seen = []

    class Watch(Reference):
        def _route(self, op, x, w):
            routes = super()._route(op, x, w)
            seen.append(routes[:, : op.integer("top_k")])
            return routes

    reference = Watch(graph, weights)
    reference.step(IDS[:40], range(40), [0] * 40, [])
    run_whole(runner, IDS[:40])
    counts = runner.expert_counts()
    experts = spec.moe.experts
    assert counts.shape == (2, experts)
    for row, routes in zip(counts, seen, strict=True):
        chosen = routes[routes >= 0].astype(int)
        np.testing.assert_array_equal(row, np.bincount(chosen, minlength=experts))
    assert runner.experts_per_token() == pytest.approx(counts.sum() / 2 / 40)
    if spec.moe.threshold < 1:
        assert spec.moe.least <= runner.experts_per_token() < spec.moe.top_k
    else:
        assert runner.experts_per_token() == spec.moe.top_k
    runner.reset_experts()
    assert not runner.expert_counts().any()
    assert runner.experts_per_token() == 0


def test_a_model_without_experts_counts_none():
    runner, _ = make(replace(SPEC, layers=(LayerSpec(),), moe=None), "f32")
    run_whole(runner, IDS[:5])
    assert runner.expert_counts().shape == (0, 0)
    assert runner.experts_per_token() == 0


@pytest.mark.parametrize("changes", [
    {"intermediate_size": 48}, {"shared_size": 40}, {"top_k": 9}, {"top_k": 0},
    {"experts": 1, "top_k": 1}, {"experts": 5000}, {"least": 3}])  # fmt: skip
def test_experts_that_cannot_run_are_refused(changes):
    spec = replace(SPEC, moe=replace(MOE, **changes))
    with pytest.raises(CheckpointError, match="cannot"):
        compile_program(spec, dtype_of("f32"), Limits(64))


def test_gates_and_inputs_of_experts_meet_the_same_activations():
    at = "model.layers.0.mlp"
    names = [f"{at}.experts.{p}_proj.weight" for p in ("gate", "up", "down")]
    names.append(f"{at}.router.weight")
    stored = {name: ("q4_0" if ".up" in name else "f16", 64) for name in names}
    assert [stored_dtypes(stored)(name) for name in names] == ["q8_0", "q4_0", "f16", "f16"]


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_the_arena_holds_the_rows_of_experts(tokens):
    program = compile_program(SPEC, dtype_of("q8_0"), Limits(64, max_tokens=tokens))
    # A row for each choice, and what rounding the rows of each expert up to 16 may take.
    assert expert_rows(program.graph, tokens) == 2 * tokens + 15 * min(8, 2 * tokens)
    wide, offsets = program.graph.values["0.x2.gate+up"], program.layout.value_offsets
    end = offsets["0.x2.gate+up"] + wide.bytes_of(expert_rows(program.graph, tokens))
    assert (wide.rows, wide.width) == ("X", 2 * 96)
    assert end <= program.layout.arena_bytes
    runner = Runner(program, 1)  # checks every op
    short = replace(program, layout=replace(program.layout, arena_bytes=end - 64))
    with pytest.raises(ValueError, match="outside the arena"):
        Runner(short, 1)
    assert runner.executor.arena_bytes >= end


@pytest.mark.parametrize(
    ("text", "threshold", "least", "top_k"),
    [("top-p=0.8", 0.8, 1, 2), ("0.8", 0.8, 1, 2), ("0.25:2", 0.25, 2, 2),
     ("top-p=0.5, min=2,max=3", 0.5, 2, 3), ("max=1", 1, 1, 1)])  # fmt: skip
def test_how_many_experts_may_be_asked_for(text, threshold, least, top_k):
    wanted = replace(MOE, threshold=threshold, least=least, top_k=top_k)
    assert apply_experts(SPEC, text) == replace(SPEC, moe=wanted)


@pytest.mark.parametrize("text", [
    "many", "top-p=much", "top-p=0", "top-p=1.5", "top-p=nan", "min=0", "min=3", "max=9", "max=0",
    "top-p=0.5,top-p=0.6", "0.8:", "0.8:x", "best=2", "top-p=0.8;min=1", ","])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(text):
    with pytest.raises(RequestError) as caught:
        apply_experts(SPEC, text)
    assert "\n" not in str(caught.value)
    assert "experts" in str(caught.value)


def test_a_dense_model_has_no_experts_to_choose():
    with pytest.raises(RequestError, match="no experts"):
        apply_experts(replace(SPEC, moe=None, layers=(LayerSpec(),)), "0.8")


def test_the_load_of_experts():
    load = expert_load(np.array([[4, 4, 4, 4], [0, 16, 0, 0]], np.uint64), 2.0)
    data = load.to_dict()
    assert (data["entropy"], data["most_entropy"], data["experts"]) == (1.0, 2.0, 4)
    assert [layer["entropy"] for layer in data["layers"]] == [2.0, 0.0]
    assert data["layers"][1]["load"] == [0, 1, 0, 0]
    lines = format_load(load, shown=1)
    assert lines[0] == "experts: 2.00 of 4 a token; entropy 1.00 of 2.00 bits"
    assert lines[2].split() == ["layer", "1", "0.00", "bits", "1:", "100.0%", "..."]
