"""KV memory: one pool of fixed-size blocks, and who holds which."""

from __future__ import annotations

from pronk.graph.pack import KV_BLOCK

__all__ = ["BlockPool", "GlobalBlocks"]


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
    """The manager for layers that attend to every earlier position: a block stays until the end."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool

    @staticmethod
    def needed(tokens: int) -> int:
        """Blocks that a sequence of so many tokens fills."""
        return -(-tokens // KV_BLOCK)

    def grow(self, blocks: list[int], tokens: int) -> None:
        """Extend a sequence's block list to hold so many tokens."""
        blocks += self.pool.take(max(0, self.needed(tokens) - len(blocks)))

    def release(self, blocks: list[int]) -> None:
        """Give back all blocks of a sequence."""
        self.pool.give_back(blocks)
        blocks.clear()
