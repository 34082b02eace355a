"""KV memory: a pool of fixed-size blocks for each kind of attention, and who holds which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pronk.graph.kv import KvGroup, KvPool, blocks_of
from pronk.graph.pack import KV_BLOCK

__all__ = ["BlockPool", "ChunkedBlocks", "GlobalBlocks", "Holding", "KvBlocks", "WindowBlocks"]

_NONE = -1  # in place of a block that was given back


class BlockPool:
    """Hands out block numbers; lowest first, so that little memory is touched."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take blocks; the caller has checked that there are enough."""
        if count > len(self._free):
            raise RuntimeError(f"the KV pool has {len(self._free)} free blocks, not {count}")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks to the pool."""
        self._free.extend(reversed(blocks))


class GlobalBlocks:
    """The manager for layers that attend to every earlier position: a block stays until the end.

    What a sequence holds is a list with a block for each 32 positions, -1 where it was given back.

    Parameters
    ----------
    pool : BlockPool
    group : KvGroup
    at_once : int
        Most tokens of a sequence in a step.
    """

    def __init__(self, pool: BlockPool, group: KvGroup, at_once: int) -> None:
        self.pool, self.group, self.at_once = pool, group, at_once

    def most(self, tokens: int) -> int:
        """Most blocks that a sequence of so many tokens holds at a time."""
        return self.group.bound(tokens, self.at_once)

    def move(self, blocks: list[int], start: int, stop: int) -> None:
        """Hold what a step needs that runs the tokens at positions from `start` to `stop`."""
        blocks += self.pool.take(max(0, blocks_of(stop) - len(blocks)))

    def reusable(self, blocks: list[int], tokens: int) -> int:
        """How many of a sequence's first tokens another can start from, at most `tokens`."""
        return min(tokens, len(blocks) * KV_BLOCK)

    def cut(self, blocks: list[int], tokens: int) -> None:
        """Give back what is behind the first tokens."""
        keep = blocks_of(tokens)
        self._give_back(blocks[keep:])
        del blocks[keep:]

    def _give_back(self, blocks: list[int]) -> None:
        self.pool.give_back([block for block in blocks if block != _NONE])


class WindowBlocks(GlobalBlocks):
    """The manager for layers with a window: the blocks behind it are given back, sinks stay.

    As many are kept as a step of `at_once` tokens would need, however few it has: they are
    promised anyway, and a sequence may start again from a little further back.
    """

    def move(self, blocks: list[int], start: int, stop: int) -> None:
        """Give back what no token from `start` on sees, and hold what the step needs."""
        self.cut(blocks, stop)  # drafts that did not stand reached further
        first = self.group.first_seen(max(0, min(start, stop - self.at_once)))
        sinks, behind = blocks_of(self.group.sinks), first // KV_BLOCK
        for i in range(min(behind, len(blocks)) - 1, sinks - 1, -1):
            if blocks[i] == _NONE:
                break  # what is before was given back too
            self.pool.give_back([blocks[i]])
            blocks[i] = _NONE
        blocks += [_NONE] * (blocks_of(stop) - len(blocks))
        needed = self.group.first_seen(start) // KV_BLOCK
        missing = [i for i in range(needed, len(blocks)) if blocks[i] == _NONE]
        for i, block in zip(missing, self.pool.take(len(missing)), strict=True):
            blocks[i] = block

    def reusable(self, blocks: list[int], tokens: int) -> int:
        """The longest prefix whose next token sees nothing that was given back."""
        tokens = super().reusable(blocks, tokens)
        while (lost := self._lost(blocks, tokens)) is not None:
            tokens = self._shorter(tokens, lost)
        return tokens

    def _lost(self, blocks: list[int], tokens: int) -> int | None:
        """The last block given back of those that the token behind the first ones sees."""
        first = self.group.first_seen(tokens)
        if first >= tokens:
            return None  # it sees none of them but sinks
        seen = range(first // KV_BLOCK, blocks_of(tokens))
        return next((i for i in reversed(seen) if blocks[i] == _NONE), None)

    def _shorter(self, tokens: int, lost: int) -> int:
        return lost * KV_BLOCK


class ChunkedBlocks(WindowBlocks):
    """The manager for layers that attend within chunks: the blocks behind a chunk are given back.

    The first token of a chunk sees nothing before it, so a sequence can start again from there.
    """

    def _shorter(self, tokens: int, lost: int) -> int:
        return self.group.first_seen(tokens)


_MANAGERS = {"global": GlobalBlocks, "window": WindowBlocks, "chunked": ChunkedBlocks}


@dataclass(slots=True, eq=False)
class Holding:
    """What one sequence holds: a list of blocks for each manager.

    ``promised`` counts the blocks of each that it may come to hold, while it runs.
    """

    blocks: list[list[int]]
    promised: list[int] = field(default_factory=list)


class KvBlocks:
    """All KV memory: a manager and a pool for each group of layers.

    A sequence that runs was promised the most it will ever hold, so it is never out of blocks.

    Parameters
    ----------
    pools : sequence of KvPool
    at_once : int
        Most tokens of a sequence in a step.
    """

    def __init__(self, pools: Sequence[KvPool], at_once: int) -> None:
        self.managers: list[GlobalBlocks] = [
            _MANAGERS[pool.group.attention](BlockPool(pool.blocks), pool.group, at_once)
            for pool in pools
        ]
        self._running: list[Holding] = []

    @property
    def num_blocks(self) -> int:
        """Blocks of all pools."""
        return sum(m.pool.num_blocks for m in self.managers)

    @property
    def free(self) -> int:
        """Blocks of all pools that nobody holds."""
        return sum(m.pool.free for m in self.managers)

    def hold(self) -> Holding:
        """A holding of nothing."""
        return Holding([[] for _ in self.managers])

    def promise(self, holding: Holding, tokens: int) -> bool:
        """Promise a sequence what it needs for so many tokens, if there is enough."""
        needed = [manager.most(tokens) for manager in self.managers]
        for i, manager in enumerate(self.managers):
            promised = sum(h.promised[i] - _count(h.blocks[i]) for h in self._running)
            if needed[i] - _count(holding.blocks[i]) > manager.pool.free - promised:
                return False
        holding.promised = needed
        self._running.append(holding)
        return True

    def settle(self, holding: Holding) -> None:
        """A sequence no longer runs: it keeps what it holds and is promised nothing."""
        if holding in self._running:
            self._running.remove(holding)
            holding.promised = []

    def move(self, holding: Holding, start: int, stop: int) -> None:
        """Hold what a step needs that runs the tokens at positions from `start` to `stop`.

        Nothing before `start` is ever asked for again, but for what a session starts from.
        """
        for manager, blocks in zip(self.managers, holding.blocks, strict=True):
            manager.move(blocks, start, stop)

    def reuse(self, holding: Holding, tokens: int) -> int:
        """Keep the first tokens of a sequence, or fewer where blocks are gone; gives how many."""
        before = -1
        while before != tokens:
            before = tokens
            for manager, blocks in zip(self.managers, holding.blocks, strict=True):
                tokens = manager.reusable(blocks, tokens)
        for manager, blocks in zip(self.managers, holding.blocks, strict=True):
            manager.cut(blocks, tokens)
        return tokens

    def release(self, holding: Holding) -> None:
        """Give back all that a sequence holds."""
        self.settle(holding)
        for manager, blocks in zip(self.managers, holding.blocks, strict=True):
            manager.cut(blocks, 0)


def _count(blocks: list[int]) -> int:
    return len(blocks) - blocks.count(_NONE)
