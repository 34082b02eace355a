"""Speculation changes how many steps are taken and nothing else: drafts, costs, exactness."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import make_runner

from pronk import SamplingParams, load
from pronk.engine import speculate
from pronk.engine.engine import Engine
from pronk.engine.speculate import Acceptance, Candidate, Lookup, Speculator, StepCost

RNG = np.random.default_rng(8)
PROMPTS = [[int(i) for i in RNG.integers(3, 320, n)] for n in (70, 5, 33, 1)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def free(monkeypatch):
    """Steps that cost the same whatever they hold, so that all there is to draft is drafted."""
    monkeypatch.setattr(StepCost, "__call__", lambda self, rows: 1.0)


class Guesses(Lookup):
    """Drafts that are right up to a random place: answers that are known, with faults."""

    def __init__(self, prompt, answer, seed):
        super().__init__()
        self.whole, self.random = [*prompt, *answer], np.random.default_rng(seed)

    def follow(self, tokens):
        assert self.whole[: len(tokens)] == list(tokens)
        self.at = len(tokens)

    def chances(self, limit):
        return [0.99**i for i in range(1, limit + 1)]

    def draft(self, count):
        tokens = self.whole[self.at : self.at + count]
        tokens += [7] * (count - len(tokens))
        return [t if self.random.random() < 0.8 else (t + 1) % 320 for t in tokens]


def drain(engine):
    samples, reasons, steps = {}, {}, 0
    while engine.busy:
        steps += 1
        for event in engine.step():
            samples.setdefault(event.request_id, []).append(event.sample)
            reasons[event.request_id] = event.finish_reason
    return samples, reasons, steps


PARAMS = [
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=41, temperature=1.0, seed=3, logprobs=3),
    SamplingParams(max_tokens=30, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=9),
    SamplingParams(
        max_tokens=35, temperature=0.5, seed=1, repetition_penalty=1.2, presence_penalty=0.4,
        frequency_penalty=0.3, logit_bias={5: 2.0}, logprobs=0),
]  # fmt: skip


@pytest.mark.parametrize(
    "limits",
    [
        {"kv_tokens": 1024},
        {"kv_tokens": 1024, "max_rows": 3},
        {"kv_tokens": 1024, "max_tokens": 16, "max_sequences": 2},
        {"context": 128},  # a pool for one at a time
    ],
)
def test_no_token_depends_on_drafts(tiny, free, limits):
    plain = Engine(make_runner(tiny, **limits), frozenset({11, 12}))
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        plain.add(prompt, params)
    expected, reasons, steps = drain(plain)
    engine = Engine(make_runner(tiny, **limits), frozenset({11, 12}), speculate=True)
    for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        request = engine.add(prompt, params)
        answer = [s.token for s in expected[i]]
        engine._requests[request].lookup = Guesses(prompt, answer, seed=i)
    got, got_reasons, fewer = drain(engine)
    assert got == expected  # tokens, and the bits of their log-probabilities
    assert got_reasons == reasons
    assert fewer < 0.7 * steps
    assert 0 < engine.speculator.accepted < engine.speculator.drafted
    assert engine.kv.free == engine.kv.num_blocks


def test_drafts_end_with_the_context(tiny, free):
    limits = {"context": 64}
    plain = Engine(make_runner(tiny, **limits), frozenset())
    plain.add(PROMPTS[2], SamplingParams())
    expected, _, _ = drain(plain)
    engine = Engine(make_runner(tiny, **limits), frozenset(), speculate=True)
    request = engine.add(PROMPTS[2], SamplingParams())
    answer = [s.token for s in expected[0]]
    engine._requests[request].lookup = Guesses(PROMPTS[2], answer, seed=0)
    got, reasons, _ = drain(engine)
    assert got == expected
    assert reasons == {0: "length"}


def test_a_session_goes_on_after_drafts(tiny, free):
    params = SamplingParams(max_tokens=20)
    turns = []
    for on in (False, True):
        engine = Engine(make_runner(tiny), frozenset(), speculate=on)
        prompt, told = [3, 4, 5, 6] * 10, []
        for _ in range(3):
            engine.add(prompt, params, session="s")
            tokens = [s.token for s in next(iter(drain(engine)[0].values()))]
            told.append(tokens)
            prompt = [*prompt, *tokens, *PROMPTS[1]]
        turns.append(told)
        if on:
            assert engine.speculator.drafted > engine.speculator.accepted > 0
    assert turns[0] == turns[1]


def test_an_interrupted_draft_loses_no_token(tiny, free, monkeypatch):
    params = SamplingParams(max_tokens=30)
    prompts = [[3, 4, 5, 6] * 10, [9, 8] * 10]

    def tokens(engine, interrupt):
        got = {engine.add(p, params): [] for p in prompts}
        while engine.busy:
            try:
                events = engine.step()
            except KeyboardInterrupt:
                assert interrupt
                continue
            for event in events:
                got[event.request_id].append(event.sample.token)
        return got

    expected = tokens(Engine(make_runner(tiny), frozenset()), False)
    engine = Engine(make_runner(tiny, max_rows=2), frozenset(), speculate=True)
    head, calls = engine.runner.head, iter(range(10_000))

    def interrupted(rows, keep=()):
        if next(calls) % 3 == 2:
            raise KeyboardInterrupt
        return head(rows)

    monkeypatch.setattr(engine.runner, "head", interrupted)
    assert tokens(engine, True) == expected
    assert engine.speculator.accepted > 0


def test_a_loaded_model_answers_the_same(tiny, free):
    prompt = [3, 4, 5, 6] * 10

    def answer(speculate, **how):
        with load(tiny, context=256, speculate=speculate) as model:
            pieces = list(model.generate(prompt, SamplingParams(max_tokens=150, **how)))
            assert bool(model.speculation.drafted) == speculate
            assert model.speculation.accepted <= model.speculation.drafted
        return pieces

    for how in ({}, {"temperature": 0.3, "seed": 5}):
        whole = answer(False, **how)
        assert answer(True, **how) == whole
        text = "".join(piece.text for piece in whole)
        how["stop"] = (text[len(text) // 2 :][:8],)
        stopped = answer(True, **how)
        assert stopped == answer(False, **how)
        assert len(stopped) < len(whole)
        assert stopped[-1].finish_reason == "stop"


def test_it_is_turned_off_and_on_at_any_time(tiny, free):
    prompt, params = [3, 4, 5, 6] * 10, SamplingParams(max_tokens=150, ignore_eos=True)
    with load(tiny, context=256, speculate=False) as model:
        expected = list(model.generate(prompt, params))
        assert not model.speculate
        pieces, got = model.generate(prompt, params), []
        for on in (True, False, True):
            model.speculate = on
            assert model.speculate == on
            got += [next(pieces) for _ in range(20)]
        assert [*got, *pieces] == expected
        assert model.speculation.drafted == 0  # a request begun without has no memory
        assert list(model.generate(prompt, params)) == expected
        done = model.speculation
        assert done.drafted > 0
        model.speculate = False
        assert list(model.generate(prompt, params)) == expected
        assert model.speculation == done


def drafted(tokens, count=6):
    lookup = Lookup()
    lookup.follow(tokens)
    return lookup.draft(count) if lookup.chances(count) else []


def test_a_draft_is_what_followed_the_longest_match():
    #              match of three          match of one, later
    tokens = [9, 1, 2, 3, 50, 51, 52, 53, 54, 8, 3, 60, 61, 7, 1, 2, 3]
    assert drafted(tokens) == [50, 51, 52, 53, 54, 8]
    # Of equals, the last.
    assert drafted([3, 50, 51, 52, 3, 60, 61, 62, 3], 3) == [60, 61, 62]
    # What runs past the end repeats.
    assert drafted([5, 1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2, 3]
    assert drafted([1, 2, 3]) == []
    assert drafted([4]) == []
    assert drafted([4, 4]) == [4] * 6


def test_a_copy_goes_on_behind_what_was_changed():
    source = [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 40, 2, 30, 31, 32, 33]
    decoy = [2, 90, 91, 92]
    copied = source[:10]
    lookup = Lookup()
    lookup.follow([*source, *decoy])
    known = [*source, *decoy]
    for token in (*copied, 70, 2):  # 40 is renamed to 70; 2 has last been seen in the decoy
        lookup.acceptance = Acceptance()
        known.append(token)
        lookup.follow(known)
    assert lookup.draft(4) == [30, 31, 32, 33]


def test_matches_are_scored_without_being_drafted():
    lookup = Lookup()
    before = lookup.acceptance.rate(1)
    known = [1, 2]
    for i in range(40):
        for token in (1, 100 + i):  # what follows 1 is never the same
            known.append(token)
            lookup.follow(known)
    assert lookup.acceptance.rate(1) < before / 2
    whole = [*range(30), 200]
    known = list(whole)
    lookup = Lookup()
    for token in whole:
        known.append(token)
        lookup.follow(known)
    assert lookup.acceptance.rate(8) > Acceptance().rate(8)


def test_costs_are_learnt():
    cost = StepCost()
    for _ in range(50):
        for rows in (1, 4, 16):
            cost.observe(rows, 0.01 * (1 + 0.02 * (rows - 1)))
    for rows in (1, 2, 4, 10, 16, 32, 64):
        assert cost(rows) == pytest.approx(1 + 0.02 * (rows - 1), rel=0.05)
    # A slow spell moves all of them alike.
    for _ in range(100):
        for rows in (1, 4, 16):
            cost.observe(rows, 0.03 * (1 + 0.02 * (rows - 1)))
    assert cost(16) == pytest.approx(1.3, rel=0.1)
    cost.observe(4, 100.0)
    assert cost(4) < 1.2


def known_rows(slope):
    speculator = Speculator()
    for _ in range(50):
        for rows in (1, 2, 4, 8, 16, 32):
            speculator.cost.observe(rows, 0.01 * (1 + slope * (rows - 1)))
    return speculator


def follow_repetition(speculator, turns=12):
    """The drafts for a sequence that repeats itself, when its end has matched for long."""
    lookup, tokens = Lookup(), list(range(40)) * 2
    drafts = []
    for i in range(turns):
        tokens.append(i)
        drafts.append(speculator.plan([Candidate(lookup, tokens, 100)], 100, True)[0])
    return drafts


def test_drafts_are_as_long_as_pays():
    short, long = (len(follow_repetition(known_rows(slope))[-1]) for slope in (0.4, 0.02))
    assert 0 < short < long
    assert not any(follow_repetition(known_rows(1.0)))


def test_what_does_not_pay_is_tried_again_rarely(monkeypatch):
    monkeypatch.setattr(speculate, "_PATIENCE", 10)
    drafts = follow_repetition(known_rows(1.0), turns=33)
    assert 2 <= sum(map(bool, drafts)) <= 3
    # A step that is found to be cheap after all brings drafts back.
    speculator = known_rows(1.0)
    for _ in range(60):
        speculator.cost.observe(4, 0.0105)
    assert all(follow_repetition(speculator))


def test_limits_of_a_draft():
    speculator = known_rows(0.0)
    candidates = []
    for most in (0, 2, 100, 100):
        lookup, tokens = Lookup(), list(range(40)) * 2
        candidates.append(Candidate(lookup, tokens, most))
    lengths = [len(d) for d in speculator.plan(candidates, 20, True)]
    assert lengths[:2] == [0, 2]
    assert sum(lengths) == 20
    assert [len(d) for d in speculator.plan(candidates, 0, True)] == [0] * 4
    beside = [len(d) for d in speculator.plan(candidates, 100, False)]
    assert 0 < sum(beside) < 60


def test_prompts_and_drafts_share_a_step(tiny, free):
    limits, prompt, params = {"max_tokens": 32}, PROMPTS[2], SamplingParams(max_tokens=60)
    plain = Engine(make_runner(tiny, **limits), frozenset())
    plain.add(prompt, params)
    answer = [sample.token for sample in drain(plain)[0][0]]
    engine = Engine(make_runner(tiny, kv_tokens=512, **limits), frozenset(), speculate=True)
    first = engine.add(prompt, params)
    engine._requests[first].lookup = Guesses(prompt, answer, seed=0)
    events = engine.step() + engine.step()
    second = engine.add(PROMPTS[0], SamplingParams(max_tokens=2))
    computed = [0]
    while engine._requests[second].pending > 1:
        events += (new := engine.step())
        computed.append(engine._requests[second].computed)
        assert first in {event.request_id for event in new}
    assert max(np.diff(computed)) < 32  # drafts had room beside the prompt,
    assert min(np.diff(computed)[:-1]) >= 15  # and did not take all of it
    assert len([e for e in events if e.request_id == first]) > len(computed) + 1
