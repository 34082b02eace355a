"""Asked for the largest logits alone, the head gives them as it gives all: the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from engines import fill_runner, isas, random_weights

from pronk import SamplingParams, _native
from pronk.checkpoint.blocks import quantize
from pronk.engine.engine import Engine
from pronk.engine.runner import Runner
from pronk.engine.sampler import MOST_KEPT, Keep, Sampler
from pronk.graph.build import build_decoder
from pronk.graph.cost import Step, label, program_costs
from pronk.graph.ir import Graph, Op, Ref, Value, Weight
from pronk.graph.memory import plan_layout
from pronk.graph.pack import bound_plan_floats
from pronk.graph.passes import CPU_PASSES, run_passes, split_head
from pronk.graph.program import Limits, Program, compile_program
from pronk.graph.reference import Reference
from pronk.spec import LayerSpec, ModelSpec

VOCAB, COLS, ROWS = 1003, 160, 12
SPEC = ModelSpec("llama", "", VOCAB, COLS, 192, 5, 5, 32, 1e-5, 256, True, (LayerSpec(),) * 2)


class Head:
    """A program that is little more than a head: token i has row i of `states` before it."""

    def __init__(self, states, rows, *, threads=1, isa="", scale=1.0):
        cols = states.shape[1]
        attrs = {"cols": cols} | ({"scale": scale} if scale != 1 else {})
        graph = Graph(
            (Op("embed", (), "x", ("table",)), Op("gather", (Ref("x"),), "last"),
             Op("matmul", (Ref("last"),), "logits", ("head",), attrs)),
            {v.name: v for v in (Value("x", "T", cols), Value("last", "R", cols),
                                 Value("logits", "R", VOCAB))},
            {"table": Weight("table", VOCAB, cols, "f32"),
             "head": Weight("head", VOCAB, cols, "q8_0")},
            "logits",
        )  # fmt: skip
        graph = run_passes(graph, CPU_PASSES)
        spec = ModelSpec("llama", "", VOCAB, cols, cols, 1, 1, 32, 1e-5, 64, True, (LayerSpec(),))
        program = Program(spec, Limits(64, 32, ROWS), graph, plan_layout(graph, 32, ROWS))
        self.runner = Runner(program, threads, isa)
        table = np.zeros((VOCAB, cols), np.float32)
        table[: len(states)] = states
        fill_runner(self.runner, {}, {"table": table.view(np.uint8), "head": rows})
        ids = list(range(len(states)))
        self.runner.run(ids, ids, [0] * len(ids), [[[0, 1]]])

    def all(self, row):
        return self.runner.head([row])[0].copy()

    def largest(self, rows, *keep):
        return self.runner.head(rows, keep).copy()


def states(seed=0, count=16, cols=COLS):
    """Rows as norms make them, some with outliers, one of zeros, one tiny."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, cols)).astype(np.float32)
    x[:, 5] *= 20
    x[3], x[4] = 0, x[4] * 1e-30
    return x


def weights(seed=1, cols=COLS):
    """Rows of q8_0 blocks: some equal, some zero, one with negative scales."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((VOCAB, cols)).astype(np.float32)
    values *= rng.lognormal(0, 0.5, (VOCAB, 1)).astype(np.float32)
    values[50:90] = values[7]
    values[200:240] = 0
    rows = quantize(values, "q8_0").reshape(VOCAB, -1, 34)
    rows[300, :, 1] ^= 0x80
    return rows.reshape(VOCAB, -1)


def check(full, part, keep):
    """What counts is the same bits, and nothing else is made up."""
    left_out = np.isneginf(part) & ~np.isneginf(full)
    assert (part[~left_out].view(np.int32) == full[~left_out].view(np.int32)).all()
    least = np.sort(full)[-keep.most] if keep.most else -np.inf
    least = max(least, full.max() - keep.span)
    assert (full[left_out] < least).all()


KEEPS = (Keep(1), Keep(7), Keep(MOST_KEPT), Keep(0, 2.5), Keep(20, 0.0), Keep(0))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("keep", KEEPS)
def test_the_largest_logits_are_the_same_bits(isa, keep):
    for scale in (1.0, 0.1):
        head = Head(states(), weights(), isa=isa, scale=scale, threads=2)
        for row in range(16):
            check(head.all(row), head.largest([row], keep)[0], keep)


def test_little_of_the_lower_plane_is_read():
    rows = weights()
    x = states()
    x[0] = np.random.default_rng(3).standard_normal(COLS)
    x[0, 5] = 0
    values = rows.reshape(VOCAB, -1, 34)[9, :, 2:].view(np.int8).reshape(-1)
    x[1] = values / np.float32(50)  # in the direction of one row, which wins by far
    head = Head(x, rows)
    calls, read, plane = head.runner.executor.planes
    assert (calls, read) == (0, 0)
    assert plane == 63 * 16 * COLS // 2
    part = head.largest([1], Keep(1))[0]
    assert part.argmax() == head.all(1).argmax() == 9
    assert np.isneginf(part).sum() > 900
    calls, read, _ = head.runner.executor.planes
    assert calls == 1
    assert 0 < read < plane / 4


def test_neither_company_nor_threads_matter():
    alone = Head(states(), weights())
    keeps = [Keep(1), Keep(5), Keep(0, 1.0), Keep(1)]
    expected = np.stack([alone.largest([r], keeps[r])[0] for r in range(4)])
    for threads in (1, 3):
        head = Head(states(), weights(), threads=threads)
        for count in (2, 3, 4):
            found = head.largest(range(count), *keeps[:count])
            assert (found.view(np.int32) == expected[:count].view(np.int32)).all()
    before = alone.runner.executor.planes
    many = alone.largest(range(ROWS), *[Keep(1)] * ROWS)  # all logits are as fast then
    assert alone.runner.executor.planes == before
    assert np.isfinite(many).all()
    some = alone.largest([0, 1], Keep(1), None)
    assert np.isfinite(some).all()


@pytest.mark.parametrize("isa", isas())
def test_equal_logits_all_stay(isa):
    x = np.ones((2, COLS), np.float32)
    x[1] = -1
    values = np.full((VOCAB, COLS), 0.5, np.float32)
    head = Head(x, quantize(values, "q8_0"), isa=isa)
    for row in range(2):  # all negative too: rows past the matrix are no logits
        full, part = head.all(row), head.largest([row], Keep(1))[0]
        assert (full == part).all()
        assert part.argmax() == 0


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(isa, bad):
    x = states()
    x[1, 40] = bad
    rows = weights()
    damaged = rows.reshape(VOCAB, -1, 34).copy()
    damaged[77, 2, :2] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
    for table, row in ((rows, 1), (damaged.reshape(VOCAB, -1), 0)):
        head = Head(x, table, isa=isa)
        for keep in KEEPS:
            full, part = head.all(row), head.largest([row], keep)[0]
            assert part.argmax() == full.argmax()
            assert not np.isfinite(part.max())
            wrong = ~np.isfinite(full) & ~np.isneginf(full)
            assert np.array_equal(part[wrong], full[wrong], equal_nan=True)


def test_a_request_for_too_many_is_refused():
    head = Head(states(), weights())
    for keep in (Keep(MOST_KEPT + 1), Keep(-1), Keep(1, -1.0), Keep(1, math.nan)):
        with pytest.raises(ValueError, match="out of range"):
            head.largest([0], keep)
    with pytest.raises(ValueError, match="one a row"):
        head.runner.executor.head(np.array([0], np.int32), [(1, 0.0)] * 2)
    assert _native.MOST_KEPT == MOST_KEPT


def test_the_pass_keeps_the_meaning():
    before = run_passes(build_decoder(SPEC, lambda _: "q8_0"), CPU_PASSES[:-3])
    after = split_head(before)
    assert after.ops[-1].kind == "head"
    assert after.weights["model.embed_tokens.weight"].dtype == "q8_planes"
    exact, _ = random_weights(after, SPEC)
    steps = [
        Reference(g, exact).step([1, 2, 3], [0, 1, 2], [0] * 3, [1, 2]) for g in (before, after)
    ]
    assert (steps[0] == steps[1]).all()


@pytest.mark.parametrize(
    "change", [{"logit_softcap": 30.0}, {"logit_scale": -1.0}, {"tie_embeddings": False}]
)
def test_heads_that_it_leaves_alone(change):
    spec = replace(SPEC, **change)
    graph = run_passes(build_decoder(spec, lambda _: "q8_0"), CPU_PASSES)
    dtypes = {w.dtype for w in graph.weights.values() if w.rows > 1}
    if "tie_embeddings" in change:  # the embedding stays as it is
        assert graph.weights["model.embed_tokens.weight"].dtype == "q8_0"
        assert graph.weights["lm_head.weight"].dtype == "q8_planes"
    else:
        assert dtypes == {"q8_0"}
        assert "head" not in {op.kind for op in graph.ops}
    other = run_passes(build_decoder(spec, lambda _: "q4_1"), CPU_PASSES)
    assert "head" not in {op.kind for op in other.ops}


def test_sizes_are_those_of_the_kernels():
    for rows, cols in ((1, 32), (16, 64), (1003, 160), (262144, 640)):
        assert 4 * bound_plan_floats(rows, cols) == _native.bound_plan_bytes(rows, cols)


def test_costs_leave_out_what_was_not_read():
    program = compile_program(SPEC, lambda _: "q8_0", Limits(64))
    op = program.graph.ops[-1]
    assert label(program.graph, op) == "matmul head q8_planes"
    full = program_costs(program, [Step.of([0], [0], [1])])[-1]
    less = program_costs(program, [replace(Step.of([0], [0], [1]), unread=1000)])[-1]
    assert full.macs == less.macs == VOCAB * COLS
    assert full.weights - less.weights == 1000


def greedy(runner, params, count=24):
    engine = Engine(runner, frozenset())
    engine.add([5, 6, 7], params)
    tokens = []
    while engine.busy:
        tokens += [event.sample.token for event in engine.step()]
    assert len(tokens) == count
    return tokens


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}, {"temperature": 1.5, "min_p": 0.1}],
)
def test_the_engine_asks_and_draws_the_same_tokens(params):
    program = compile_program(SPEC, lambda _: "q8_0", Limits(64))
    runner = fill_runner(Runner(program, 2), *random_weights(program.graph, SPEC))
    params = SamplingParams(max_tokens=24, seed=3, ignore_eos=True, **params)
    runner.record()
    tokens = greedy(runner, params)
    calls, read, plane = runner.executor.planes
    assert calls == 24
    assert sum(step.unread for step in runner.recording().steps) == 24 * plane - read
    runner.record(False)
    # With the logarithms of probabilities, all logits are computed.
    assert greedy(runner, replace(params, logprobs=0)) == tokens
    assert runner.executor.planes[0] == 24


def test_what_samplers_ask_for():
    def keep(**params):
        return Sampler(SamplingParams(**params), [1, 2], 100).keep

    assert keep() == Keep(1)
    assert keep(temperature=1.0) is None
    assert keep(temperature=1.0, top_k=5) == Keep(5)
    assert keep(temperature=1.0, top_k=MOST_KEPT + 1) is None
    assert keep(temperature=1.0, top_p=0.9) is None
    assert keep(temperature=1.0, top_k=5, top_p=0.9, min_p=0.5) == Keep(5)
    assert keep(temperature=2.0, min_p=0.5) == Keep(0, 2 * math.log(2))
    for other in ({"logprobs": 0}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.5},
                  {"frequency_penalty": 0.5}, {"logit_bias": {3: 1.0}}):  # fmt: skip
        assert keep(**other) is None
        assert keep(temperature=1.0, top_k=5, **other) is None


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.3, "top_k": 30, "top_p": 0.8},
     {"temperature": 5.0, "min_p": 0.05}, {"temperature": 1.0, "min_p": 1.0},
     {"temperature": 0.5, "top_k": 10, "min_p": 0.2},
     {"temperature": 0.5, "top_k": 10, "top_p": 0.9, "min_p": 0.2}],
)  # fmt: skip
def test_what_a_sampler_does_not_ask_for_does_not_matter(params):
    rng = np.random.default_rng(0)
    for seed in range(40):
        logits = (3 * rng.standard_normal(400)).round(1).astype(np.float32)  # with ties
        one, other = (Sampler(SamplingParams(seed=seed, **params), [1], 400) for _ in range(2))
        keep = one.keep
        least = np.sort(logits)[-keep.most] if keep.most else -np.inf
        least = max(least, np.float32(logits.max() - keep.span * 1.00001))
        part = np.where(logits >= least, logits, np.float32(-np.inf))
        assert one.sample(logits) == other.sample(part)
