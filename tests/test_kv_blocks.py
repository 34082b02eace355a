"""KV blocks of windows and chunks: given back, never missing, never more than promised."""

from __future__ import annotations

import itertools
import random

import pytest

from pronk.engine.blocks import ChunkedBlocks, KvBlocks, WindowBlocks
from pronk.graph.kv import KvGroup, KvPool

ALL = KvGroup("global", 0, 0, (0,))
WINDOW = KvGroup("window", 100, 0, (1,))
SINKS = KvGroup("window", 70, 40, (2,))
CHUNKED = KvGroup("chunked", 50, 0, (3,))
EVEN = KvGroup("chunked", 64, 0, (4,))
GROUPS = [ALL, WINDOW, SINKS, CHUNKED, EVEN]


def memory(groups: list[KvGroup], at_once: int, tokens: int = 2000, sequences: int = 1) -> KvBlocks:
    """Pools that hold so many sequences, and no block more."""
    return KvBlocks([KvPool(g, 64, sequences * g.bound(tokens, at_once)) for g in groups], at_once)


def needed(group: KvGroup, start: int, stop: int) -> set[int]:
    """Blocks that hold what tokens see, position by position."""
    seen = set()
    for position in range(start, stop):
        first = group.first_seen(position)
        seen |= {*range(first, position + 1), *range(min(group.sinks, first))}
    return {position // 32 for position in seen}


@pytest.mark.parametrize("at_once", [1, 5, 64])
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"{g.attention}{g.window}")
def test_what_a_step_sees_is_held_and_the_rest_given_back(group, at_once):
    kv = memory([group], at_once)
    pool = kv.managers[0].pool
    holding = kv.hold()
    assert kv.promise(holding, 2000)
    random.seed(at_once)
    position, most = 0, 0
    while position < 2000:
        stop = min(2000, position + random.randint(1, at_once))
        kv.move(holding, position, stop)
        (blocks,) = holding.blocks
        held = {i for i, block in enumerate(blocks) if block >= 0}
        assert needed(group, position, stop) <= held
        assert len({blocks[i] for i in held}) == len(held) == pool.num_blocks - pool.free
        assert len(held) <= holding.promised[0]
        if group.attention != "global":
            # No more than a step of `at_once` tokens that ends here would need.
            sinks = set(range(-(-group.sinks // 32)))
            assert held <= needed(group, max(0, stop - at_once), stop) | sinks
        most = max(most, len(held))
        # Tokens that were drafted may not stand.
        position = stop - random.randint(0, (stop - position) // 2)
    if group.attention != "global":
        assert most < 2000 // 32 / 5
    kv.release(holding)
    assert pool.free == pool.num_blocks


def test_blocks_come_back_as_a_window_moves():
    kv = memory([WINDOW], 1)
    pool, holding = kv.managers[0].pool, kv.hold()
    free = []
    for position in range(400):
        kv.move(holding, position, position + 1)
        free.append(pool.free)
    # A new block is taken when one begins; one is given back when the window has passed it.
    assert free[0] - free[99] == 3
    assert any(after > before for before, after in itertools.pairwise(free))
    assert min(free[200:]) == min(free)
    assert holding.blocks[0][:9] == [-1] * 9
    assert len(holding.blocks[0]) == 13 and min(holding.blocks[0][9:]) >= 0


def test_sinks_stay():
    kv = memory([SINKS], 8)
    holding = kv.hold()
    for start in range(0, 800, 8):
        kv.move(holding, start, start + 8)
    (blocks,) = holding.blocks
    assert blocks[:2] == [0, 1]
    assert set(blocks[2:20]) == {-1}


def test_a_draft_that_fails_finds_its_blocks():
    kv = memory([WINDOW], 32)
    holding = moved(kv, 300, 32)
    for start in range(300, 364):
        kv.move(holding, start, start + 32)  # one stands of 32
        assert needed(WINDOW, start, start + 32) <= {
            i for i, block in enumerate(holding.blocks[0]) if block >= 0
        }


def moved(kv: KvBlocks, tokens: int, step: int = 1):
    holding = kv.hold()
    for start in range(0, tokens, step):
        kv.move(holding, start, min(tokens, start + step))
    return holding


def test_a_session_starts_again_where_its_blocks_are():
    kv = memory([WINDOW], 16)
    # Going back by as much as a step holds is always possible, further is not.
    for back, kept in ((0, 500), (15, 485), (60, 0), (400, 0)):
        holding = moved(kv, 500)
        assert kv.reuse(holding, 500 - back) == kept, back
        assert len(holding.blocks[0]) == -(-kept // 32)
        kv.move(holding, kept, kept + 16)
        assert needed(WINDOW, kept, kept + 16) <= {
            i for i, block in enumerate(holding.blocks[0]) if block >= 0
        }
        kv.release(holding)
        assert kv.free == kv.num_blocks
    # Before anything was given back, any prefix will do.
    holding = moved(kv, 90)
    assert kv.reuse(holding, 17) == 17
    kv.release(holding)


def test_sinks_alone_are_a_prefix():
    kv = memory([SINKS], 16)
    holding = moved(kv, 500)
    assert kv.reuse(holding, 300) == 64  # the two blocks of the sinks
    assert holding.blocks == [[0, 1]]
    kv.release(holding)


def test_a_chunk_begins_anew():
    kv = memory([CHUNKED], 16)
    holding = moved(kv, 520)
    assert kv.reuse(holding, 510) == 510
    assert kv.reuse(holding, 310) == 300  # a multiple of the chunk; nothing before it is seen
    assert set(holding.blocks[0]) == {-1}
    kv.move(holding, 300, 316)
    assert needed(CHUNKED, 300, 316) <= {i for i, b in enumerate(holding.blocks[0]) if b >= 0}
    kv.release(holding)
    assert kv.free == kv.num_blocks


def test_all_kinds_agree_on_a_prefix():
    kv = memory([ALL, CHUNKED, WINDOW], 16)
    holding = moved(kv, 520)
    assert kv.reuse(holding, 515) == 515
    assert kv.reuse(holding, 310) == 0  # the chunks could, the window cannot
    assert kv.free == kv.num_blocks
    kv = memory([ALL, CHUNKED, EVEN], 16)
    holding = moved(kv, 520)
    # 300 for the one, then 256 for the other, then 250 and 192, ... until both can.
    assert kv.reuse(holding, 310) == 0
    kv = memory([ALL, EVEN], 16)
    assert kv.reuse(moved(kv, 520), 310) == 256


def test_promises_are_kept():
    kv = memory(GROUPS, 16, tokens=1000, sequences=2)
    first, second, third = (kv.hold() for _ in range(3))
    assert kv.promise(first, 1000)
    assert kv.promise(second, 1000)
    assert not kv.promise(third, 1)
    # However the two take turns, there are blocks for both.
    random.seed(1)
    at = {id(first): 0, id(second): 0}
    while min(at.values()) < 1000:
        holding = random.choice([h for h in (first, second) if at[id(h)] < 1000])
        start = at[id(holding)]
        at[id(holding)] = stop = min(1000, start + random.randint(1, 16))
        kv.move(holding, start, stop)
    kv.settle(first)
    assert not kv.promise(third, 1000)  # what ended without being released is still held
    kv.release(first)
    assert kv.promise(third, 1000)
    kv.release(second)
    kv.release(third)
    assert kv.free == kv.num_blocks


def test_managers_go_by_kind():
    kinds = [type(manager) for manager in memory([WINDOW, CHUNKED], 1).managers]
    assert kinds == [WindowBlocks, ChunkedBlocks]
