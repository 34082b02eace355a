"""Who runs in the next step: decodes first, then prompts in chunks, under a token budget."""

from __future__ import annotations

from collections import deque

from pronk.engine.blocks import GlobalBlocks
from pronk.engine.request import Request

__all__ = ["Scheduler"]


class Scheduler:
    """First come, first served; prefill chunks and decodes share a step.

    A request is admitted when the pool can hold its longest outcome, so no running request is
    ever out of blocks.
    """

    def __init__(self, manager: GlobalBlocks, max_tokens: int, max_sequences: int) -> None:
        self.manager = manager
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def available(self) -> int:
        """Free blocks that are not promised to a running request."""
        promised = sum(r.reserved - len(r.blocks) for r in self.running)
        return self.manager.pool.free - promised

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            request = self.waiting[0]
            request.reserved = self.manager.needed(request.max_length)
            if request.reserved - len(request.blocks) > self.available():
                return
            self.running.append(self.waiting.popleft())

    def schedule(self) -> list[tuple[Request, int]]:
        """Choose the requests of the next step and how many pending tokens of each."""
        self._admit()
        budget = self.max_tokens
        chosen: list[tuple[Request, int]] = []
        # The fewest pending first: a decode never waits behind a prompt. Sorting is stable.
        for request in sorted(self.running, key=lambda r: r.pending > 1):
            count = min(request.pending, budget)
            if count == 0:
                break
            self.manager.grow(request.blocks, request.computed + count)
            chosen.append((request, count))
            budget -= count
        return chosen

    def remove(self, request: Request) -> None:
        """Take a request out of the queues; its blocks stay with it."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
