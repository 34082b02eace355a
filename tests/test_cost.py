"""What ops cost, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pronk.graph.cost import Cost, Step, label, program_costs
from pronk.graph.kv import KvGroup
from pronk.graph.program import Limits, compile_program
from pronk.spec import LayerSpec, ModelSpec, MoeSpec

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
    one = Step.of([0, 1, 2], [0, 0, 0], [1])
    assert one == Step(3, ((0, 3),), (1,))
    every = KvGroup("global", 0, 0, (0,))
    assert (one.attended(every), one.past(every)) == (1 + 2 + 3, 3)
    # Two sequences; the second one's tokens share what they read.
    two = Step.of([9, 3, 4], [0, 1, 1])
    assert (two.attended(every), two.past(every)) == (10 + 4 + 5, 10 + 5)
    window, chunk = KvGroup("window", 4, 2, (0,)), KvGroup("chunked", 4, 0, (0,))
    # Position 9 sees 0, 1, 6..9; position 4 sees 0, 1..4; of its chunk alone, 8 and 9, and 4.
    assert (two.attended(window), two.past(window)) == (6 + 4 + 5, 6 + 5)
    assert (two.attended(chunk), two.past(chunk)) == (2 + 4 + 1, 2 + 5)


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


def test_a_step_reads_the_experts_it_can_choose():
    moe = MoeSpec(experts=8, top_k=2, intermediate_size=96)
    spec = replace(SPEC, layers=(LayerSpec(mlp="moe"),), moe=moe)
    program = compile_program(spec, lambda name: "f32" if "router" in name else "q8_0", Limits(64))

    def found(tokens):
        step = Step.of(range(tokens), [0] * tokens)
        costs = program_costs(program, [step])
        return {label(program.graph, op): c for op, c in zip(program.graph.ops, costs, strict=True)}

    # 12 panels of an expert: of 2 groups of 32 columns, 34 bytes each; 64 bytes of scales a panel.
    panels = 2 * 96 // 16 * (16 * 2 * 32 + 64)
    quantized = 192  # 2 groups of 64 bytes and 16 of scales, rounded up
    for tokens, experts in ((1, 2), (3, 6), (40, 8)):
        costs, rows = found(tokens), 2 * tokens
        assert costs["expert_matmul gate|up q8_0"] == Cost(
            experts * panels, 0, rows * (quantized + 192 * 4), rows * 192 * 64
        )
        assert costs["expert_matmul down q8_0"].macs == rows * 96 * 64
        assert costs["combine"] == Cost(0, 0, (rows + 2 * tokens) * 64 * 4)
        gathered = 2 * rows * quantized if tokens > 1 else 0
        assert costs["expert_gather"] == Cost(0, 0, gathered)
