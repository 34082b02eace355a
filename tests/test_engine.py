"""Requests through the engine: batching, blocks, sessions, ends."""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import make_runner

from pronk import PronkError, RequestError, SamplingParams, load
from pronk.engine.blocks import BlockPool, GlobalBlocks
from pronk.engine.engine import Engine
from pronk.graph.kv import KvGroup

RNG = np.random.default_rng(5)
PROMPTS = [[int(i) for i in RNG.integers(3, 320, n)] for n in (90, 5, 40, 3, 61)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


def drain(engine):
    tokens, reasons = {}, {}
    while engine.busy:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.sample.token)
            if event.finish_reason:
                reasons[event.request_id] = event.finish_reason
    return tokens, reasons


def alone(tiny, prompt, params):
    engine = Engine(make_runner(tiny), frozenset())
    engine.add(prompt, params)
    return drain(engine)[0][0]


def test_requests_together_answer_as_alone(tiny):
    engine = Engine(make_runner(tiny, max_tokens=32, max_sequences=3), frozenset())
    params = [
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=20, temperature=1.0, seed=7),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=15, temperature=0.7, top_k=5, seed=1),
        SamplingParams(max_tokens=12, repetition_penalty=1.3),
    ]
    ids = [engine.add(p, q) for p, q in zip(PROMPTS, params, strict=True)]
    free = engine.kv.num_blocks
    tokens, reasons = drain(engine)
    for i, prompt, param in zip(ids, PROMPTS, params, strict=True):
        assert tokens[i] == alone(tiny, prompt, param)
        assert reasons[i] == "length"
    assert engine.kv.free == free  # every block came back


def test_a_decode_does_not_wait_for_a_prompt(tiny):
    engine = Engine(make_runner(tiny, max_tokens=16, kv_tokens=512), frozenset())
    first = engine.add(PROMPTS[1], SamplingParams(max_tokens=30))
    engine.step()
    engine.add(PROMPTS[0], SamplingParams(max_tokens=2))
    # The long prompt takes six steps of 15 tokens; the first request moves on in each.
    for _ in range(5):
        assert [e.request_id for e in engine.step()] == [first]


def test_an_end_token_ends_unless_ignored(tiny):
    params = SamplingParams(max_tokens=8)
    tokens = alone(tiny, PROMPTS[0], params)
    for ignore in (False, True):
        engine = Engine(make_runner(tiny), frozenset({tokens[3]}))
        engine.add(PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=ignore))
        got, reasons = drain(engine)
        cut = tokens if ignore else tokens[: tokens.index(tokens[3]) + 1]
        assert got[0] == cut
        assert reasons[0] == ("length" if ignore else "stop")


def test_generation_ends_with_the_context(tiny):
    engine = Engine(make_runner(tiny, context=64), frozenset())
    engine.add(PROMPTS[2], SamplingParams())
    tokens, reasons = drain(engine)
    assert len(tokens[0]) == 64 - len(PROMPTS[2])
    assert reasons[0] == "length"


def test_a_session_reuses_what_it_shares(tiny):
    engine = Engine(make_runner(tiny, max_tokens=128), frozenset())
    params = SamplingParams(max_tokens=4)
    engine.add(PROMPTS[0], params, session="s")
    answer = drain(engine)[0][0]
    follow = PROMPTS[0] + answer + PROMPTS[1]
    request = engine.add(follow, params, session="s")
    # All but the last generated token, whose keys were never needed, are in the cache.
    assert engine._requests[request].computed == len(PROMPTS[0]) + len(answer) - 1
    again = drain(engine)[0][request]
    assert again == alone(tiny, follow, params)
    changed = [*PROMPTS[0][:40], 5, *PROMPTS[0][41:]]
    request = engine.add(changed, params, session="s")
    assert engine._requests[request].computed == 40
    assert drain(engine)[0][request] == alone(tiny, changed, params)
    engine.drop_sessions()
    assert engine.kv.free == engine.kv.num_blocks


def test_a_chat_keeps_its_history_in_the_cache(tiny):
    turns = [{"role": "user", "content": word} for word in ("one", "two")]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with load(tiny, context=256) as model:
        list(model.chat(turns[:1], params, session="chat"))
        pieces = model.chat(turns, params, session="chat")
        (request,) = model._engine._requests.values()
        pairs = zip(model.render(turns[:1]), model.render(turns), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        assert request.computed >= shared > 0
        assert len(list(pieces)) == 4


def test_a_kept_session_gives_way_to_a_request(tiny):
    engine = Engine(make_runner(tiny, context=128), frozenset())
    engine.add(PROMPTS[0], SamplingParams(max_tokens=10), session="old")
    drain(engine)
    assert engine.kv.free < engine.kv.num_blocks
    engine.add(PROMPTS[4], SamplingParams())  # needs the whole pool
    assert len(drain(engine)[0][1]) == 128 - len(PROMPTS[4])
    assert engine.kv.free == engine.kv.num_blocks


def test_an_aborted_request_frees_its_blocks(tiny):
    engine = Engine(make_runner(tiny), frozenset())
    request = engine.add(PROMPTS[0], SamplingParams())
    engine.step()
    assert engine.kv.free < engine.kv.num_blocks
    engine.abort(request)
    engine.abort(request)
    assert engine.kv.free == engine.kv.num_blocks
    assert not engine.busy


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "the prompt is empty"),
        ([320], "token id 320 is not in the vocabulary of 320"),
        ([-1], "token id -1"),
        ([1] * 256, "has 256 tokens, but the context holds 256"),
    ],
)
def test_a_bad_prompt_is_refused(tiny, prompt, match):
    engine = Engine(make_runner(tiny), frozenset())
    with pytest.raises(RequestError, match=match):
        engine.add(prompt, SamplingParams())
    assert not engine.busy


def test_logits_are_those_of_generation(tiny):
    with load(tiny, context=128) as model:
        ids = PROMPTS[0]
        pieces = list(model.generate(ids, SamplingParams(max_tokens=5, logprobs=2)))
        full = ids + [p.token for p in pieces]
        logits = model.logits(full).astype(np.float64)
        assert logits.shape == (len(full), 320)
        assert (model.logits(np.array(full)) == logits).all()
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, piece in enumerate(pieces):
            row = logprobs[len(ids) - 1 + i]
            assert piece.token == row.argmax()
            assert piece.logprob == pytest.approx(row.max(), abs=1e-4)
            assert piece.top_logprobs[0] == (piece.token, piece.logprob)
        with pytest.raises(RequestError, match="129 tokens do not fit the context of 128"):
            model.logits([1] * 129)


def test_answers_taken_in_turns_are_whole(tiny):
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    with load(tiny, context=256) as model:
        alone = [[p.token for p in model.generate(ids, params)] for ids in PROMPTS[:3]]
        started = [model.generate(ids, params) for ids in PROMPTS[:3]]
        got = [[], [], []]
        for _ in range(9):
            for tokens, pieces in zip(got, started, strict=True):
                tokens.append(next(pieces).token)
        assert got == alone
        assert all(next(pieces, None) is None for pieces in started)
        first, second = (model.generate(ids, params) for ids in PROMPTS[:2])
        assert [p.token for p in second] == alone[1]  # the first waits with what it has
        assert [p.token for p in first] == alone[0]
        assert not model._events


def test_a_dropped_answer_ends_its_request(tiny):
    with load(tiny, context=128) as model:
        engine = model._engine
        for begun in (False, True):
            pieces = model.generate(PROMPTS[0])
            if begun:
                next(pieces)
            assert engine.busy
            del pieces
            assert not engine.busy
            assert not model._events
            assert engine.kv.free == engine.kv.num_blocks


def test_a_closed_model_says_so(tiny):
    model = load(tiny, context=128)
    pieces = model.generate(PROMPTS[0])
    next(pieces)
    model.close()
    for call in (
        lambda: next(pieces),
        lambda: model.context,
        lambda: model.generate([1]),
        lambda: model.logits([1]),
    ):
        with pytest.raises(RequestError, match="the model is closed"):
            call()


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_step_is_repeated(tiny, monkeypatch, after):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    engine = Engine(make_runner(tiny, max_tokens=32), frozenset())
    ids = [engine.add(p, params) for p in PROMPTS[:2]]
    run, calls = engine.runner.run, iter(range(1000))

    def interrupted(*arguments):
        odd = next(calls) % 2
        if odd or after:
            run(*arguments)
        if not odd:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "run", interrupted)
    tokens = {i: [] for i in ids}
    while engine.busy:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        for event in engine.step():
            tokens[event.request_id].append(event.sample.token)
    for i, prompt in zip(ids, PROMPTS, strict=False):
        assert tokens[i] == alone(tiny, prompt, params)


def test_sessions_in_line_give_way_to_the_first(tiny):
    engine = Engine(make_runner(tiny, context=128), frozenset())
    follow = {}
    for name, first in (("a", 3), ("b", 5)):
        prompt = [first] * 40
        request = engine.add(prompt, SamplingParams(max_tokens=2), session=name)
        follow[name] = prompt + drain(engine)[0][request]
    # Each holds half of the pool and needs all of it.
    ids = [engine.add(prompt, SamplingParams(), session=name) for name, prompt in follow.items()]
    assert engine.kv.free == 0
    tokens, _ = drain(engine)
    for i, prompt in zip(ids, follow.values(), strict=True):
        assert tokens[i] == alone(tiny, prompt, SamplingParams(max_tokens=128 - len(prompt)))


def test_a_pool_that_nothing_will_free_is_refused(tiny):
    engine = Engine(make_runner(tiny, context=128), frozenset())
    held = engine.logits([1] * 120)
    next(held)
    engine.add(PROMPTS[1], SamplingParams())
    with pytest.raises(RequestError, match="in use by logits"):
        engine.step()
    held.close()
    assert len(drain(engine)[0][0]) == 128 - len(PROMPTS[1])
    # A pool smaller than the context bounds a sequence.
    engine = Engine(make_runner(tiny, context=128, kv_tokens=64), frozenset())
    engine.add(PROMPTS[1], SamplingParams())
    assert len(drain(engine)[0][0]) == 64 - len(PROMPTS[1])


def test_blocks_are_taken_and_given_back():
    pool = BlockPool(4)
    manager = GlobalBlocks(pool, KvGroup("global", 0, 0, (0,)), 160)
    blocks = []
    manager.move(blocks, 0, 33)
    assert blocks == [0, 1]
    manager.move(blocks, 33, 64)
    assert blocks == [0, 1]
    with pytest.raises(RuntimeError, match="2 free blocks, not 3"):
        manager.move(blocks, 64, 160)
    manager.cut(blocks, 0)
    assert (blocks, pool.free) == ([], 4)


def test_a_step_refuses_what_would_reach_outside(tiny):
    runner = make_runner(tiny, context=64)
    for ids, positions, sequences, blocks in (
        ([320], [0], [0], [[[0, 1]]]),
        ([1], [64], [0], [[[0, 1]]]),
        ([1], [-1], [0], [[[0, 1]]]),
        ([1], [0], [1], [[[0, 1]]]),
        ([1], [0], [0], [[[2, 1]]]),
        ([1] * 129, list(range(129)), [0] * 129, [[[0, 1]]]),
    ):
        with pytest.raises(ValueError):
            runner.step(ids, positions, sequences, blocks, [0])
    with pytest.raises(ValueError, match="logit row 1"):
        runner.step([1], [0], [0], [[[0, 1]]], [1])


def test_logits_that_cannot_be_sampled_end_their_request_only(tiny, monkeypatch):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    engine = Engine(make_runner(tiny, kv_tokens=512), frozenset())
    good, bad = (engine.add(p, params, session=str(i)) for i, p in enumerate(PROMPTS[:2]))
    events = engine.step()
    head = engine.runner.head

    def damaged(rows, keep=()):
        logits = head(rows).copy()
        logits[1, 7] = np.nan
        return logits

    monkeypatch.setattr(engine.runner, "head", damaged)
    events += engine.step()
    monkeypatch.setattr(engine.runner, "head", head)
    while engine.busy:
        events += engine.step()
    tokens = [e.sample.token for e in events if e.request_id == good]
    assert tokens == alone(tiny, PROMPTS[0], params)
    (error,) = [e for e in events if e.finish_reason == "error"]
    assert error.request_id == bad
    assert error.sample is None
    assert "a logit of nan at token 7" in str(error.error)
    assert "1" not in engine._sessions  # what it left in the cache is as bad


def test_an_answer_that_fails_leaves_the_others(tiny, monkeypatch):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with load(tiny, context=256) as model:
        expected = list(model.generate(PROMPTS[0], params))
        monkeypatch.setattr(model._engine, "runner", runner := Damaging(model._runner))
        good, bad = (model.generate(p, params) for p in PROMPTS[:2])
        got = [next(good)]
        next(bad)
        runner.row = 1
        got.append(next(good))
        runner.row = None
        got += good
        assert got == expected
        with pytest.raises(PronkError, match="logit of nan"):
            list(bad)
        assert not model._events


class Damaging:
    """A runner that gives bad logits in one row."""

    def __init__(self, runner):
        self.runner, self.row = runner, None

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def head(self, rows, keep=()):
        logits = self.runner.head(rows, keep)
        if self.row is not None:
            logits = logits.copy()
            logits[self.row] = np.nan
        return logits


def test_a_forked_process_is_told(tiny):
    code = f"""
import os
from pronk import PronkError, RequestError, SamplingParams, load
params = SamplingParams(max_tokens=3, ignore_eos=True)
for threads in (2, 1):
    model = load({str(tiny)!r}, threads=threads, context=64)
    assert len(list(model.generate([1, 2], params))) == 3
    child = os.fork()
    if not child:
        try:
            print(threads, len(list(model.generate([1, 2], params))), flush=True)
        except RequestError as error:
            print(threads, error, flush=True)
        raise SystemExit(0)  # what it holds is freed without waiting for threads either
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(model.generate([1, 2], params))) == 3
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("2 this process was forked after the model was loaded")
    assert second == "1 3"
