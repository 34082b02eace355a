"""Prompts that begin alike share blocks: same bits, no memory of its own, nothing leaked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import make_runner
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk import SamplingParams
from pronk.engine.blocks import KvBlocks
from pronk.engine.engine import Engine
from pronk.engine.pool import BlockPool
from pronk.graph.kv import KvGroup, KvPool
from pronk.spec import LayerSpec

RNG = np.random.default_rng(11)
IDS = [int(i) for i in RNG.integers(3, 320, 300)]
FULL = LayerSpec()
KINDS = {
    "global": (FULL, FULL),
    "window": (LayerSpec("window", 40), FULL),
    "sinks": (LayerSpec("window", 33, 5), FULL),
    "chunked": (LayerSpec("chunked", 48), FULL),
    "no global": (LayerSpec("window", 40), LayerSpec("chunked", 48)),
}
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


def engine_of(tiny, kind="global", **limits):
    defaults = {"context": 512, "max_tokens": 64, "kv_tokens": 2048, "threads": 1}
    return Engine(make_runner(tiny, layers=KINDS[kind], **{**defaults, **limits}), frozenset())


def drain(engine):
    samples, cached = {}, {}
    while engine.busy:
        for event in engine.step():
            samples.setdefault(event.request_id, []).append(event.sample)
            cached[event.request_id] = event.cached_tokens
    return samples, cached


def ask(engine, prompt, params=PARAMS, **options):
    request = engine.add(prompt, params, **options)
    samples, cached = drain(engine)
    return samples[request], cached[request]


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_beginning_gives_the_same_bits(tiny, kind):
    engine = engine_of(tiny, kind)
    first, cached = ask(engine, IDS[:200])
    assert cached == 0
    again, cached = ask(engine, IDS[:200])
    assert cached == 192  # the full blocks
    assert again == first  # tokens, and the bits of their log-probabilities
    other = [*IDS[:100], *IDS[150:180]]
    expected, _ = ask(engine_of(tiny, kind), other)
    got, cached = ask(engine, other)
    assert cached == 96
    assert got == expected
    # A prompt of nothing but full blocks leaves the last to compute: its logits are needed.
    assert ask(engine, IDS[:192])[1] == 160
    assert engine.kv.free == engine.kv.num_blocks


def test_logits_from_cached_blocks_are_the_same_bits(tiny, monkeypatch):
    engine = engine_of(tiny)
    rows = []
    head = engine.runner.head
    monkeypatch.setattr(
        engine.runner, "head", lambda r, keep=(): rows.append(head(r).copy()) or rows[-1]
    )
    for _ in range(2):
        ask(engine, IDS)
    np.testing.assert_array_equal(np.concatenate(rows[:6]), np.concatenate(rows[6:]))


def test_an_answer_is_part_of_the_next_prompt(tiny):
    engine = engine_of(tiny)
    samples, _ = ask(engine, IDS[:60], SamplingParams(max_tokens=40, ignore_eos=True))
    turn = [*IDS[:60], *(s.token for s in samples), *IDS[60:70]]
    got, cached = ask(engine, turn)
    assert cached == 96
    assert got == ask(engine_of(tiny), turn)[0]


def test_samples_of_one_prompt_share_its_blocks(tiny):
    engine = engine_of(tiny)
    params = [SamplingParams(max_tokens=8, temperature=1.0, seed=i) for i in range(4)]
    ids = [engine.add(IDS[:200], p) for p in params]
    held, steps = 0, 0
    samples = {}
    while engine.busy:
        steps += 1
        for event in engine.step():
            samples.setdefault(event.request_id, []).append(event.sample)
        held = max(held, engine.kv.num_blocks - engine.kv.free)
    for i, p in zip(ids, params, strict=True):
        assert samples[i] == ask(engine_of(tiny), IDS[:200], p)[0]
    assert held == 6 + 4  # the full blocks once, and one of its own for each
    assert engine.counters.prompt_tokens == 192 + 4 * 8
    assert engine.counters.prefix_hits == 3 * 192
    assert engine.counters.prefix_queries == 4 * 200


def test_the_least_recently_used_gives_way(tiny):
    engine = engine_of(tiny, kv_tokens=256, context=256)  # eight blocks
    prompts = [[i] * 65 for i in (3, 5, 7)]
    once = SamplingParams(max_tokens=1)
    for prompt in prompts:
        ask(engine, prompt, once)
    assert ask(engine, prompts[0], once)[1] == 64  # so that the second is the oldest
    ask(engine, [9] * 100, once)
    assert [ask(engine, prompts[i], once)[1] for i in (0, 2, 1)] == [64, 64, 0]


def test_a_window_starts_only_where_its_blocks_are(tiny):
    # One context: what the window has left behind is soon taken for what comes.
    engine = engine_of(tiny, "window", kv_tokens=512, max_tokens=16)
    once = SamplingParams(max_tokens=1)
    ask(engine, IDS, once)
    window = engine.kv.managers[0]
    got, cached = ask(engine, [*IDS[:64], 5, 6, 7], PARAMS)
    assert cached == 0
    assert got == ask(engine_of(tiny, "window"), [*IDS[:64], 5, 6, 7])[0]
    assert window.pool.num_blocks < 10


def test_a_session_does_not_write_to_what_others_hold(tiny):
    engine = engine_of(tiny)
    ask(engine, IDS[:96], session="s")
    running = engine.add([*IDS[:96], 5], SamplingParams(max_tokens=30))
    engine.step()
    # 80 tokens end within a block that the other holds: it starts at the block instead.
    changed = [*IDS[:80], 7, *IDS[81:100]]
    request = engine.add(changed, PARAMS, session="s")
    assert engine._requests[request].computed == 64
    samples, _ = drain(engine)
    assert samples[request] == ask(engine_of(tiny), changed)[0]
    long = SamplingParams(max_tokens=30)
    tokens = [s.token for s in ask(engine_of(tiny), [*IDS[:96], 5], long)[0]]
    assert [s.token for s in samples[running]] == tokens[-len(samples[running]) :]
    # What a session wrote over is not found any more.
    ask(engine, IDS[:96], session="t")
    ask(engine, [*IDS[:90], 9], session="t")
    assert ask(engine, IDS[:96])[0] == ask(engine_of(tiny), IDS[:96])[0]


def test_what_failed_is_not_found(tiny, monkeypatch):
    engine = engine_of(tiny)
    head = engine.runner.head
    monkeypatch.setattr(engine.runner, "head", lambda rows, keep=(): head(rows) * np.float32("nan"))
    request = engine.add(IDS[:100], PARAMS)
    events = []
    while engine.busy:
        events += engine.step()
    assert [(e.request_id, e.finish_reason) for e in events] == [(request, "error")]
    monkeypatch.setattr(engine.runner, "head", head)
    assert ask(engine, IDS[:100])[1] == 0
    assert engine.kv.free == engine.kv.num_blocks


# ---- the block managers, by random traces

GROUPS = (
    KvGroup("global", 0, 0, (0,)),
    KvGroup("window", 70, 0, (1,)),
    KvGroup("window", 40, 20, (2,)),
    KvGroup("chunked", 50, 0, (3,)),
    KvGroup("chunked", 64, 0, (4,)),
)
AT_ONCE = 48
KINDS_OF_ACTION = ["add"] * 2 + ["step"] * 9 + ["draft", "end", "preempt", "session", "bad"]
ACTIONS = st.tuples(st.sampled_from(KINDS_OF_ACTION), st.integers(0, 3), st.integers(1, AT_ONCE))


class Trace:
    """Sequences of few tokens, so that many begin alike, over small pools."""

    def __init__(self, groups, blocks):
        self.kv = KvBlocks([KvPool(g, 64, blocks) for g in groups], AT_ONCE)
        self.live = []  # [holding, tokens, computed]
        self.wrote = [{} for _ in groups]  # (block, place) -> name of all tokens up to there
        self.names = {}

    def named(self, tokens):
        """A number for each beginning."""
        name, names = 0, []
        for token in tokens:
            name = self.names.setdefault((name, token), len(self.names) + 1)
            names.append(name)
        return names

    def add(self, seed, length):
        tokens = [0] * 75 + [seed % 2] * 60 + [seed] * (3 * length)
        holding = self.kv.hold()
        computed = self.kv.extend(holding, tokens, 0)
        self.live.append([holding, tokens, computed])
        self.sees(holding, tokens, computed, computed + 1, written=computed)

    def step(self, entry, count, drafted=0):
        holding, tokens, computed = entry
        computed = entry[2] = self.kv.extend(holding, tokens, computed)
        count = min(count, len(tokens) - computed)
        stop = computed + count + drafted
        if not count or not self.kv.fits(holding, computed, stop):
            return
        self.kv.move(holding, computed, stop)
        self.sees(holding, tokens, computed, stop, written=computed)
        names = self.named(tokens)
        for group, blocks in enumerate(holding.blocks):
            pool = self.kv.managers[group].pool
            for position in range(computed, stop):
                block = blocks[position // 32]
                # Who writes to a block is alone, and nobody can find it.
                assert pool._holders[block] == 1 and pool._keys[block] is None
                stands = position < entry[2] + count
                self.wrote[group][block, position % 32] = names[position] if stands else None
        entry[2] = computed + count
        self.kv.publish(holding, tokens, entry[2])

    def sees(self, holding, tokens, start, stop, written):
        """What the tokens from `start` on see was written by the same tokens."""
        names = self.named(tokens)
        for group, (manager, blocks) in enumerate(
            zip(self.kv.managers, holding.blocks, strict=True)
        ):
            for position in {start, stop - 1}:
                first = manager.group.first_seen(position)
                sinks = range(min(manager.group.sinks, first, written))
                for seen in (*sinks, *range(first, min(position + 1, written))):
                    block = blocks[seen // 32]
                    assert block >= 0
                    assert self.wrote[group][block, seen % 32] == names[seen]

    def check(self):
        for i, manager in enumerate(self.kv.managers):
            pool = manager.pool
            held = Counter(b for holding, *_ in self.live for b in holding.blocks[i] if b >= 0)
            assert [held[b] for b in range(pool.num_blocks)] == pool._holders
            free = [*pool._free, *pool._unheld]
            assert len(set(free)) == len(free) == pool.num_blocks - len(held)
            assert {pool._known[k] for k in pool._known} >= set(pool._unheld)
            assert all(pool._keys[b] == k for k, b in pool._known.items())


@pytest.mark.parametrize("groups", [GROUPS[:1], GROUPS[1:3], GROUPS[3:], GROUPS], ids=len)
@settings(max_examples=40, deadline=None)
@given(trace=st.lists(ACTIONS, min_size=30, max_size=80), blocks=st.integers(9, 24))
def test_blocks_are_neither_leaked_nor_freed_twice(groups, trace, blocks):
    run = Trace(groups, blocks)
    kv = run.kv
    for action, which, size in trace:
        if action == "add":
            run.add(which, size)
        elif run.live:
            entry = run.live[which % len(run.live)]
            holding, tokens, computed = entry
            if action == "step":
                run.step(entry, size)
            elif action == "draft":
                run.step(entry, 1, size)
            elif action == "end":
                kv.release(holding)
                run.live.remove(entry)
            elif action == "preempt":
                kv.release(holding)
                entry[2] = 0
            elif action == "bad":
                kv.forget(holding)
                kv.release(holding)
                run.live.remove(entry)
            else:  # goes on from a shorter beginning, with other tokens
                shared = min(computed, max(1, len(tokens) - size))
                entry[2] = kv.reuse(holding, shared)
                entry[1] = [*tokens[:shared], 100 + which, *tokens[:size]]
        run.check()
    for holding, *_ in run.live:
        kv.release(holding)
    run.live.clear()
    run.check()
    assert kv.free == kv.num_blocks


def test_a_block_is_not_given_back_twice():
    pool = BlockPool(3)
    (block,) = pool.take(1)
    pool.publish(block, b"a")
    assert pool.hold(b"a") == block and pool.shared(block)
    pool.give_back([block])
    pool.give_back([block])
    assert (pool.free, pool.cached) == (3, 1)
    with pytest.raises(RuntimeError, match="given back twice"):
        pool.give_back([block])
    assert pool.take(3) and pool.cached == 0


def test_blocks_taken_together_lie_in_order():
    """A sequence in neighbouring blocks is read as one stream, also after others left."""
    pool = BlockPool(6)
    first = pool.take(6)
    for block in first:
        pool.publish(block, bytes([block]))
    pool.give_back(first)  # known and unheld: the end of it is evicted first
    assert pool.take(4) == [2, 3, 4, 5]
