"""Planning from the header alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from pronk.checkpoint.kinds import KINDS, tensor_kind
from pronk.device.plan import (
    FORMATS,
    candidates,
    choose,
    format_error,
    kv_bytes,
    largest_context,
    pareto,
    plan,
    variants,
    weight_bytes,
)
from pronk.errors import BudgetError
from pronk.graph.program import Limits, compile_program
from pronk.spec import LayerSpec, ModelSpec

SPEC = ModelSpec(
    family="llama",
    name="tiny",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    context_length=512,
    tie_embeddings=True,
    layers=(LayerSpec(),) * 2,
)
SMOL = dataclasses.replace(
    SPEC,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    context_length=8192,
    layers=(LayerSpec(),) * 30,
)


def everywhere(dtype: str) -> dict[str, str]:
    return dict.fromkeys(KINDS, dtype)


@pytest.mark.parametrize("spec", [SPEC, SMOL], ids=["tiny", "smol"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtypes", [("q8_0",) * 4, ("q4_0", "q4_1", "q8_0", "q4_0")])
def test_weights_are_those_of_the_runtime(
    spec: ModelSpec, tied: bool, dtypes: tuple[str, ...]
) -> None:
    spec = dataclasses.replace(spec, tie_embeddings=tied)
    formats = dict(zip(KINDS, dtypes, strict=True))

    def dtype_of(name: str) -> str:
        if not tied and name == "model.embed_tokens.weight":
            return "f16"
        return formats[tensor_kind(name) or ""]

    program = compile_program(spec, dtype_of, Limits(64))
    assert weight_bytes(spec, formats) == program.layout.weight_bytes
    assert kv_bytes(spec, 64) == program.kv_bytes


def test_weight_bytes_by_hand() -> None:
    # Panels of 16 rows: 2 bytes of scale a group and row, padded to 64 bytes; then the codes.
    narrow, wide = 16 * (2 * 2 + 64), 192 + 16 * 160
    head = 19 * narrow  # 300 rows are padded to 304
    layer = (4 + 2 + 2 + 4 + 10 + 10) * narrow + 4 * wide
    norms, frequencies = 5 * 4 * 64, 64
    assert weight_bytes(SPEC, everywhere("q8_0")) == head + 2 * layer + norms + frequencies


def test_kv_bytes_are_whole_blocks() -> None:
    token = 2 * 2 * 2 * 16 * 2
    assert kv_bytes(SPEC, 1) == kv_bytes(SPEC, 32) == 32 * token
    assert kv_bytes(SPEC, 33) == 64 * token
    assert kv_bytes(SPEC, 32, "f32") == 64 * token


def test_plan_adds_up() -> None:
    result = plan(SPEC, everywhere("q4_0"), 100, arena=7, overhead=11)
    assert result.arena == 7
    assert result.overhead == 11
    assert result.total == weight_bytes(SPEC, everywhere("q4_0")) + kv_bytes(SPEC, 100) + 18


def test_format_error_is_that_of_rounding() -> None:
    assert format_error("q8_0") < 1e-4 < format_error("q4_1") < format_error("q4_0") < 1e-2
    assert format_error.__wrapped__("q4_1") == format_error("q4_1")


def test_variants_are_all_and_in_order() -> None:
    found = variants(SPEC)
    keys = {tuple(v.formats[kind] for kind in KINDS) for v in found}
    assert keys == set(itertools.product(FORMATS, repeat=4))
    errors = [v.predicted_error for v in found]
    assert errors == sorted(errors)
    assert dict(found[0].formats) == everywhere("q8_0")


def test_what_the_source_has_is_kept() -> None:
    sources = {"head": {"q8_0": 1.0}, **{kind: {"q4_1": 1.0} for kind in KINDS[1:]}}
    best = variants(SPEC, sources)[0]
    assert dict(best.formats) == {**everywhere("q4_1"), "head": "q8_0"}
    assert best.predicted_error == 0
    half = variants(SPEC, {kind: {"q4_1": 0.5} for kind in KINDS})
    error = next(v.predicted_error for v in half if dict(v.formats) == everywhere("q4_1"))
    assert error == pytest.approx(format_error("q4_1") / 2)


def test_choose_takes_the_least_error_that_fits() -> None:
    found = candidates(SMOL, 1024, arena=10**6, overhead=50 * 10**6)
    largest = max(one.plan.total for one in found)
    assert dict(choose(found, largest).variant.formats) == everywhere("q8_0")
    for budget in range(min(one.plan.total for one in found), largest, 3 * 10**6):
        chosen = choose(found, budget)
        assert chosen.plan.total <= budget
        assert not any(
            one.plan.total <= budget
            and one.variant.predicted_error < chosen.variant.predicted_error
            for one in found
        )
        assert chosen in pareto(found)


def test_pareto_is_not_dominated() -> None:
    found = candidates(SPEC, 64, 0, 0)
    front = pareto(found)
    assert all(
        a.plan.total > b.plan.total and a.variant.predicted_error < b.variant.predicted_error
        for a, b in itertools.pairwise(front)
    )
    for one in found:
        assert any(
            f.plan.total <= one.plan.total
            and f.variant.predicted_error <= one.variant.predicted_error
            for f in front
        )


def test_refusal_names_the_nearest() -> None:
    found = candidates(SMOL, 2048, arena=10**6, overhead=50 * 10**6)
    smallest = min(found, key=lambda one: one.plan.total)
    with pytest.raises(BudgetError) as refused:
        choose(found, 20 * 10**6, SMOL, 2048)
    assert f"--memory {smallest.plan.total} " in str(refused.value)
    assert "head q4_0, attention q4_0, gate_up q4_0, down q4_0" in str(refused.value)
    assert "no context would" in str(refused.value)

    budget = smallest.plan.total - 5 * 10**6
    context = largest_context(SMOL, smallest.plan, budget)
    with pytest.raises(BudgetError, match=f"--context {context}"):
        choose(found, budget, SMOL, 2048)
    formats = smallest.variant.formats
    assert plan(SMOL, formats, context, 10**6, 50 * 10**6).total <= budget
    assert plan(SMOL, formats, context + 1, 10**6, 50 * 10**6).total > budget
