"""Intervals and paired tests against formulas and examples."""

from __future__ import annotations

import numpy as np
import pytest

from pronk.evaluate.paired import Resampled, blocks_of, holm, mcnemar


def test_intervals_of_independent_blocks_are_those_of_the_formula():
    values = np.random.default_rng(3).normal(2.0, 1.0, (1, 900))
    found = Resampled(values).mean(0)
    half = 1.96 * values.std() / 30
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert Resampled(values).mean(0) == found  # the same seed
    assert Resampled(values, seed=1).mean(0) != found


def test_a_small_difference_shows_in_pairs_alone():
    rng = np.random.default_rng(4)
    hard = rng.gamma(1.0, 3.0, 600)  # how hard a token is varies far more than models do
    values = np.stack([hard, hard + rng.normal(0.05, 0.2, 600), hard + rng.normal(0, 0.2, 600)])
    found = Resampled(values)
    worse, even = found.difference(1, 0), found.difference(2, 0)
    assert found.mean(0).high > found.mean(1).low  # by themselves they overlap
    assert worse.p < 0.001
    assert 0 < worse.low < worse.value < worse.high
    assert even.p > 0.05
    assert even.low < 0 < even.high
    assert found.difference(0, 1).value == -worse.value
    assert found.difference(0, 0).p == 1


def test_neighbours_are_drawn_together():
    # Each block of 16 tokens has one value: there are 25 observations, not 400.
    values = np.repeat(np.random.default_rng(5).normal(0, 1, 25), 16)[None]
    starts = np.arange(0, 400, 16)
    loose, held = Resampled(values).mean(0), Resampled(values, starts).mean(0)
    assert (held.high - held.low) / (loose.high - loose.low) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("sizes", [[255] * 40, [511, 256, 256, 3], [5], [2046] * 3])
def test_blocks_cut_no_window_and_cover_the_text(sizes):
    starts = blocks_of(sizes)
    edges = set(np.cumsum([0, *sizes[:-1]]).tolist())
    assert edges <= set(starts.tolist())
    lengths = np.diff([*starts, sum(sizes)])
    assert lengths.sum() == sum(sizes)
    assert lengths.min() > 0
    assert lengths.max() <= 2 * 256


def test_mcnemar_is_the_binomial_test_of_the_discordant():
    a = np.array([True] * 9 + [False] * 1 + [True] * 50 + [False] * 5)
    b = np.array([False] * 9 + [True] * 1 + [True] * 50 + [False] * 5)
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1
    many = np.arange(6000) < 3300
    assert 0 < mcnemar(many, ~many) < 1e-9


def test_holm_is_the_example_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
