"""Continuous batching: fair, in order of priority, in a pool too small, and the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import make_runner

from pronk import RequestError, SamplingParams, load
from pronk.engine.engine import Engine
from pronk.engine.pace import Pace
from pronk.spec import LayerSpec

RNG = np.random.default_rng(21)
PROMPTS = [[int(i) for i in RNG.integers(3, 320, n)] for n in (70, 33, 50, 5, 90)]
PARAMS = [
    SamplingParams(max_tokens=70, ignore_eos=True),
    SamplingParams(max_tokens=60, temperature=1.0, seed=3, logprobs=2),
    SamplingParams(max_tokens=50, temperature=0.8, top_k=20, seed=9, repetition_penalty=1.2),
    SamplingParams(max_tokens=80, temperature=1.0, seed=5, frequency_penalty=0.5),
    SamplingParams(max_tokens=20, logprobs=0),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


def engine_of(tiny, **limits):
    defaults = {"context": 192, "max_tokens": 32, "kv_tokens": 2048, "threads": 1}
    options = {k: limits.pop(k) for k in ("speculate", "target_tpot") if k in limits}
    return Engine(make_runner(tiny, **{**defaults, **limits}), frozenset(), **options)


def drain(engine):
    samples = {}
    while engine.busy:
        for event in engine.step():
            samples.setdefault(event.request_id, []).append(event.sample)
    return samples


@pytest.fixture(scope="module")
def alone(tiny):
    """What each prompt gives by itself."""
    found = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        engine = engine_of(tiny)
        engine.add(prompt, params)
        found.append(drain(engine)[0])
    return found


WINDOW = (LayerSpec("window", 40), LayerSpec())


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("layers", [None, WINDOW], ids=["global", "window"])
def test_a_preempted_request_answers_as_if_it_had_not_been(tiny, alone, layers, speculate):
    if layers:
        alone = []
        for prompt, params in zip(PROMPTS, PARAMS, strict=True):
            engine = engine_of(tiny, layers=layers)
            engine.add(prompt, params)
            alone.append(drain(engine)[0])
    # Six blocks, where the five requests come to need 5, 3, 4, 3 and 4.
    engine = engine_of(tiny, layers=layers, kv_tokens=192, speculate=speculate)
    ids = [engine.add(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
    samples = drain(engine)
    assert [samples[i] for i in ids] == alone
    assert engine.scheduler.preemptions
    assert engine.kv.free == engine.kv.num_blocks
    assert engine.stats().preemptions == engine.scheduler.preemptions


@pytest.mark.parametrize("layers", [None, WINDOW], ids=["global", "window"])
def test_preemption_at_any_time_changes_no_bit(tiny, alone, layers):
    engines = [engine_of(tiny, layers=layers, speculate=True) for _ in range(2)]
    rng = np.random.default_rng(4)
    samples = []
    for engine in engines:
        for prompt, params in zip(PROMPTS, PARAMS, strict=True):
            engine.add(prompt, params)
    samples.append(drain(engines[0]))
    got = {}
    engine = engines[1]
    while engine.busy:
        for event in engine.step():
            got.setdefault(event.request_id, []).append(event.sample)
        running = engine.scheduler.running
        if running and rng.random() < 0.3:
            victim = running[rng.integers(len(running))]
            engine.scheduler.preempt(victim)
            if rng.random() < 0.5:  # and others need all of its memory meanwhile
                for manager in engine.kv.managers:
                    manager.pool.give_back(manager.pool.take(manager.pool.free))
    assert got == samples[0]
    if not layers:
        assert [got[i] for i in sorted(got)] == alone
    assert engine.scheduler.preemptions > 10
    assert engine.kv.free == engine.kv.num_blocks


def test_the_last_in_line_gives_way_and_priority_goes_before(tiny):
    engine = engine_of(tiny, kv_tokens=192)
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    low = engine.add(PROMPTS[0][:40], params)
    high = engine.add(PROMPTS[1], params, priority=1)
    ended = []
    while engine.busy:
        ended += [e.request_id for e in engine.step() if e.finish_reason]
    # Together they would need ten blocks of six.
    assert engine.scheduler.preemptions
    assert ended == [high, low]
    engine = engine_of(tiny, kv_tokens=192)
    first, second = (engine.add(p, params) for p in (PROMPTS[0][:40], PROMPTS[1]))
    ended = []
    while engine.busy:
        ended += [e.request_id for e in engine.step() if e.finish_reason]
    assert ended == [first, second]


def test_admission_is_by_what_is_needed_now(tiny):
    engine = engine_of(tiny, kv_tokens=192)
    # The longest outcome of each is the whole pool.
    for prompt in ([5] * 20, [6] * 20, [7] * 20):
        engine.add(prompt, SamplingParams(ignore_eos=True))
    engine.step()
    assert engine.stats().running == 3
    assert engine.stats().waiting == 0


def test_a_short_prompt_does_not_wait_for_a_long_one(tiny):
    engine = engine_of(tiny, context=1024)
    long = engine.add([int(i) for i in RNG.integers(3, 320, 800)], PARAMS[0])
    engine.step()
    short = engine.add(PROMPTS[3], PARAMS[3])
    assert [e.request_id for e in engine.step()] == [short]
    assert engine._requests[long].computed > 32  # and the long one went on beside it


def test_none_starves_however_many_come(tiny):
    engine = engine_of(tiny, context=512)
    long = engine.add([int(i) for i in RNG.integers(3, 320, 400)], PARAMS[0])
    low = engine.add([int(i) for i in RNG.integers(3, 320, 100)], PARAMS[4], priority=-1)
    first_token = {}
    once = SamplingParams(max_tokens=1)
    steps = 0
    while not {long, low} <= first_token.keys():
        # More short prompts of high priority than a step can take.
        for _ in range(3):
            engine.add([int(i) for i in RNG.integers(3, 320, 30)], once, priority=steps < 200)
        for event in engine.step():
            first_token.setdefault(event.request_id, steps)
        steps += 1
        assert steps < 2000
    assert engine.stats().waiting > 50
    for request in list(engine._requests):
        engine.abort(request)
    assert engine.kv.free == engine.kv.num_blocks


def test_levels_of_priority_go_in_their_order(tiny):
    engine = engine_of(tiny, max_sequences=1)
    once = SamplingParams(max_tokens=1)
    ids = [engine.add([7], once, priority=p) for p in (0, 2, 1, 2)]
    ended = []
    while engine.busy:
        ended += [e.request_id for e in engine.step()]
    assert ended == [ids[1], ids[3], ids[2], ids[0]]


def test_an_aborted_request_frees_its_blocks_in_every_state(tiny):
    engine = engine_of(tiny, kv_tokens=192)
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    ids = [engine.add(p, params) for p in PROMPTS[:4]]
    while not engine.scheduler.preemptions:
        engine.step()
    assert engine.scheduler.waiting and engine.scheduler.running
    for request in ids:
        engine.abort(request)
    assert engine.kv.free == engine.kv.num_blocks
    assert not engine.busy


# ---- the size of a step


def test_a_pace_finds_the_tokens_of_a_step():
    pace = Pace(0.05)
    assert pace.budget(4, 128) == 128  # nothing is known
    rng = np.random.default_rng(0)
    sizes = [4]
    for _ in range(200):
        seconds = 0.01 + 0.001 * sizes[-1]
        pace.observe(sizes[-1], seconds * rng.uniform(0.9, 1.1))
        sizes.append(pace.budget(4, 128))
    assert all(abs(size - 40) <= 8 for size in sizes[50:])
    for _ in range(200):  # twice as slow
        pace.observe(sizes[-1], 0.02 + 0.002 * sizes[-1])
        sizes.append(pace.budget(4, 128))
    assert abs(sizes[-1] - 15) <= 3
    pace.target = 0.0001
    assert pace.budget(4, 128) == 4
    pace.target = None
    assert pace.budget(4, 128) == 128


def test_a_step_keeps_to_its_target(tiny):
    engine = engine_of(tiny, max_tokens=128, context=1024, target_tpot=0.02)
    # Steps that take a millisecond a token.
    engine.scheduler.pace.observe = lambda tokens, _: Pace.observe(
        engine.scheduler.pace, tokens, tokens / 1000
    )
    engine.add(PROMPTS[3], PARAMS[3])
    engine.step()
    long = engine.add([int(i) for i in RNG.integers(3, 320, 400)], PARAMS[4])
    engine.step()
    assert engine._requests[long].computed == 19
    assert engine.stats().budget == 20
    engine.abort(0)  # now nobody waits for a token
    engine.step()
    assert engine._requests[long].computed == 19 + 128


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kv_tokens": 0}, "kv_tokens must be"),
        ({"activations": "int4"}, "activations must be one of int8, int12"),
        ({"max_sequences": 0}, "max_sequences must be"),
        ({"target_tpot": 0.0}, "target_tpot must be"),
    ],
)
def test_bad_options_are_refused(tiny, options, match):
    with pytest.raises(RequestError, match=match):
        load(tiny, context=64, **options)


# ---- embeddings


def test_an_embedding_is_the_mean_of_hidden_states(tiny, alone):
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(tiny, torch_dtype=torch.float32)
    with torch.no_grad():
        hidden = model(torch.tensor([PROMPTS[0]])).last_hidden_state[0].numpy()
    with load(tiny, context=256, threads=1, kv_dtype="f32") as ours:
        got = ours.embed(PROMPTS[0])
        assert got.shape == (ours.spec.hidden_size,) and got.dtype == np.float32
        expected = hidden.mean(0)
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
        assert not ours._engine.busy and not ours._events
        with pytest.raises(RequestError, match="the prompt is empty"):
            ours.embed([])


def test_an_embedding_does_not_depend_on_its_company(tiny, alone):
    def embed(beside, **limits):
        engine = engine_of(tiny, **limits)
        ids = [engine.add(PROMPTS[i], PARAMS[i]) for i in beside]
        asked = engine.embedding_request(PROMPTS[4])
        engine.enqueue(asked)
        samples, found = {}, []
        while engine.busy:
            for event in engine.step():
                if event.request_id == asked.id:
                    found.append(event.embedding)
                    assert event.finish_reason == "stop"
                else:
                    samples.setdefault(event.request_id, []).append(event.sample)
        assert [samples[i] for i in ids] == [alone[i] for i in beside]
        assert engine.kv.free == engine.kv.num_blocks
        (embedding,) = found
        return embedding, engine

    expected, _ = embed(())
    company = (
        ((0, 1), {}),
        ((), {"max_tokens": 7}),
        ((), {"max_tokens": 45}),  # the first part is as long as what it leaves
        ((3, 1, 2), {"kv_tokens": 192}),
    )
    for beside, limits in company:
        got, _ = embed(beside, **limits)
        np.testing.assert_array_equal(got, expected)
    # A repeated text starts from no cached block: all its hidden states are needed.
    engine = engine_of(tiny)
    for _ in range(2):
        engine.enqueue(engine.embedding_request(PROMPTS[4]))
        events = []
        while engine.busy:
            events += engine.step()
        np.testing.assert_array_equal(events[0].embedding, expected)
