"""Who runs in the next step, and who gives way when blocks run out.

Decodes come first, one token each and what is drafted behind it; prompts share the rest of the
step. Half of it goes to the prompt that is first in line, so that none starves, and half to those
that are nearest to their first token, so that a short prompt does not wait for a long one.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, replace

from pronk.engine.blocks import KvBlocks
from pronk.engine.pace import Pace
from pronk.engine.request import Request
from pronk.engine.speculate import Candidate, Speculator

__all__ = ["Scheduler", "Share"]

_LEVEL = 256  # steps in line that a level of priority is worth: nobody waits for ever
_LEAST = 16  # tokens of prompts in a step, whatever the target


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


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


class Scheduler:
    """Continuous batching: every step chooses anew among all requests.

    A request is admitted when the KV pools can hold what it has to compute by then. When a
    running one needs a block and there is none, kept sessions give way, then what waiting
    requests hold, then the running request that is last in line: it waits again with its tokens,
    and computes their keys and values anew, unless they are still known.

    Parameters
    ----------
    kv : KvBlocks
    max_tokens, max_sequences : int
        Most of either in a step.
    speculator : Speculator, optional
        Drafts for the requests that decode.
    give_way : callable, optional
        Frees what is kept for later; whether there was any.
    """

    def __init__(
        self,
        kv: KvBlocks,
        max_tokens: int,
        max_sequences: int,
        speculator: Speculator | None = None,
        give_way: Callable[[], bool] = lambda: False,
    ) -> None:
        self.kv = kv
        self.speculator = speculator
        self.pace = Pace()
        self.max_tokens = max_tokens
        self.max_sequences = min(max_sequences, max_tokens)
        self.waiting: list[Request] = []  # in the order of their ranks, as are those that run
        self.running: list[Request] = []
        self.preemptions = 0
        self.budget = max_tokens  # of the last step
        self._give_way = give_way
        self._steps = 0

    def add(self, request: Request) -> None:
        """Put a request in line: behind who came before, ahead by its priority."""
        request.rank = (self._steps - _LEVEL * request.priority, request.id)
        insort(self.waiting, request, key=_rank)

    def remove(self, request: Request) -> None:
        """Take a request out of the queues; its blocks stay with it."""
        if request in self.running:
            self.running.remove(request)
            self.kv.settle(request.holding)
        else:
            self.waiting.remove(request)

    def schedule(self) -> list[Share]:
        """Choose the requests of the next step, and how many tokens of each."""
        self._steps += 1
        self._admit()
        chosen = []
        # Who must give way for blocks is behind who needs them, and so not yet chosen.
        for planned in sorted(self._plan(), key=lambda share: share.request.rank):
            share = self._held(planned)
            if share is not None:
                chosen.append(share)
        return chosen

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            request = self.waiting[0]
            self._extend(request)
            # A block for each that runs, so that none must give way at once.
            while not self.kv.promise(request.holding, len(request.tokens), len(self.running)):
                if not self.reclaim(1):
                    return
            insort(self.running, self.waiting.pop(0), key=_rank)

    def _extend(self, request: Request) -> None:
        if request.sampler is None:  # all its hidden states are needed
            return
        done = self.kv.extend(request.holding, request.tokens, request.computed)
        if done > request.computed and not request.preempted:
            request.cached += done - request.computed
        request.computed = done

    def reclaim(self, first: int = 0) -> bool:
        """Free what is not in use: a kept session, or what a request holds that waits.

        Those in line before the place `first` keep theirs.
        """
        if self._give_way():
            return True
        for request in reversed(self.waiting[first:]):
            if any(request.holding.blocks):
                self._empty(request)
                return True
        return False

    def _empty(self, request: Request) -> None:
        self.kv.release(request.holding)
        request.computed = 0
        if not request.preempted:
            request.cached = 0
        if request.hidden is not None:
            request.hidden[:] = 0

    def _plan(self) -> list[Share]:
        for request in self.running:
            if request.pending > 1:
                self._extend(request)
        decodes = [r for r in self.running if r.pending == 1 and r.sampler]
        prompts = [r for r in self.running if r.pending > 1 or not r.sampler]
        budget = self.max_tokens
        if decodes:
            least = len(decodes) + (_LEAST if prompts else 0)
            budget = self.pace.budget(min(least, budget), budget)
        self.budget = budget
        room = budget - len(decodes)
        drafts = self._drafts(decodes, room, alone=not prompts)
        room -= sum(map(len, drafts))
        shares = [Share(r, 1, draft) for r, draft in zip(decodes, drafts, strict=True)]
        return shares + self._divide(prompts, room)

    def _divide(self, prompts: list[Request], room: int) -> list[Share]:
        """Half for the first in line, half for who is nearest to the first token."""
        if not prompts:
            return []
        first, others = prompts[0], sorted(prompts[1:], key=lambda r: r.pending)
        counts = {id(first): min(first.pending, -(-room // 2) if others else room)}
        room -= counts[id(first)]
        coming = self._coming(first, counts[id(first)])
        for request in others:
            # What another is about to compute need not be computed twice.
            if request.sampler and coming.intersection(self._coming(request, 1)):
                continue
            counts[id(request)] = count = min(request.pending, room)
            coming |= self._coming(request, count)
            room -= count
        counts[id(first)] += min(first.pending - counts[id(first)], room)
        return [Share(r, counts[id(r)], []) for r in prompts if counts.get(id(r))]

    def _coming(self, request: Request, count: int) -> set[bytes]:
        """Keys of the full blocks that a request's next tokens lie in."""
        start = request.computed
        stop = start + count
        return set(self.kv.keys(request.holding, request.tokens, start, stop)) if count else set()

    def _drafts(self, decodes: list[Request], budget: int, alone: bool) -> list[list[int]]:
        if self.speculator is None or not decodes:
            return [[] for _ in decodes]
        candidates = [
            # The step gives one token beyond its draft.
            Candidate(r.lookup, r.tokens, r.max_length - len(r.tokens) - 1)
            for r in decodes
        ]
        # Prompts are not to starve beside drafts.
        drafts = self.speculator.plan(candidates, budget if alone else budget // 2, alone)
        return [_allowed(r, draft) for r, draft in zip(decodes, drafts, strict=True)]

    def _held(self, share: Share) -> Share | None:
        """A share once its request holds the blocks it needs; None if it must wait instead."""
        request, kv = share.request, self.kv
        if request not in self.running:
            return None
        if share.draft and not kv.fits(request.holding, request.computed, share.stop):
            share = replace(share, draft=[])
        while not kv.fits(request.holding, request.computed, share.stop):
            if not self.reclaim():
                last = self.running[-1]
                self.preempt(last)
                if last is request:
                    return None
        kv.move(request.holding, request.computed, share.stop)
        return share

    def preempt(self, request: Request) -> None:
        """Have a running request wait; its tokens and its sampler stay as they are."""
        self.remove(request)
        request.preempted = True
        self._empty(request)
        insort(self.waiting, request, key=_rank)
        self.preemptions += 1


def _allowed(request: Request, draft: list[int]) -> list[int]:
    """As much of a draft as the request's constraint takes."""
    if not draft or request.constraint is None:
        return draft
    try:
        return draft[: request.constraint.valid(draft)]
    except Exception:  # its mask, which the next token needs, will say what is wrong
        return []
