"""Who runs in the next step: decodes first, then prompts in chunks, under a token budget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pronk.engine.blocks import KvBlocks
from pronk.engine.request import Request
from pronk.engine.speculate import Candidate, Speculator

__all__ = ["Scheduler", "Share"]


@dataclass(frozen=True, slots=True)
class Share:
    """A request's part of a step: so many of its pending tokens, and drafted ones behind them."""

    request: Request
    count: int
    draft: list[int]

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.request.computed + self.count + len(self.draft)


class Scheduler:
    """First come, first served; prefill chunks and decodes share a step.

    A request is admitted when the KV pools can hold its longest outcome, so no running request is
    ever out of blocks.

    Parameters
    ----------
    kv : KvBlocks
    max_tokens, max_sequences : int
        Most of either in a step.
    speculator : Speculator, optional
        Drafts for the requests that decode.
    """

    def __init__(
        self,
        kv: KvBlocks,
        max_tokens: int,
        max_sequences: int,
        speculator: Speculator | None = None,
    ) -> None:
        self.kv = kv
        self.speculator = speculator
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            request = self.waiting[0]
            if not self.kv.promise(request.holding, request.max_length):
                return
            self.running.append(self.waiting.popleft())

    def schedule(self) -> list[Share]:
        """Choose the requests of the next step, and how many tokens of each."""
        self._admit()
        budget = self.max_tokens
        # A decode never waits behind a prompt.
        decodes = [r for r in self.running if r.pending == 1][:budget]
        prompts = [r for r in self.running if r.pending > 1]
        budget -= len(decodes)
        drafts = self._drafts(decodes, budget, alone=not prompts)
        budget -= sum(map(len, drafts))
        chosen = [Share(r, 1, draft) for r, draft in zip(decodes, drafts, strict=True)]
        for request in prompts:
            count = min(request.pending, budget)
            if count == 0:
                break
            chosen.append(Share(request, count, []))
            budget -= count
        for share in chosen:
            self.kv.move(share.request.holding, share.request.computed, share.stop)
        return chosen

    def _drafts(self, decodes: list[Request], budget: int, alone: bool) -> list[list[int]]:
        if self.speculator is None or not decodes:
            return [[] for _ in decodes]
        candidates = [
            # The step gives one token beyond its draft.
            Candidate(r.lookup, r.tokens, r.max_length - len(r.tokens) - 1)
            for r in decodes
        ]
        # Prompts are not to starve beside drafts.
        return self.speculator.plan(candidates, budget if alone else budget // 2, alone)

    def remove(self, request: Request) -> None:
        """Take a request out of the queues; its blocks stay with it."""
        if request in self.running:
            self.running.remove(request)
            self.kv.settle(request.holding)
        else:
            self.waiting.remove(request)
