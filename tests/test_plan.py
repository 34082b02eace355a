"""Planning from the header alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from pronk.checkpoint.kinds import KINDS
from pronk.device.plan import (
    FORMATS,
    candidates,
    fits,
    format_error,
    largest_context,
    pareto,
    planned,
    refusal,
    variants,
)
from pronk.graph.attention import apply_policy, parse_policy
from pronk.graph.kv import kv_groups, place
from pronk.graph.program import Limits, kv_pools
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


def test_weight_bytes_by_hand() -> None:
    # Panels of 16 rows: 2 bytes of scale a group and row, padded to 64 bytes; then the codes.
    narrow, wide = 16 * (2 * 2 + 64), 192 + 16 * 160
    head = 19 * narrow  # 300 rows are padded to 304
    layer = (4 + 2 + 2 + 4 + 10 + 10) * narrow + 4 * wide
    norms, frequencies = 5 * 4 * 64, 64
    assert (
        planned(SPEC, everywhere("q8_0"), 64).layout.weight_bytes
        == head + 2 * layer + norms + frequencies
    )


def test_an_embedding_of_its_own_is_planned() -> None:
    untied = planned(dataclasses.replace(SPEC, tie_embeddings=False), everywhere("q8_0"), 64)
    tied = planned(SPEC, everywhere("q8_0"), 64)
    assert untied.layout.weight_bytes - tied.layout.weight_bytes == 19 * 16 * (2 * 2 + 64)


def test_the_cache_is_whole_blocks() -> None:
    token = 2 * 2 * 2 * 16 * 2

    def cache(context: int) -> int:
        return planned(SPEC, everywhere("q8_0"), context).memory(0).kv

    assert cache(2) == cache(32) == 32 * token
    assert cache(33) == 64 * token


def test_plan_adds_up() -> None:
    result = planned(SPEC, everywhere("q4_0"), 100).memory(overhead=11)
    assert min(result.weights, result.kv, result.arena) > 0
    assert result.overhead == 11
    assert result.total == result.weights + result.kv + result.arena + 11


def test_format_error_is_that_of_rounding() -> None:
    assert format_error("q8_0") < 1e-4 < format_error("q4_1") < format_error("q4_0") < 1e-2
    assert format_error.__wrapped__("q4_1") == format_error("q4_1")


def test_variants_are_all_and_in_order() -> None:
    found = variants()
    keys = {tuple(v.formats[kind] for kind in KINDS) for v in found}
    assert keys == set(itertools.product(FORMATS, repeat=4))
    errors = [v.predicted_error for v in found]
    assert errors == sorted(errors)
    assert dict(found[0].formats) == everywhere("q8_0")


def test_what_the_source_has_is_kept() -> None:
    sources = {"head": {"q8_0": 1.0}, **{kind: {"q4_1": 1.0} for kind in KINDS[1:]}}
    best = variants(sources)[0]
    assert dict(best.formats) == {**everywhere("q4_1"), "head": "q8_0"}
    assert best.predicted_error == 0
    half = variants({kind: {"q4_1": 0.5} for kind in KINDS})
    error = next(v.predicted_error for v in half if dict(v.formats) == everywhere("q4_1"))
    assert error == pytest.approx(format_error("q4_1") / 2)


def test_the_first_that_fits_has_the_least_error() -> None:
    found = candidates(SMOL, 1024, overhead=50 * 10**6)
    largest = max(one.plan.total for one in found)
    assert dict(fits(found, largest)[0].variant.formats) == everywhere("q8_0")
    for budget in range(min(one.plan.total for one in found), largest, 3 * 10**6):
        chosen = fits(found, budget)[0]
        assert chosen.plan.total <= budget
        assert not any(
            one.plan.total <= budget
            and one.variant.predicted_error < chosen.variant.predicted_error
            for one in found
        )
        assert chosen in pareto(found)


def test_pareto_is_not_dominated() -> None:
    found = candidates(SPEC, 64, 0)
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
    found = candidates(SMOL, 2048, overhead=50 * 10**6)
    smallest = min(found, key=lambda one: one.plan.total)
    refused = str(refusal(SMOL, found, 20 * 10**6, 2048))
    assert f"--memory {smallest.plan.total} " in refused
    assert "head q4_0, attention q4_0, gate_up q4_0, down q4_0" in refused
    assert "no context would" in refused

    budget = smallest.plan.total - 5 * 10**6
    context = largest_context(SMOL, smallest.plan, 2048, budget)
    assert f"--context {context}" in str(refusal(SMOL, found, budget, 2048))
    formats = smallest.variant.formats
    assert planned(SMOL, formats, context).memory(50 * 10**6).total <= budget
    assert planned(SMOL, formats, context + 1).memory(50 * 10**6).total > budget


HYBRID = apply_policy(
    dataclasses.replace(SMOL, context_length=1 << 15),
    parse_policy("window=512,global-every=4,sinks=4"),
)
LAYER_BLOCK = 2 * 3 * 32 * 64 * 2  # keys and values of 3 heads of 64, bf16
BOUND = (512 + 128) // 32 + 1 + 1  # window and step, where they begin, sinks


def test_layers_of_one_kind_share_blocks() -> None:
    everything, windows = kv_groups(HYBRID)[::-1]
    assert (everything.attention, everything.layers) == ("global", (3, 7, 11, 15, 19, 23, 27))
    assert (windows.window, windows.sinks, len(windows.layers)) == (512, 4, 23)
    assert place(kv_groups(HYBRID), 4) == (0, 3)
    assert place(kv_groups(HYBRID), 27) == (1, 6)
    mixed = (LayerSpec("chunked", 64), LayerSpec("window", 64), LayerSpec("chunked", 64))
    kinds = [g.attention for g in kv_groups(dataclasses.replace(SPEC, layers=mixed))]
    assert kinds == ["chunked", "window"]


def test_the_cache_of_a_window_is_bounded() -> None:
    def cache(spec: ModelSpec, context: int) -> int:
        return planned(spec, everywhere("q8_0"), context).memory(0).kv

    for context in (1024, 8192, 32768):
        blocks = context // 32
        assert cache(HYBRID, context) == (7 * blocks + 23 * BOUND) * LAYER_BLOCK
        assert cache(SMOL, context) == 30 * blocks * LAYER_BLOCK
    assert cache(HYBRID, 512) == cache(SMOL, 512)  # shorter than the bound
    assert cache(HYBRID, 8192) < 0.6 * cache(SMOL, 8192)


def test_pools_hold_as_many_sequences() -> None:
    def blocks(**limits: int) -> list[int]:
        return [pool.blocks for pool in kv_pools(HYBRID, Limits(4096, **limits))]

    assert blocks() == [BOUND, 128]
    assert blocks(kv_tokens=3 * 4096) == [3 * BOUND, 3 * 128]
    assert blocks(kv_tokens=2 * 4096 + 1) == [3 * BOUND, 2 * 128 + 1]
    assert blocks(kv_tokens=32 * 4096, max_sequences=4) == [4 * BOUND, 32 * 128]
    assert blocks(kv_tokens=64) == [2, 2]
    assert blocks(max_tokens=32) == [BOUND - 3, 128]


@pytest.mark.parametrize(
    "layer", [LayerSpec("window", 100, 40), LayerSpec("window", 1), LayerSpec("chunked", 50)]
)
def test_a_bound_holds_whatever_a_step_begins_with(layer: LayerSpec) -> None:
    (group,) = kv_groups(dataclasses.replace(SPEC, layers=(layer,)))
    sinks = -(-group.sinks // 32)
    for at_once in (1, 7, 64):
        bound = group.bound(1 << 20, at_once)
        for start in range(900):
            first = group.first_seen(start) // 32
            held = {*range(sinks), *range(first, (start + at_once - 1) // 32 + 1)}
            assert len(held) <= bound


def test_the_largest_context_knows_windows() -> None:
    formats = everywhere("q4_0")
    plan = planned(HYBRID, formats, 8192).memory(0)
    budget = plan.total - 1
    context = largest_context(HYBRID, plan, 8192, budget)
    assert context == 8192 - 32
    assert planned(HYBRID, formats, context).memory(0).total <= budget
    assert largest_context(HYBRID, plan, 8192, plan.total) == 8192
    assert largest_context(HYBRID, plan, 8192, plan.total - plan.kv) == 0
