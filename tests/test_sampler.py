"""The sampler against plain textbook implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.sampler import (
    Candidates,
    Sampler,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    scale_by_temperature,
)
from pronk.errors import PronkError, RequestError
from pronk.spec import SamplingParams

VOCAB = 300


def logits_of(seed: int, size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def candidates_of(logits: np.ndarray) -> Candidates:
    return Candidates(np.arange(len(logits)), np.asarray(logits, np.float32))


def plain_softmax(logits: list[float]) -> list[float]:
    peak = max(logits)
    weights = [math.exp(x - peak) for x in logits]
    return [w / sum(weights) for w in weights]


def plain_order(logits: np.ndarray) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def test_greedy_is_argmax_with_the_lowest_id_among_equals():
    sampler = Sampler(SamplingParams(), [], 5)
    assert sampler.sample(np.array([0, 3, 1, 3, 2], np.float32)).token == 1
    sample = sampler.sample(np.array([0, 0, 0, 0, 0], np.float32))
    assert (sample.token, sample.logprob, sample.top_logprobs) == (0, None, ())


def test_greedy_takes_no_softmax(monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("an exponential of every logit")

    for name in ("log_total", "scale_by_temperature", "draw", "np.exp"):
        monkeypatch.setattr(f"pronk.engine.sampler.{name}", forbidden)
    logits = logits_of(0)
    for params in (SamplingParams(), SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1)):
        assert Sampler(params, [], VOCAB).sample(logits).token == logits.argmax()
    with pytest.raises(AssertionError, match="exponential"):
        Sampler(SamplingParams(logprobs=0), [], VOCAB).sample(logits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 7, 64, 299, 300])
def test_top_k_is_the_head_of_a_full_sort(seed: int, k: int):
    logits = np.round(logits_of(seed))  # rounding makes many ties
    kept = keep_top_k(candidates_of(logits), k)
    assert kept.ids.tolist() == plain_order(logits)[:k]
    assert np.array_equal(kept.logits, logits[kept.ids])


def test_top_k_ties_keep_the_lowest_ids():
    logits = np.array([1, 5, 1, 1, 5, 1], np.float32)
    assert keep_top_k(candidates_of(logits), 3).ids.tolist() == [1, 4, 0]
    sampler = Sampler(SamplingParams(temperature=1, top_k=3, seed=0), [], 6)
    drawn = {sampler.sample(logits).token for _ in range(300)}
    assert drawn == {0, 1, 4}


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set_that_reaches_it(scale: float, top_p: float):
    # 2,000 tokens, nearly flat at scale 0.01, so that the search must widen.
    logits = logits_of(3, 2000) * np.float32(scale)
    probs = plain_softmax(logits.tolist())
    order, total, expected = plain_order(logits), 0.0, 0
    while total < top_p:
        total += probs[order[expected]]
        expected += 1
    kept = keep_top_p(candidates_of(logits), top_p)
    assert abs(len(kept.ids) - expected) <= (1 if expected > 100 else 0)
    assert kept.ids.tolist() == order[: len(kept.ids)]


def test_top_p_works_on_what_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    two = keep_top_k(candidates_of(logits), 2)  # renormalized: 4/7 and 3/7
    assert keep_top_p(two, 0.5).ids.tolist() == [0]
    assert keep_top_p(candidates_of(logits), 0.5).ids.tolist() == [0, 1]


@pytest.mark.parametrize("min_p", [1.0, 0.5, 0.05, 0.001])
def test_min_p_is_relative_to_the_best(min_p: float):
    logits = logits_of(5)
    probs = plain_softmax(logits.tolist())
    expected = [i for i, p in enumerate(probs) if p >= min_p * max(probs)]
    assert keep_min_p(candidates_of(logits), min_p).ids.tolist() == expected


def test_temperature_divides_and_survives_the_extremes():
    logits = logits_of(6)
    scaled = scale_by_temperature(logits, float(logits.max()), 0.7)
    assert np.allclose(scaled - scaled[0], (logits - logits[0]) / 0.7, atol=1e-4)
    for tiny in (1e-5, 1e-40, 5e-324):
        sampler = Sampler(SamplingParams(temperature=tiny, seed=1), [], VOCAB)
        assert sampler.sample(logits).token == int(logits.argmax())


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_draw_inverts_the_cumulative_distribution(values: list[float], uniform: float):
    probs = plain_softmax(values)
    token = draw(candidates_of(np.array(values)), uniform)
    below = sum(probs[:token])
    assert below - 1e-5 <= uniform <= below + probs[token] + 1e-5


def test_draw_never_returns_a_token_without_probability():
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert draw(candidates_of(logits), uniform) in (1, 3)


@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 8, "top_p": 0.9}]
)
def test_frequencies_match_the_distribution(truncation: dict):
    logits, draws = logits_of(8, 12), 4000
    order = plain_order(logits)
    probs = np.array(plain_softmax((logits / np.float32(1.5)).tolist()))
    kept = order[: truncation.get("top_k", 12)]
    if "top_p" in truncation:
        mass, size = 0.0, 0
        while mass < truncation["top_p"]:
            mass += probs[kept[size]] / probs[kept].sum()
            size += 1
        kept = kept[:size]
    if "min_p" in truncation:
        kept = [i for i in kept if probs[i] >= truncation["min_p"] * probs.max()]
    expected = np.zeros(12)
    expected[kept] = probs[kept] / probs[kept].sum()

    sampler = Sampler(SamplingParams(temperature=1.5, seed=11, **truncation), [], 12)
    seen = np.bincount([sampler.sample(logits).token for _ in range(draws)], minlength=12)
    assert not seen[expected == 0].any()
    live = expected > 0
    chi_square = ((seen[live] - draws * expected[live]) ** 2 / (draws * expected[live])).sum()
    degrees = live.sum() - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_same_seed_same_tokens():
    params = SamplingParams(temperature=1, seed=42)
    runs = []
    for p in (params, params, SamplingParams(temperature=1, seed=43)):
        sampler = Sampler(p, [], VOCAB)
        runs.append([sampler.sample(logits_of(i)).token for i in range(50)])
    assert runs[0] == runs[1] != runs[2]


def test_no_seed_differs_from_run_to_run():
    flat = np.zeros(VOCAB, np.float32)
    runs = []
    for _ in range(2):
        sampler = Sampler(SamplingParams(temperature=1), [], VOCAB)
        runs.append([sampler.sample(flat).token for _ in range(20)])
    assert runs[0] != runs[1]


def test_repetition_penalty_counts_prompt_and_output_once():
    logits = np.array([2.0, 1.9, -1.0, -1.5], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2, logprobs=4), [0, 0, 2], 4)
    plain = np.array([1.0, 1.9, -2.0, -1.5])
    first = sampler.sample(logits)
    assert first.token == 1
    probs = plain_softmax(plain.tolist())
    assert {t: pytest.approx(math.log(probs[t]), abs=1e-5) for t in range(4)} == dict(
        first.top_logprobs
    )
    plain[1] /= 2
    second = sampler.sample(logits)
    assert second.token == 0
    assert second.logprob == pytest.approx(math.log(plain_softmax(plain.tolist())[0]), abs=1e-5)


def test_presence_and_frequency_count_only_generated_tokens():
    logits = np.array([3.0, 2.0, 0.0], np.float32)
    params = SamplingParams(presence_penalty=0.3, frequency_penalty=0.25, logprobs=0)
    sampler = Sampler(params, [0, 0, 0, 0], 3)
    counts, tokens = [0, 0, 0], []
    for _ in range(12):
        plain = [
            value - (0.3 if count else 0) - 0.25 * count
            for value, count in zip(logits.tolist(), counts, strict=True)
        ]
        expected = max(range(3), key=lambda i: (round(plain[i], 5), -i))
        sample = sampler.sample(logits)
        assert sample.token == expected
        assert sample.logprob == pytest.approx(math.log(plain_softmax(plain)[expected]), abs=1e-5)
        counts[sample.token] += 1
        tokens.append(sample.token)
    assert tokens[:3] == [0, 0, 0] and 1 in tokens


def test_counts_grow_past_their_first_size():
    sampler = Sampler(SamplingParams(presence_penalty=2), [], 500)
    descending = np.linspace(1, 0, 500, dtype=np.float32)
    assert [sampler.sample(descending).token for _ in range(500)] == list(range(500))


def test_logit_bias():
    logits = np.array([1.0, 0.0, 0.5], np.float32)
    sampler = Sampler(SamplingParams(logit_bias={1: 5, 0: -100}), [], 3)
    assert sampler.sample(logits).token == 1
    assert logits.tolist() == [1.0, 0.0, 0.5]


def test_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(RequestError, match="token 3"):
        Sampler(SamplingParams(logit_bias={3: 1.0}), [], 3)


@pytest.mark.parametrize("prompt", [[3], [-1], [0, 2**70]])
def test_prompt_outside_the_vocabulary_is_refused(prompt: list[int]):
    with pytest.raises(RequestError, match="token id"):
        Sampler(SamplingParams(repetition_penalty=1.1), prompt, 3)


def test_logprobs_are_before_temperature_and_truncation():
    logits = np.round(logits_of(9))
    params = SamplingParams(temperature=0.2, top_k=1, logprobs=20, seed=0)
    sample = Sampler(params, [], VOCAB).sample(logits)
    probs = plain_softmax(logits.tolist())
    assert [t for t, _ in sample.top_logprobs] == plain_order(logits)[:20]
    for token, logprob in sample.top_logprobs:
        assert logprob == pytest.approx(math.log(probs[token]), abs=1e-4)
    assert sample.logprob == dict(sample.top_logprobs)[sample.token]


def test_more_logprobs_than_tokens():
    sample = Sampler(SamplingParams(logprobs=20), [], 3).sample(np.zeros(3, np.float32))
    assert len(sample.top_logprobs) == 3
    assert sample.logprob == pytest.approx(-math.log(3), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bias", [{}, {0: 1.0}])
@pytest.mark.parametrize("bad", [[0, np.nan, 1], [1, np.inf, 0], [-np.inf] * 3])
def test_broken_logits_are_a_clear_error(temperature: float, bias: dict, bad: list[float]):
    sampler = Sampler(SamplingParams(temperature=temperature, logit_bias=bias), [], 3)
    with pytest.raises(PronkError, match="logit of"):
        sampler.sample(np.array(bad, np.float32))


def test_wrong_shape_is_a_clear_error():
    with pytest.raises(PronkError, match="shape"):
        Sampler(SamplingParams(), [], 4).sample(np.zeros(3, np.float32))


def test_logits_may_be_read_only():
    logits = logits_of(1)
    logits.flags.writeable = False
    params = SamplingParams(
        temperature=1, top_k=9, top_p=0.9, repetition_penalty=1.1, logit_bias={1: 1.0}, logprobs=3
    )
    assert 0 <= Sampler(params, [1, 2], VOCAB).sample(logits).token < VOCAB
