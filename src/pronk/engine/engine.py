"""The engine: requests go in, steps run, tokens come out. It knows ids, never text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.engine.blocks import KvBlocks
from pronk.engine.logits import check_tokens, run_logits
from pronk.engine.request import Constraint, Event, Request
from pronk.engine.runner import Runner
from pronk.engine.sampler import Sampler
from pronk.engine.scheduler import Scheduler, Share
from pronk.engine.speculate import Lookup, Speculator
from pronk.engine.stats import Counters, Stats, stats_of
from pronk.errors import PronkError, RequestError
from pronk.graph.kv import blocks_of
from pronk.graph.pack import KV_BLOCK
from pronk.spec import SamplingParams

__all__ = ["Engine"]

_POOLED = 32  # hidden states that are taken at a time


class Engine:
    """Runs any number of requests over one runner. Not thread-safe: one thread owns it.

    Parameters
    ----------
    runner : Runner
    eos_ids : frozenset of int
        Tokens that end a request unless it ignores them.
    speculate : bool
        Draft tokens that repeat earlier ones. It changes how many steps are taken, and no token.
    target_tpot : float, optional
        Seconds a step may take while requests decode: prompts get smaller parts of it, so that
        each output token comes in about this time.
    """

    def __init__(
        self,
        runner: Runner,
        eos_ids: frozenset[int],
        *,
        speculate: bool = False,
        target_tpot: float | None = None,
    ) -> None:
        limits = runner.program.limits
        self.runner = runner
        self.eos_ids = eos_ids
        # A request that the whole pool cannot hold would wait for ever.
        self.context = min(limits.context, blocks_of(limits.kv_tokens or limits.context) * KV_BLOCK)
        self.kv = KvBlocks(runner.program.kv_pools, limits.max_tokens)
        self.speculator = Speculator() if speculate else None
        self.scheduler = Scheduler(
            self.kv, limits.max_tokens, limits.max_sequences, self.speculator, self._drop_oldest
        )
        self.scheduler.pace.target = target_tpot
        self.counters = Counters()
        self._requests: dict[int, Request] = {}
        self._sessions: dict[str, Request] = {}  # the least recently used first
        self._events: list[Event] = []
        self._chosen: list[Share] = []  # of a step that has not ended
        self._ids = count()

    @property
    def speculate(self) -> bool:
        """Whether tokens are drafted; may be set at any time."""
        return self.scheduler.speculator is not None

    @speculate.setter
    def speculate(self, on: bool) -> None:
        self.speculator = self.speculator or (Speculator() if on else None)
        self.scheduler.speculator = self.speculator if on else None

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        session: str | None = None,
        *,
        priority: int = 0,
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a prompt and return its request id.

        Parameters
        ----------
        prompt : sequence of int
        params : SamplingParams
        session : str, optional
            Keep the keys and values under this name when the request ends, and start from what
            the last request of the name shares with this prompt, to the token. (What full blocks
            hold, any prompt that begins alike starts from, while they are not needed.)
        priority : int
            Higher ones go ahead in line, are served earlier and preempted later.
        constraint : Constraint, optional
            What the tokens must keep to.

        Raises
        ------
        RequestError
            If the prompt is empty, too long for the context, or holds an unknown id.
        """
        request = self.request(
            prompt, params, session=session, priority=priority, constraint=constraint
        )
        self.enqueue(request)
        return request.id

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        session: str | None = None,
        priority: int = 0,
        constraint: Constraint | None = None,
    ) -> Request:
        """What `add` queues, checked; any thread may ask for it."""
        tokens = list(prompt)
        self.check(tokens)
        if len(tokens) >= self.context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, but the context holds {self.context} with "
                "at least one for the answer: shorten the prompt or raise --context"
            )
        vocab = self.runner.program.spec.vocab_size
        longest = self.context if params.max_tokens is None else len(tokens) + params.max_tokens
        return Request(
            id=next(self._ids),
            tokens=tokens,
            max_length=min(longest, self.context),
            params=params,
            sampler=Sampler(params, tokens, vocab),
            holding=self.kv.hold(),
            session=session,
            priority=priority,
            constraint=constraint,
            lookup=Lookup() if self.speculator else None,
        )

    def embedding_request(self, tokens: Sequence[int], priority: int = 0) -> Request:
        """A request for the mean of the tokens' last hidden states; any thread may ask for it.

        Its one event has the ``embedding``.

        Raises
        ------
        RequestError
            If there are no tokens, more than the context holds, or an unknown id.
        """
        tokens = self._fitting(tokens)
        return Request(
            id=next(self._ids),
            tokens=tokens,
            max_length=len(tokens),
            params=SamplingParams(),
            sampler=None,
            holding=self.kv.hold(),
            priority=priority,
            hidden=np.zeros(self.runner.program.spec.hidden_size),
        )

    def enqueue(self, request: Request) -> None:
        """Put a request in line."""
        if request.session is not None and request.session in self._sessions:
            self._continue(request, self._sessions.pop(request.session))
        request.added = time.perf_counter()
        self._requests[request.id] = request
        self.scheduler.add(request)

    def check(self, tokens: Sequence[int]) -> None:
        """Raise RequestError for an empty prompt or an id outside the vocabulary."""
        check_tokens(tokens, self.runner.program.spec.vocab_size)

    def _continue(self, request: Request, old: Request) -> None:
        """Start from the keys and values of the common prefix, as far as they are there."""
        # The last prompt token is always computed anew: its logits are needed.
        limit = min(old.computed, len(request.tokens) - 1)
        shared = 0
        while shared < limit and old.tokens[shared] == request.tokens[shared]:
            shared += 1
        request.holding = old.holding
        request.computed = request.cached = self.kv.reuse(request.holding, shared)

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running, or a step has more to tell."""
        return bool(self._requests or self._events)

    def step(self) -> list[Event]:
        """Run one step and return the tokens it produced, those of a request in their order.

        A request whose logits cannot be sampled ends with an error in its event; others go on.

        Raises
        ------
        RequestError
            If all that waits needs blocks that an unfinished `logits` holds.
        """
        if not self._events:  # else what an interrupted step had produced
            start, tokens = time.perf_counter(), self._step()
            if tokens:
                seconds = time.perf_counter() - start
                self.scheduler.pace.observe(tokens, seconds)
                self.counters.observe(tokens, seconds)
        events, self._events = self._events, []
        return events

    def _step(self) -> int:
        """Run one step; gives how many tokens it had."""
        self._chosen = chosen = self._choose()
        if not chosen:
            return 0
        now = time.perf_counter()
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[tuple[int, int, Share]] = []  # place in the draft, row, whose
        pooled: list[tuple[int, Share, bool]] = []  # first row, whose, whether all is done then
        for index, share in enumerate(chosen):
            request, start = share.request, share.request.computed
            request.begun = request.begun or now
            if request.sampler is None:
                pooled.append((len(ids), share, share.count == request.pending))
            ids += request.tokens[start : start + share.count]
            if share.count == request.pending and request.sampler:
                first = len(ids) - 1
                wanted += [(place, first + place, share) for place in range(len(share.draft) + 1)]
            ids += share.draft
            positions += range(start, share.stop)
            sequences += [index] * (share.stop - start)
        self.runner.run(ids, positions, sequences, [s.request.holding.blocks for s in chosen])
        # Requests move on only now: one whose step was interrupted repeats it.
        self.counters.prompt_tokens += sum(s.count for s in chosen if s.request.pending > 1)
        for share in chosen:
            if share.count < share.request.pending:
                share.request.computed += share.count
        self._pool(pooled)
        decodes = len(wanted) == len(ids)
        self._draw(wanted)
        for share in chosen:
            if share.request.id in self._requests:
                self.kv.publish(share.request.holding, share.request.tokens, share.request.computed)
        if self.speculator:
            self.speculator.drafted += sum(len(share.draft) for share in chosen)
            if decodes:
                self.speculator.cost.observe(len(ids), self.runner.seconds)
        self._chosen = []
        return len(ids)

    def _choose(self) -> list[Share]:
        chosen = self.scheduler.schedule()
        if not chosen and self.scheduler.waiting:
            # The last that ran gave way: now there may be room for the first in line.
            chosen = self.scheduler.schedule()
            if not chosen:
                raise RequestError("the KV pool is in use by logits: take or close them first")
        return chosen

    def _pool(self, pooled: list[tuple[int, Share, bool]]) -> None:
        """Add up the hidden states of those who asked for them."""
        for first, share, done in pooled:
            request = share.request
            assert request.hidden is not None
            # One row after the other, so that the sum is the same however they are cut; a few at a
            # time, so that copies of a whole step are never there.
            for start in range(0, share.count, _POOLED):
                for row in self.runner.hidden(first + start, min(_POOLED, share.count - start)):
                    request.hidden += row
            if done:
                mean = (request.hidden / len(request.tokens)).astype(np.float32)
                request.computed = len(request.tokens)
                self._finish(request)
                self._events.append(Event(request.id, None, "stop", embedding=mean))

    def _draw(self, wanted: list[tuple[int, int, Share]]) -> None:
        """Draw tokens in order; where a draft fails, what it has behind that is never computed."""
        wanted.sort(key=lambda row: row[0])
        at_once = self.runner.program.limits.max_rows
        done: set[int] = set()
        while wanted:
            part, wanted = wanted[:at_once], wanted[at_once:]
            rows = [row for _, row, _ in part]
            logits = self.runner.head(rows, [share.request.keep for _, _, share in part])
            for (place, _, share), values in zip(part, logits, strict=True):
                if share.request.id not in done and not self._emit(share, place, values):
                    done.add(share.request.id)
            wanted = [row for row in wanted if row[2].request.id not in done]

    def _emit(self, share: Share, place: int, logits: NDArray[np.float32]) -> bool:
        """Draw a request's next token; whether it is the drafted one, so that another follows."""
        request, draft = share.request, share.draft
        constraint, counters = request.constraint, self.counters
        assert request.sampler is not None
        try:
            mask = None if constraint is None else constraint.mask()
            sample = request.sampler.sample(logits, mask)
            if constraint is not None:
                constraint.accept(sample.token)
        except Exception as error:  # a constraint's may be any
            self._fail(request, error)
            return False
        if not request.told:
            counters.prefix_queries += len(request.tokens)
            counters.prefix_hits += request.cached
        request.told = True
        counters.generated_tokens += 1
        request.tokens.append(sample.token)
        request.computed = len(request.tokens) - 1
        reason = None
        if sample.token in self.eos_ids and not request.params.ignore_eos:
            reason = "stop"
        elif len(request.tokens) >= request.max_length:
            reason = "length"
        self._events.append(
            Event(request.id, sample, reason, cached_tokens=request.cached, waited=request.waited)
        )
        hit = place < len(draft) and draft[place] == sample.token
        if self.speculator:
            self.speculator.accepted += hit
        if reason:
            self._finish(request)
        return hit and reason is None

    def _finish(self, request: Request, failed: bool = False) -> None:
        # First what may raise: a request that is still known can be failed and frees its blocks.
        if failed:
            self.kv.forget(request.holding)
        else:
            self.kv.publish(request.holding, request.tokens, request.computed)
        self.scheduler.remove(request)
        del self._requests[request.id]
        if request.session is None:
            self.kv.release(request.holding)
        else:
            self.drop_session(request.session)
            self._sessions[request.session] = request

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error; what it leaves in the cache is as bad."""
        request.session = None
        self._finish(request, failed=True)
        if not isinstance(error, PronkError):
            error = PronkError(f"the request failed: {error!r}")
        self._events.append(Event(request.id, None, "error", error, request.cached))

    def fail(self, error: BaseException) -> list[Event]:
        """End the requests of a step that raised, or those it could not choose from.

        What a step had produced before is among the events.
        """
        chosen = [s.request for s in self._chosen] or self.scheduler.running[:]
        for request in chosen or self.scheduler.waiting[:1]:
            if request.id in self._requests:
                self._fail(request, error)
        self._chosen = []
        events, self._events = self._events, []
        return events

    def abort(self, request_id: int) -> None:
        """End a request now; unknown or finished ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request)

    def drop_session(self, session: str) -> None:
        """Forget a session and free its blocks."""
        old = self._sessions.pop(session, None)
        if old is not None:
            self.kv.release(old.holding)

    def drop_sessions(self) -> None:
        """Forget every session."""
        while self._drop_oldest():
            pass

    def _drop_oldest(self) -> bool:
        session = next(iter(self._sessions), None)
        if session is not None:
            self.drop_session(session)
        return session is not None

    def save_session(
        self, session: str, path: Path, model: str, about: Mapping[str, Any] | None = None
    ) -> int:
        """Write a kept session to a file; gives its bytes. See `write_session`.

        Raises
        ------
        RequestError
            If no session of the name is kept.
        PronkError
            If the file cannot be written.
        """
        from pronk.engine.session_file import write_session

        kept = self._sessions.get(session)
        if kept is None:
            raise RequestError(f"there is no session {session!r}: it never was, or had to go")
        tokens = kept.tokens[: kept.computed]
        return write_session(path, tokens, kept.holding, self.runner, model, about)

    def restore_session(self, session: str, path: Path, model: str) -> int:
        """Keep what a file holds under a name; gives its tokens. See `read_session`.

        Raises
        ------
        CheckpointError
            If the file is damaged, or not of this model.
        RequestError
            If the cache has no room for it.
        """
        from pronk.engine.session_file import read_session

        tokens, holding = read_session(
            path, self.kv, self.runner, model, self.context, self.scheduler.reclaim
        )
        self.drop_session(session)
        self._sessions[session] = Request(
            id=next(self._ids),
            tokens=tokens,
            max_length=len(tokens),
            params=SamplingParams(),
            sampler=None,
            holding=holding,
            session=session,
            computed=len(tokens),
        )
        self.kv.publish(holding, tokens, len(tokens))
        return len(tokens)

    def stats(self) -> Stats:
        """Figures of about now; any thread may ask."""
        speculator = self.speculator or Speculator()
        return stats_of(self.counters, self.scheduler, speculator)

    def logits(
        self,
        tokens: Sequence[int],
        first: int = 0,
        endings: Iterable[Sequence[int]] | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """Logits of one sequence from a token on, in chunks of [<= max_tokens, vocab].

        Parameters
        ----------
        tokens : sequence of int
        first : int
            The first token whose logits are wanted; those before only fill the cache.
        endings : iterable of sequence of int
            After the tokens: what else they may be followed by. Each is asked for when the one
            before it is done, runs as if it came right behind the tokens, and gives one array
            [its length, vocab].

        Raises
        ------
        RequestError
            If there are no tokens, or more than the context or a step holds.
        """
        tokens = self._fitting(tokens)
        return run_logits(self.runner, self.scheduler, self.context, tokens, first, endings)

    def _fitting(self, tokens: Sequence[int]) -> list[int]:
        self.check(tokens)
        if len(tokens) > self.context:
            raise RequestError(f"{len(tokens)} tokens do not fit the context of {self.context}")
        return list(tokens)
