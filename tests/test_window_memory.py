"""Models with windows and chunks: native as interpreted, in bounded memory, in any company."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import make_runner, reference_weights, run_whole

from pronk import SamplingParams, load
from pronk.checkpoint.open import open_checkpoint
from pronk.engine.engine import Engine
from pronk.graph.reference import Reference
from pronk.model import compile_checkpoint
from pronk.spec import LayerSpec

FULL, WINDOW = LayerSpec(), LayerSpec("window", 40)
SINKS, CHUNKED = LayerSpec("window", 33, 5), LayerSpec("chunked", 48)
KINDS = {
    "window": (WINDOW, FULL, WINDOW, WINDOW),
    "sinks": (SINKS, SINKS, FULL, SINKS),
    "chunked": (CHUNKED, CHUNKED, CHUNKED, FULL),
    "mixed": (WINDOW, FULL, CHUNKED, SINKS),
    "no global": (WINDOW, WINDOW, SINKS, CHUNKED),
}
RNG = np.random.default_rng(8)
IDS = [int(i) for i in RNG.integers(3, 320, 300)]
GREEDY = SamplingParams(max_tokens=120, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


def runner_of(tiny, kind, **limits):
    defaults = {"context": 512, "max_tokens": 24, "kv_dtype": "f32", "threads": 1}
    return make_runner(tiny, layers=KINDS[kind], **{**defaults, **limits})


def drain(engine):
    tokens = {}
    while engine.busy:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.sample.token)
            check_memory(engine)
    return tokens


def check_memory(engine):
    """No more blocks are held than a sequence's bound, and none twice."""
    for i, manager in enumerate(engine.kv.managers):
        every = []
        for request in (*engine.scheduler.running, *engine._sessions.values()):
            held = [block for block in request.holding.blocks[i] if block >= 0]
            assert len(held) <= manager.most(request.max_length)
            every += held
        assert len(every) == len(set(every))
        assert manager.pool.free + len(every) <= manager.pool.num_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_native_is_as_interpreted(tiny, kind):
    runner = runner_of(tiny, kind)
    with open_checkpoint(tiny) as checkpoint:
        graph = runner.program.graph
        reference = Reference(graph, reference_weights(checkpoint, graph))
    expected = reference.step(IDS, range(len(IDS)), [0] * len(IDS), range(len(IDS)))
    for chunk in (24, 1, 7):
        got = run_whole(runner, IDS, chunk)
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_threads_do_not_matter(tiny, kind, kv_dtype):
    expected = run_whole(runner_of(tiny, kind, threads=1, kv_dtype=kv_dtype), IDS)
    for threads, chunk in ((1, 7), (2, 24), (3, 1)):
        runner = runner_of(tiny, kind, threads=threads, kv_dtype=kv_dtype)
        np.testing.assert_array_equal(run_whole(runner, IDS, chunk), expected)


def test_a_window_changes_what_is_said(tiny):
    whole = run_whole(make_runner(tiny, context=512, kv_dtype="f32"), IDS)
    window = run_whole(runner_of(tiny, "window"), IDS)
    # As far as the first window reaches, they are the same.
    assert np.abs(window[:40] - whole[:40]).max() < 1e-5 * np.abs(whole).max()
    assert np.abs(window[100:] - whole[100:]).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_past_several_windows(tiny, kind):
    engine = Engine(runner_of(tiny, kind), frozenset())
    engine.add(IDS[:90], SamplingParams(max_tokens=400, ignore_eos=True))
    tokens = drain(engine)[0]
    assert len(tokens) == 400
    assert engine.kv.free == engine.kv.num_blocks
    logits = run_whole(runner_of(tiny, kind), IDS[:90] + tokens[:-1])
    assert list(logits[89:].argmax(1)) == tokens


@pytest.mark.parametrize("kind", ["mixed", "no global"])
def test_long_sequences_together_are_as_alone(tiny, kind):
    prompts = [IDS[:200], IDS[50:80], IDS[100:290], IDS[7:8]]
    alone = []
    for prompt in prompts:
        engine = Engine(runner_of(tiny, kind), frozenset())
        engine.add(prompt, GREEDY)
        alone.append(drain(engine)[0])
    # Two at a time: the pools hold no more.
    engine = Engine(runner_of(tiny, kind, kv_tokens=1024, max_sequences=4), frozenset())
    ids = [engine.add(prompt, GREEDY) for prompt in prompts]
    tokens = drain(engine)
    assert [tokens[i] for i in ids] == alone
    assert engine.kv.free == engine.kv.num_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_go_on(tiny, kind):
    engine = Engine(runner_of(tiny, kind), frozenset())
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    history = IDS[:150]

    def ask(follow):
        """Tokens that were reused, and the answer, which is that of a fresh start."""
        request = engine.add(follow, params, session="s")
        reused = engine._requests[request].computed
        answer = drain(engine)[request]
        other = Engine(runner_of(tiny, kind), frozenset())
        other.add(follow, params)
        assert answer == drain(other)[0]
        return reused, follow + answer

    reused, history = ask(history)
    assert reused == 0
    # The last token's keys were never needed; a little less than was computed will do, too.
    for back in (1, 10, 20):
        kept = len(history) - back
        reused, history = ask([*history[:kept], 5 + history[kept] % 9, *IDS[150:165]])
        assert reused == kept
    # What the windows have left behind is computed anew.
    reused, _ = ask([*IDS[:20], 3 + IDS[20] % 9, *IDS[21:100]])
    assert reused == (20 if kind == "sinks" else 0)  # what the sinks' block holds is there
    engine.drop_sessions()
    assert engine.kv.free == engine.kv.num_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_no_token(tiny, kind):
    prompt = (IDS[:30] * 6)[:150]
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    plain = Engine(runner_of(tiny, kind), frozenset())
    plain.add(prompt, params)
    engine = Engine(runner_of(tiny, kind), frozenset(), speculate=True)
    engine.speculator.plan = always
    engine.add(prompt, params)
    assert drain(engine) == drain(plain)
    assert engine.speculator.drafted > engine.speculator.accepted
    assert engine.kv.free == engine.kv.num_blocks


def always(candidates, room, alone):
    """Drafts that repeat what came before, whether or not that is likely to hold."""
    return [list(c.tokens[-9:])[: max(0, min(room, c.most))] for c in candidates]


def test_logits_take_turns_with_requests(tiny):
    engine = Engine(runner_of(tiny, "mixed", kv_tokens=1024), frozenset())
    parts = engine.logits(IDS)
    got = [next(parts)]
    request = engine.add(IDS[:60], GREEDY)
    tokens = []
    for part in parts:
        got.append(part)
        if engine.busy:
            tokens += [event.sample.token for event in engine.step()]
    tokens += drain(engine).get(request, [])
    np.testing.assert_array_equal(np.concatenate(got), run_whole(runner_of(tiny, "mixed"), IDS))
    other = Engine(runner_of(tiny, "mixed"), frozenset())
    other.add(IDS[:60], GREEDY)
    assert tokens == drain(other)[0]
    assert engine.kv.free == engine.kv.num_blocks


def test_a_policy_bounds_the_memory_of_a_model(tiny):
    policy = "window=40,global-every=4,sinks=4"
    with load(tiny, context=512) as model:
        whole = model.memory.kv
    with load(tiny, context=512, attention=policy, rope_scaling="linear:2") as model:
        kinds = [layer.attention for layer in model.spec.layers]
        assert kinds == ["window"] * 3 + ["global"]
        assert model.spec.context_length == 2 * 512
        assert model._open().executor.kv_bytes == model.memory.kv
        bound = -(-(40 + 128) // 32) + 1 + 1
        assert model.memory.kv * 64 == whole * (16 + 3 * bound)
        assert len(list(model.generate(IDS, SamplingParams(max_tokens=9, ignore_eos=True)))) == 9


def test_programs_know_their_groups(tiny):
    with open_checkpoint(tiny) as checkpoint:
        runner = runner_of(tiny, "mixed")
        program = compile_checkpoint(checkpoint, runner.program.limits, runner.program.spec)
    assert [pool.group.layers for pool in program.kv_pools] == [(0,), (1,), (2,), (3,)]
    assert runner.executor.kv_bytes == program.kv_bytes
    assert program.memory(0).kv == sum(pool.nbytes for pool in program.kv_pools)
