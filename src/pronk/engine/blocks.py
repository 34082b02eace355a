"""KV memory: a pool of fixed-size blocks for each kind of attention, and who holds which.

A full block is known by its key, a hash of all tokens up to its end, and whoever begins with these
tokens holds it too: nobody writes to it any more. Blocks that nobody holds keep what they have
until their memory is needed, the least recently used first. So prompts that begin alike (system
prompts, chats, samples of one prompt) share memory and work, and no memory is set apart for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from pronk.engine.pool import BlockPool
from pronk.graph.kv import KvGroup, KvPool, blocks_of
from pronk.graph.pack import KV_BLOCK

try:  # as the standard library's random: hashlib would load OpenSSL
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

__all__ = ["BlockPool", "ChunkedBlocks", "GlobalBlocks", "Holding", "KvBlocks", "WindowBlocks"]

_NONE = -1  # in place of a block that was given back


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

    def leave(self, blocks: list[int], start: int, stop: int) -> None:
        """Give back what no token from `start` on sees."""

    def missing(self, blocks: list[int], start: int, stop: int) -> list[int]:
        """Which blocks a step needs that runs the tokens from `start` to `stop`, and has not."""
        return list(range(len(blocks), blocks_of(stop)))

    def move(self, blocks: list[int], start: int, stop: int) -> None:
        """Hold what a step needs that runs the tokens at positions from `start` to `stop`."""
        self.leave(blocks, start, stop)
        missing = self.missing(blocks, start, stop)
        blocks += [_NONE] * (blocks_of(stop) - len(blocks))
        for i, block in zip(missing, self.pool.take(len(missing)), strict=True):
            blocks[i] = block

    def gaps(self, blocks: list[int], keys: Sequence[bytes]) -> list[int]:
        """The last block before each that is neither held nor known; -1 where there is none."""
        last, gaps = _NONE, [_NONE]
        for i, key in enumerate(keys):
            if (i >= len(blocks) or blocks[i] == _NONE) and key not in self.pool:
                last = i
            gaps.append(last)
        return gaps

    def can_start(self, gaps: list[int], count: int) -> bool:
        """Whether what the token behind so many blocks sees is held or known."""
        sinks = min(blocks_of(self.group.sinks), count)
        return gaps[count] < self._first(count) and gaps[sinks] == _NONE

    def start(self, blocks: list[int], keys: Sequence[bytes], count: int) -> None:
        """Hold what the token behind so many blocks sees of them, and nothing else."""
        sinks, first = blocks_of(self.group.sinks), self._first(count)
        blocks += [_NONE] * (count - len(blocks))
        for i in range(count):
            if i < sinks or i >= first:
                if blocks[i] == _NONE:
                    blocks[i] = self.pool.hold(keys[i])
            elif blocks[i] != _NONE:
                self.pool.give_back([blocks[i]])
                blocks[i] = _NONE

    def _first(self, count: int) -> int:
        return self.group.first_seen(count * KV_BLOCK) // KV_BLOCK

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

    def leave(self, blocks: list[int], start: int, stop: int) -> None:
        """Give back what no token from `start` on sees."""
        self.cut(blocks, stop)  # drafts that did not stand reached further
        first = self.group.first_seen(max(0, min(start, stop - self.at_once)))
        sinks, behind = blocks_of(self.group.sinks), first // KV_BLOCK
        for i in range(min(behind, len(blocks)) - 1, sinks - 1, -1):
            if blocks[i] == _NONE:
                break  # what is before was given back too
            self.pool.give_back([blocks[i]])
            blocks[i] = _NONE

    def missing(self, blocks: list[int], start: int, stop: int) -> list[int]:
        """Which blocks a step needs that runs the tokens from `start` to `stop`, and has not."""
        needed = range(self.group.first_seen(start) // KV_BLOCK, blocks_of(stop))
        return [i for i in needed if i >= len(blocks) or blocks[i] == _NONE]

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

    ``promised`` counts the blocks of each that it may come to hold, while it runs. ``keys`` are
    those of its first full blocks, of which the first ``published`` were made known.
    """

    blocks: list[list[int]]
    promised: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0


class KvBlocks:
    """All KV memory: a manager and a pool for each group of layers.

    A sequence that runs was promised what its first tokens need. For more, it must ask whether
    there `fits` any.

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

    def promise(self, holding: Holding, tokens: int, spare: int = 0) -> bool:
        """Promise a sequence what it needs for so many tokens, if there is enough.

        `spare` blocks of each pool are to be left over.
        """
        needed = [manager.most(tokens) for manager in self.managers]
        for i, manager in enumerate(self.managers):
            lacks = max(0, needed[i] - _count(holding.blocks[i]))
            if lacks and lacks + spare > manager.pool.free - self._promised(i, holding):
                return False
        holding.promised = needed
        self._running.append(holding)
        return True

    def _promised(self, group: int, apart: Holding) -> int:
        """Blocks that others than one were promised and do not hold yet."""
        others = (h for h in self._running if h is not apart)
        return sum(max(0, h.promised[group] - _count(h.blocks[group])) for h in others)

    def spare(self, counts: Sequence[int]) -> bool:
        """Whether so many blocks of each pool are neither held nor promised."""
        nobody = Holding([])
        both = zip(self.managers, counts, strict=True)
        return all(n <= m.pool.free - self._promised(i, nobody) for i, (m, n) in enumerate(both))

    def settle(self, holding: Holding) -> None:
        """A sequence no longer runs: it keeps what it holds and is promised nothing."""
        if holding in self._running:
            self._running.remove(holding)
            holding.promised = []

    def fits(self, holding: Holding, start: int, stop: int) -> bool:
        """Whether `move` finds its blocks, without those that others were promised."""
        for i, manager in enumerate(self.managers):
            blocks = holding.blocks[i]
            manager.leave(blocks, start, stop)
            lacks = len(manager.missing(blocks, start, stop))
            if lacks and lacks > manager.pool.free - self._promised(i, holding):
                return False
        return True

    def move(self, holding: Holding, start: int, stop: int) -> None:
        """Hold what a step needs that runs the tokens at positions from `start` to `stop`.

        Nothing before `start` is ever asked for again, but for what a session starts from.
        """
        for manager, blocks in zip(self.managers, holding.blocks, strict=True):
            manager.move(blocks, start, stop)

    def extend(self, holding: Holding, tokens: Sequence[int], computed: int) -> int:
        """Go on with what others have computed of the same tokens; gives how many are done then.

        The last token is always left to compute: its logits are needed.
        """
        have, most = computed // KV_BLOCK, (len(tokens) - 1) // KV_BLOCK
        if have >= most:
            return computed
        (key,) = self.keys(holding, tokens, computed, computed + 1)
        if not any(key in manager.pool for manager in self.managers):
            return computed
        keys = self._chain(holding, tokens, most)
        gaps = [m.gaps(b[:have], keys) for m, b in zip(self.managers, holding.blocks, strict=True)]
        for count in range(most, have, -1):
            if all(m.can_start(g, count) for m, g in zip(self.managers, gaps, strict=True)):
                for manager, blocks in zip(self.managers, holding.blocks, strict=True):
                    manager.cut(blocks, have * KV_BLOCK)
                    manager.start(blocks, keys, count)
                holding.published = count
                return count * KV_BLOCK
        return computed

    def publish(self, holding: Holding, tokens: Sequence[int], computed: int) -> None:
        """Let others find the full blocks among the first tokens."""
        full = computed // KV_BLOCK
        keys = self._chain(holding, tokens, full)
        for n in range(holding.published, full):
            for manager, blocks in zip(self.managers, holding.blocks, strict=True):
                if blocks[n] != _NONE:
                    manager.pool.publish(blocks[n], keys[n])
        holding.published = max(holding.published, full)

    def keys(self, holding: Holding, tokens: Sequence[int], start: int, stop: int) -> list[bytes]:
        """Keys of the blocks that the tokens from `start` to `stop` lie in and that all fill."""
        first, last = start // KV_BLOCK, min(blocks_of(stop), len(tokens) // KV_BLOCK)
        return self._chain(holding, tokens, last)[first:last]

    def _chain(self, holding: Holding, tokens: Sequence[int], count: int) -> list[bytes]:
        """Keys of the first blocks: each hashes the one before and its own tokens."""
        keys = holding.keys
        for start in range(len(keys) * KV_BLOCK, count * KV_BLOCK, KV_BLOCK):
            own = array("i", tokens[start : start + KV_BLOCK]).tobytes()
            keys.append(blake2b((keys[-1] if keys else b"") + own, digest_size=16).digest())
        return keys

    def reuse(self, holding: Holding, tokens: int) -> int:
        """Keep the first tokens of a sequence, or fewer where blocks are gone; gives how many.

        Of a block that others hold too, all tokens are kept or none.
        """
        before = -1
        while before != tokens:
            before = tokens
            for manager, blocks in zip(self.managers, holding.blocks, strict=True):
                tokens = manager.reusable(blocks, tokens)
            if any(pool.shared(block) for pool, block in self._begun(holding, tokens)):
                tokens -= tokens % KV_BLOCK
        for pool, block in self._begun(holding, tokens):
            pool.forget(block)
        for manager, blocks in zip(self.managers, holding.blocks, strict=True):
            manager.cut(blocks, tokens)
        full = tokens // KV_BLOCK
        del holding.keys[full:]
        holding.published = min(holding.published, full)
        return tokens

    def _begun(self, holding: Holding, tokens: int) -> list[tuple[BlockPool, int]]:
        """The blocks that the first tokens end in, and the next ones are written to."""
        at = tokens // KV_BLOCK
        if not tokens % KV_BLOCK:
            return []
        both = zip(self.managers, holding.blocks, strict=True)
        return [(m.pool, b[at]) for m, b in both if at < len(b) and b[at] != _NONE]

    def forget(self, holding: Holding) -> None:
        """Have nobody find what a sequence holds."""
        for manager, blocks in zip(self.managers, holding.blocks, strict=True):
            for block in blocks:
                if block != _NONE:
                    manager.pool.forget(block)

    def release(self, holding: Holding) -> None:
        """Give back all that a sequence holds."""
        self.settle(holding)
        for manager, blocks in zip(self.managers, holding.blocks, strict=True):
            manager.cut(blocks, 0)
        holding.published = 0


def _count(blocks: list[int]) -> int:
    return len(blocks) - blocks.count(_NONE)
