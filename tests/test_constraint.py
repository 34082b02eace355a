"""Constraints: only what they allow is drawn, drafted or not, and it is drawn as ever."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import make_runner

from pronk import PronkError, SamplingParams
from pronk.engine.engine import Engine
from pronk.engine.sampler import Sampler
from pronk.engine.speculate import StepCost

VOCAB = 320
PROMPT = [3, 4, 5, 6] * 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


class Alternate:
    """Even and odd tokens in turns; after so many, nothing but the end."""

    def __init__(self, length, end=2, words=False):
        self.length, self.end, self.words, self.tokens, self.asked = length, end, words, [], 0

    def allowed(self, place):
        mask = np.zeros(VOCAB, bool)
        if place < self.length:
            mask[place % 2 + 4 :: 2] = True
        else:
            mask[self.end] = True
        return mask

    def mask(self):
        self.asked += 1
        mask = self.allowed(len(self.tokens))
        return np.packbits(mask, bitorder="little").view(np.int32) if self.words else mask

    def accept(self, token):
        assert self.allowed(len(self.tokens))[token]
        self.tokens.append(token)

    def valid(self, tokens):
        place = len(self.tokens)
        for n, token in enumerate(tokens):
            if not self.allowed(place + n)[token]:
                return n
        return len(tokens)


def run(tiny, params, constraint, speculate=False, **limits):
    engine = Engine(make_runner(tiny, threads=1, **limits), frozenset({2}), speculate=speculate)
    request = engine.add(PROMPT, params, constraint=constraint)
    free = engine.add(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))
    events = {request: [], free: []}
    while engine.busy:
        for event in engine.step():
            events[event.request_id].append(event)
    assert engine.kv.free == engine.kv.num_blocks
    return events[request], events[free], engine


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logprobs=20),
        SamplingParams(temperature=1.0, seed=3, top_p=0.9),
        SamplingParams(temperature=1.0, seed=3, top_k=5, min_p=0.01, logit_bias={7: 100}),
        SamplingParams(temperature=2.0, seed=4, repetition_penalty=1.3, presence_penalty=1),
    ],
)
def test_only_what_is_allowed_is_drawn(tiny, words, params):
    events, free, _ = run(tiny, params, constraint := Alternate(15, words=words))
    tokens = [e.sample.token for e in events]
    assert tokens == constraint.tokens
    assert [t % 2 for t in tokens[:-1]] == [0, 1] * 7 + [0]
    assert tokens[-1] == 2 and events[-1].finish_reason == "stop"
    assert constraint.asked == 16
    for event in events[:-1]:
        assert all(np.isfinite(value) for _, value in event.sample.top_logprobs)
    # Who shares its steps is not touched.
    alone = Engine(make_runner(tiny, threads=1), frozenset({2}))
    alone.add(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))
    told = []
    while alone.busy:
        told += [e.sample for e in alone.step()]
    assert [e.sample for e in free] == told


def test_the_draw_is_that_of_the_sampler_over_what_is_allowed():
    params = SamplingParams(temperature=1.0, seed=5, logprobs=0)
    logits = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
    mask = np.zeros(VOCAB, bool)
    mask[40:60] = True
    got, alone = Sampler(params, [], VOCAB), Sampler(params, [], 20)
    for _ in range(50):
        masked, plain = got.sample(logits, mask), alone.sample(logits[40:60])
        assert masked.token == plain.token + 40
        assert masked.logprob == pytest.approx(plain.logprob, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_keep_to_the_constraint(tiny, monkeypatch, temperature):
    monkeypatch.setattr(StepCost, "__call__", lambda self, rows: 1.0)
    params = SamplingParams(temperature=temperature, seed=8)
    expected, free, _ = run(tiny, params, Alternate(60), kv_tokens=512)
    verified = []

    class Watched(Alternate):
        def valid(self, tokens):
            verified.append((list(tokens), super().valid(tokens)))
            return verified[-1][1]

    got, same, engine = run(tiny, params, Watched(60), speculate=True, kv_tokens=512)
    assert [e.sample for e in got] == [e.sample for e in expected]
    assert [e.sample for e in same] == [e.sample for e in free]
    assert engine.speculator.drafted
    if temperature == 0:
        assert any(n > 0 for _, n in verified)  # some of it was drafted


def test_a_constrained_request_goes_on_after_a_preemption(tiny):
    params = SamplingParams(temperature=1.0, seed=8)
    expected, _, _ = run(tiny, params, Alternate(40))
    engine = Engine(make_runner(tiny, threads=1), frozenset({2}))
    engine.add(PROMPT, params, constraint=Alternate(40))
    samples = []
    while engine.busy:
        samples += [event.sample for event in engine.step()]
        if len(samples) % 7 == 1 and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[0])
    assert samples == [e.sample for e in expected]


class Broken(Alternate):
    def __init__(self, what):
        super().__init__(5)
        self.what = what

    def mask(self):
        if self.what == "mask":
            raise ValueError("no grammar")
        if self.what == "none":
            return np.zeros(VOCAB, bool)
        return np.ones(VOCAB // 2 if self.what == "short" else VOCAB, bool)

    def accept(self, token):
        if self.what == "accept":
            raise KeyError("lost")


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("mask", "no grammar"),
        ("accept", "lost"),
        ("none", "leaves no token to choose"),
        ("short", "mask has 160 tokens, not 320"),
    ],
)
def test_a_constraint_that_fails_ends_its_request_only(tiny, what, match):
    (event,), free, _ = run(tiny, SamplingParams(), Broken(what))
    assert event.finish_reason == "error" and event.sample is None
    assert isinstance(event.error, PronkError) and match in str(event.error)
    assert len(free) == 20
