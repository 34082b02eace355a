"""A pool of KV blocks: who holds which, and what those hold that nobody does."""

from __future__ import annotations

__all__ = ["BlockPool"]


class BlockPool:
    """Hands out block numbers; lowest first, so that little memory is touched.

    Each block counts its holders.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        self._unheld: dict[int, None] = {}  # known ones, the least recently used first

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._unheld)

    @property
    def cached(self) -> int:
        """Those of the free ones that are still known."""
        return len(self._unheld)

    def take(self, count: int) -> list[int]:
        """Take blocks to write to; the caller has checked that there are enough."""
        if count > self.free:
            raise RuntimeError(f"the KV pool has {self.free} free blocks, not {count}")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._unheld))
                self.forget(block)
                self._free.pop()
            self._holders[block] = 1
            taken.append(block)
        return sorted(taken)  # neighbours are read as one stream

    def give_back(self, blocks: list[int]) -> None:
        """Hold these blocks no longer."""
        # The last first: the beginning of a sequence is of use without its end.
        for block in reversed(blocks):
            if not self._holders[block]:
                raise RuntimeError(f"block {block} was given back twice")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._unheld[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block known, unless another with the same tokens is."""
        if key not in self._known and self._keys[block] is None:
            self._known[key] = block
            self._keys[block] = key

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def hold(self, key: bytes) -> int:
        """Hold a known block too."""
        block = self._known[key]
        self._unheld.pop(block, None)
        self._holders[block] += 1
        return block

    def shared(self, block: int) -> bool:
        """Whether more than one holds a block."""
        return self._holders[block] > 1

    def forget(self, block: int) -> None:
        """Have nobody find a block any more: its holder writes to it, or it is bad."""
        key, self._keys[block] = self._keys[block], None
        if key is not None:
            del self._known[key]
            if block in self._unheld:
                del self._unheld[block]
                self._free.append(block)
