"""What ops cost, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pronk.graph.cost import Cost, Step, label, program_costs
from pronk.graph.program import Limits, compile_program
from pronk.spec import LayerSpec, ModelSpec

SPEC = ModelSpec(
    family="llama", name="", vocab_size=320, hidden_size=64, intermediate_size=160, num_heads=4,
    num_kv_heads=2, head_dim=16, norm_eps=1e-5, context_length=512, tie_embeddings=True,
    layers=(LayerSpec(),) * 2)  # fmt: skip


def costs(dtype, *steps, **limits):
    """Sums over the layers by label, and the program."""
    program = compile_program(SPEC, lambda name: dtype, Limits(512, **limits))
    sums: dict[str, Cost] = {}
    for op, cost in zip(program.graph.ops, program_costs(program, steps), strict=True):
        key = label(program.graph, op)
        sums[key] = sums.get(key, Cost()) + cost
    return sums


def test_a_step_counts_its_tokens_and_their_pasts():
    step = Step.of([0, 1, 2], [0, 0, 0], [1])
    assert step == Step(((0, 0, 3),), (1,))
    assert (step.tokens, *step.seen()) == (3, 1 + 2 + 3, 3)
    # Two sequences; the second one's tokens share what they read.
    step = Step.of([9, 3, 4], [0, 1, 1])
    assert (step.tokens, *step.seen()) == (3, 10 + 4 + 5, 10 + 5)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 8, 100])
@pytest.mark.parametrize("sinks", [0, 1, 3, 20])
def test_a_step_counts_what_a_window_shows(window, chunked, sinks):
    positions = [*range(17, 29), 3, 90, 91, 50, 51]
    sequences = [0] * 12 + [1] + [2] * 4
    found = Step.of(positions, sequences).seen(window, chunked, sinks)

    def sees(query, key):
        if not window or key < sinks:
            return True
        return query // window == key // window if chunked else query - key < window

    pairs = [(s, q, k) for s, q in zip(sequences, positions, strict=True) for k in range(q + 1)]
    seen = [(s, k) for s, q, k in pairs if sees(q, k)]
    assert found == (len(seen), len(set(seen)))


def test_layers_are_counted_by_what_they_see():
    narrow = LayerSpec("window", 8, 2)
    spec = replace(SPEC, layers=(LayerSpec(), narrow, LayerSpec("chunked", 16)))
    program = compile_program(spec, lambda name: "f32", Limits(512))
    step = Step.of([100], [0])
    found = zip(program.graph.ops, program_costs(program, [step]), strict=True)
    attends = [cost for op, cost in found if op.kind == "attend"]
    position = 2 * 2 * 16 * 2
    assert [cost.kv for cost in attends] == [101 * position, 10 * position, 5 * position]
    assert [cost.macs for cost in attends] == [2 * 64 * n for n in (101, 10, 5)]


def test_a_prompt_in_float():
    # Five tokens of one sequence, the logits of one.
    found = costs("f32", Step.of(range(5), [0] * 5, [1]))
    attended, position = 1 + 2 + 3 + 4 + 5, 2 * 2 * 16 * 2  # keys and values, 2 heads of 16, bf16
    layers = {
        # weights, keys and values, activations, multiply-adds of one layer
        "matmul q|k|v f32": Cost(128 * 64 * 4, 0, 5 * (64 + 128) * 4, 5 * 128 * 64),
        "rope_store": Cost(0, 5 * position, 5 * (128 + 16 + 128) * 4),
        "attend": Cost(0, 5 * position, 5 * (64 + 64) * 4, 2 * 64 * attended),
        "matmul o f32": Cost(64 * 64 * 4, 0, 5 * (64 + 64 + 64) * 4, 5 * 64 * 64),
        "matmul gate|up f32": Cost(320 * 64 * 4, 0, 5 * (64 + 320) * 4, 5 * 320 * 64),
        "activate": Cost(0, 0, 5 * 3 * 160 * 4),
        "matmul down f32": Cost(64 * 160 * 4, 0, 5 * (160 + 64 + 64) * 4, 5 * 64 * 160),
    }
    for key, one in layers.items():
        assert found.pop(key) == one + one, key
    assert found.pop("workspace") == Cost()
    # Two norms a layer on five rows, and the last on one.
    assert found.pop("rms_norm") == Cost(5 * 64 * 4, 0, (4 * 5 + 1) * 2 * 64 * 4)
    # A row of the table lies across its panel of 16.
    assert found.pop("embed f32") == Cost(5 * 16 * 64 * 4, 0, 5 * 64 * 4)
    assert found.pop("rope_table") == Cost(64, 0, 5 * 16 * 4)
    assert found.pop("gather") == Cost(0, 0, 2 * 64 * 4)
    assert found.pop("matmul head f32") == Cost(320 * 64 * 4, 0, (64 + 320) * 4, 320 * 64)
    assert not found


def test_packed_weights_and_float_caches():
    step = Step.of([9, 4], [0, 1], [2])
    found = costs("q4_1", step, kv_dtype="f32")
    # 8 panels of 16 rows: two groups of 32 columns, each row's 4 bytes of scales and 16 of quants.
    assert found["matmul q|k|v q4_1"].weights == 2 * 8 * 16 * 2 * 20
    assert found["matmul q|k|v q4_1"].macs == 2 * 2 * 128 * 64
    assert found["attend"].kv == 2 * (10 + 5) * (2 * 2 * 16 * 4)
    assert found["attend"].macs == 2 * 2 * 64 * (10 + 5)


def test_steps_add_up_and_the_head_runs_by_its_calls():
    one, two = Step.of([3], [0], [1]), Step.of(range(12), [0] * 12, [8, 4])
    first, second, both = costs("f32", one), costs("f32", two), costs("f32", one, two, one)
    for key, cost in both.items():
        assert cost == first[key] + second[key] + first[key], key
    # Twelve rows in two calls: the weights are read twice, the rows once.
    assert second["matmul head f32"] == Cost(2 * 320 * 64 * 4, 0, 12 * 384 * 4, 12 * 320 * 64)
    assert costs("f32", Step.of([0], [0]))["matmul head f32"] == Cost()


@pytest.mark.parametrize("dtype", ["f32", "q4_1"])
def test_a_token_multiplies_with_every_parameter(dtype):
    macs = sum(cost.macs for cost in costs(dtype, Step.of([0], [0], [1])).values())
    parameters = 320 * 64 + 2 * (128 * 64 + 64 * 64 + 320 * 64 + 64 * 160)
    assert macs == parameters + 2 * 2 * 64  # one position attended to, in two layers
