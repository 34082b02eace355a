"""The engine's thread: submitted from anywhere, cancelled, drained, and not to be brought down."""

from __future__ import annotations

import threading
from queue import Queue

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import halted, make_runner

from pronk import PronkError, RequestError, SamplingParams, load
from pronk.engine.engine import Engine
from pronk.engine.service import Service, UnavailableError

RNG = np.random.default_rng(31)
PROMPTS = [[int(i) for i in RNG.integers(3, 320, n)] for n in (70, 33, 50, 5, 90)]
PARAMS = SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)
LONG = SamplingParams(ignore_eos=True)
WAIT = 30  # seconds until a test gives up


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


def engine_of(tiny, **limits):
    defaults = {"context": 256, "max_tokens": 32, "kv_tokens": 2048, "threads": 1}
    return Engine(make_runner(tiny, **{**defaults, **limits}), frozenset(), speculate=True)


def alone(tiny, prompt, params=PARAMS):
    engine, tokens = engine_of(tiny), []
    engine.add(prompt, params)
    while engine.busy:
        tokens += [event.sample.token for event in engine.step()]
    return tokens


def until_end(events):
    """Events up to the last, and nothing behind it."""
    found = []
    while not found or found[-1].finish_reason is None:
        found.append(events.get(timeout=WAIT))
    assert events.empty()
    return found


def test_many_threads_submit(tiny):
    with Service(engine_of(tiny, kv_tokens=256)) as service:
        got = {}

        def client(i):
            for turn in range(3):
                events = Queue()
                handle = service.submit(PROMPTS[i], PARAMS, events.put, priority=i % 2)
                found = until_end(events)
                assert {e.request_id for e in found} == {handle}
                got[i, turn] = [e.sample.token for e in found]

        threads = [threading.Thread(target=client, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        expected = [alone(tiny, prompt) for prompt in PROMPTS]
        assert got == {(i, turn): expected[i] for i in range(5) for turn in range(3)}
        stats = service.stats()
        assert (stats.waiting, stats.running) == (0, 0)
        assert stats.generated_tokens == 15 * 12
        assert stats.prefix_queries == 3 * sum(map(len, PROMPTS))
        assert 0 < stats.prefix_hits < stats.prefix_queries
        assert stats.steps and stats.step_seconds >= stats.last_step_seconds > 0
        (pool,) = stats.pools
        assert (pool.held, pool.cached + pool.free, pool.usage) == (0, pool.blocks, 0)


def test_cached_tokens_are_told(tiny):
    with Service(engine_of(tiny)) as service:
        for cached in (0, 64):
            service.submit(PROMPTS[0], PARAMS, (events := Queue()).put)
            assert {e.cached_tokens for e in until_end(events)} == {cached}


def test_a_cancelled_request_frees_its_blocks_before_the_next_step(tiny):
    engine = engine_of(tiny, kv_tokens=256)
    with Service(engine) as service, halted(service, after=6):  # too few for any to end
        running, waiting = Queue(), Queue()
        first = service.submit(PROMPTS[4], LONG, running.put)
        second = service.submit(PROMPTS[0], LONG, waiting.put)
        running.get(timeout=WAIT)
        steps = service.call(lambda e: e.counters.steps)
        service.cancel(first)
        service.cancel(second)
        service.cancel(first)
        free = service.call(lambda e: (e.kv.free, e.counters.steps))
        assert free.result(WAIT)[0] == engine.kv.num_blocks
        assert free.result()[1] <= steps.result() + 1
        for events in (running, waiting):
            reasons = [e.finish_reason for e in until_end(events)]
            assert reasons[-1] == "abort"
        service.cancel(12345)


def test_a_listener_that_is_gone_ends_its_request(tiny):
    engine = engine_of(tiny)
    with Service(engine) as service:

        def gone(event):
            raise RuntimeError("connection lost")

        service.submit(PROMPTS[0], LONG, gone)
        service.submit(PROMPTS[1], PARAMS, (events := Queue()).put)
        assert [e.sample.token for e in until_end(events)] == alone(tiny, PROMPTS[1])
        assert service.drain(WAIT)
        assert engine.kv.free == engine.kv.num_blocks


def test_bad_requests_are_refused_to_the_caller(tiny):
    with Service(engine_of(tiny)) as service:
        for prompt in ([], [320], [1] * 256):
            with pytest.raises(RequestError):
                service.submit(prompt, PARAMS, print)
        with pytest.raises(RequestError):
            service.submit([1], SamplingParams(logit_bias={320: 1.0}), print)
        with pytest.raises(RequestError):
            service.embed([])


def test_a_step_that_raises_ends_its_requests_and_no_more(tiny, monkeypatch):
    engine = engine_of(tiny, max_sequences=2)
    run = engine.runner.run

    def broken(ids, *rest):
        if 7 in ids:
            raise ValueError("cosmic ray")
        run(ids, *rest)

    monkeypatch.setattr(engine.runner, "run", broken)
    with Service(engine) as service:
        good, bad, after = Queue(), Queue(), Queue()
        service.submit(PROMPTS[0], PARAMS, good.put)
        assert until_end(good)[-1].finish_reason == "length"
        service.submit([7] * 5, PARAMS, bad.put)
        (event,) = until_end(bad)
        assert event.finish_reason == "error" and event.sample is None
        assert isinstance(event.error, PronkError) and "cosmic ray" in str(event.error)
        service.submit(PROMPTS[1], PARAMS, after.put)
        found = until_end(after)
        assert [e.sample.token for e in found] == alone(tiny, PROMPTS[1])
        assert engine.kv.free == engine.kv.num_blocks
        with pytest.raises(PronkError, match="cosmic ray"):
            service.embed([7]).result(WAIT)
        monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 / 0)
        service.submit(PROMPTS[1], PARAMS, bad.put)
        assert "ZeroDivisionError" in str(until_end(bad)[-1].error)


def test_draining_takes_no_more_and_ends_what_there_is(tiny):
    service = Service(engine_of(tiny))
    with halted(service):
        service.submit(PROMPTS[0], LONG, (events := Queue()).put)
        assert not service.drain(0)
    with pytest.raises(UnavailableError, match="takes no more requests"):
        service.submit(PROMPTS[1], PARAMS, print)
    assert service.drain(WAIT)
    assert until_end(events)[-1].finish_reason == "length"
    assert not service.closed
    service.close()
    service.close()
    assert service.closed
    with pytest.raises(UnavailableError):
        service.call(lambda engine: None)


def test_closing_aborts_what_runs(tiny):
    engine = engine_of(tiny)
    with halted(service := Service(engine), after=6):  # too few for any to end
        service.submit(PROMPTS[0], LONG, (events := Queue()).put)
        future = service.embed(PROMPTS[1])
        events.get(timeout=WAIT)
        service.close()
    assert until_end(events)[-1].finish_reason == "abort"
    assert future.done()
    assert not engine.busy
    assert engine.kv.free == engine.kv.num_blocks


def test_embeddings_share_the_thread(tiny):
    engine = engine_of(tiny)
    with Service(engine) as service:
        events = Queue()
        service.submit(PROMPTS[0], PARAMS, events.put)
        futures = [service.embed(prompt) for prompt in PROMPTS]
        cancelled = service.embed(PROMPTS[4])
        cancelled.cancel()
        got = [future.result(WAIT) for future in futures]
        assert [e.sample.token for e in until_end(events)] == alone(tiny, PROMPTS[0])
        assert service.drain(WAIT)
        assert engine.kv.free == engine.kv.num_blocks
    with load(tiny, context=256, threads=1) as model:
        for prompt, embedding in zip(PROMPTS, got, strict=True):
            np.testing.assert_array_equal(embedding, model.embed(prompt))


def test_what_is_called_runs_between_steps(tiny):
    with Service(engine_of(tiny)) as service:
        assert service.call(lambda engine: engine.context).result(WAIT) == 256
        with pytest.raises(ZeroDivisionError):
            service.call(lambda engine: 1 / 0).result(WAIT)
        assert service.call(lambda engine: threading.current_thread().name).result(WAIT) != (
            threading.current_thread().name
        )


def test_a_model_is_served_or_generates(tiny):
    with load(tiny, context=128, kv_tokens=512, max_sequences=4) as model:
        expected = [piece.token for piece in model.generate(PROMPTS[0], PARAMS)]
        pieces = model.generate(PROMPTS[0], PARAMS)
        with pytest.raises(RequestError, match="take or drop its answers"):
            model.service()
        del pieces
        service = model.service()
        for call in (model.service, lambda: model.generate([1]), lambda: model.embed([1])):
            with pytest.raises(RequestError, match="being served"):
                call()
        service.submit(PROMPTS[0], PARAMS, (events := Queue()).put)
        assert [e.sample.token for e in until_end(events)] == expected
        service.close()
        assert [piece.token for piece in model.generate(PROMPTS[0], PARAMS)] == expected
        model.service()
    assert model._service.closed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_has_stopped(tiny, monkeypatch):
    engine = engine_of(tiny)
    monkeypatch.setattr(engine, "fail", lambda error: 1 / 0)
    monkeypatch.setattr(engine.runner, "run", lambda *_: 1 / 0)
    service = Service(engine)
    gate = threading.Event()
    service.call(lambda _: gate.wait(WAIT))
    service.submit(PROMPTS[0], PARAMS, (events := Queue()).put)
    service.cancel(12345)
    gate.set()
    assert "the engine has stopped" in str(until_end(events)[-1].error)
    assert service.drain(WAIT)
    for call in (lambda: service.submit(PROMPTS[0], PARAMS, print), lambda: service.call(print)):
        with pytest.raises(UnavailableError):
            call()
    service.close()
    assert service.closed
