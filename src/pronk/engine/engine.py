"""The engine: requests go in, steps run, tokens come out. It knows ids, never text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pronk.engine.blocks import KvBlocks
from pronk.engine.request import Event, Request
from pronk.engine.runner import Runner
from pronk.engine.sampler import Sampler
from pronk.engine.scheduler import Scheduler, Share
from pronk.engine.speculate import Lookup, Speculator
from pronk.errors import PronkError, RequestError
from pronk.graph.kv import blocks_of
from pronk.graph.pack import KV_BLOCK
from pronk.spec import SamplingParams

__all__ = ["Engine"]


class Engine:
    """Runs any number of requests over one runner. Not thread-safe: one thread owns it.

    Parameters
    ----------
    runner : Runner
    eos_ids : frozenset of int
        Tokens that end a request unless it ignores them.
    speculate : bool
        Draft tokens that repeat earlier ones. It changes how many steps are taken, and no token.
    """

    def __init__(self, runner: Runner, eos_ids: frozenset[int], *, speculate: bool = False) -> None:
        limits = runner.program.limits
        self.runner = runner
        self.eos_ids = eos_ids
        # A request that the whole pool cannot hold would wait for ever.
        self.context = min(limits.context, blocks_of(limits.kv_tokens or limits.context) * KV_BLOCK)
        self.kv = KvBlocks(runner.program.kv_pools, limits.max_tokens)
        self.speculator = Speculator() if speculate else None
        self.scheduler = Scheduler(
            self.kv, limits.max_tokens, limits.max_sequences, self.speculator
        )
        self._requests: dict[int, Request] = {}
        self._sessions: dict[str, Request] = {}
        self._events: list[Event] = []
        self._next_id = 0

    @property
    def speculate(self) -> bool:
        """Whether tokens are drafted; may be set at any time."""
        return self.scheduler.speculator is not None

    @speculate.setter
    def speculate(self, on: bool) -> None:
        self.speculator = self.speculator or (Speculator() if on else None)
        self.scheduler.speculator = self.speculator if on else None

    def add(self, prompt: Sequence[int], params: SamplingParams, session: str | None = None) -> int:
        """Queue a prompt and return its request id.

        Parameters
        ----------
        prompt : sequence of int
        params : SamplingParams
        session : str, optional
            Keep the keys and values under this name when the request ends, and start from what
            the last request of the name shares with this prompt.

        Raises
        ------
        RequestError
            If the prompt is empty, too long for the context, or holds an unknown id.
        """
        tokens = list(prompt)
        self.check(tokens)
        if len(tokens) >= self.context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, but the context holds {self.context} with "
                "at least one for the answer: shorten the prompt or raise --context"
            )
        vocab = self.runner.program.spec.vocab_size
        longest = self.context if params.max_tokens is None else len(tokens) + params.max_tokens
        request = Request(
            id=self._next_id,
            tokens=tokens,
            max_length=min(longest, self.context),
            params=params,
            sampler=Sampler(params, tokens, vocab),
            holding=self.kv.hold(),
            session=session,
            lookup=Lookup() if self.speculator else None,
        )
        if session is not None and session in self._sessions:
            self._continue(request, self._sessions.pop(session))
        self._next_id += 1
        self._requests[request.id] = request
        self.scheduler.waiting.append(request)
        return request.id

    def check(self, tokens: Sequence[int]) -> None:
        """Raise RequestError for an empty prompt or an id outside the vocabulary."""
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        vocab = self.runner.program.spec.vocab_size
        for token in tokens:
            if not 0 <= token < vocab:
                raise RequestError(f"token id {token} is not in the vocabulary of {vocab}")

    def _continue(self, request: Request, old: Request) -> None:
        """Start from the keys and values of the common prefix, as far as they are there."""
        # The last prompt token is always computed anew: its logits are needed.
        limit = min(old.computed, len(request.tokens) - 1)
        shared = 0
        while shared < limit and old.tokens[shared] == request.tokens[shared]:
            shared += 1
        request.holding = old.holding
        request.computed = self.kv.reuse(request.holding, shared)

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
            self._step()
        events, self._events = self._events, []
        return events

    def _step(self) -> None:
        chosen = self._choose()
        if not chosen:
            return
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[tuple[int, int, Share]] = []  # place in the draft, row, whose
        for index, share in enumerate(chosen):
            request, start = share.request, share.request.computed
            ids += request.tokens[start : start + share.count]
            if share.count == request.pending:
                first = len(ids) - 1
                wanted += [(place, first + place, share) for place in range(len(share.draft) + 1)]
            ids += share.draft
            positions += range(start, share.stop)
            sequences += [index] * (share.stop - start)
        self.runner.run(ids, positions, sequences, [s.request.holding.blocks for s in chosen])
        # Requests move on only now: one whose step was interrupted repeats it.
        for share in chosen:
            if share.count < share.request.pending:
                share.request.computed += share.count
        decodes = len(wanted) == len(ids)
        self._draw(wanted)
        if self.speculator:
            self.speculator.drafted += sum(len(share.draft) for share in chosen)
            if decodes:
                self.speculator.cost.observe(len(ids), self.runner.seconds)

    def _choose(self) -> list[Share]:
        chosen = self.scheduler.schedule()
        if not chosen and self.scheduler.waiting:
            # Nothing runs: kept sessions, and what others in line took over from one, hold the
            # blocks that the first waits for.
            self.drop_sessions()
            for request in islice(self.scheduler.waiting, 1, None):
                self.kv.release(request.holding)
                request.computed = 0
            chosen = self.scheduler.schedule()
            if not chosen:
                raise RequestError("the KV pool is in use by logits: take or close them first")
        return chosen

    def _draw(self, wanted: list[tuple[int, int, Share]]) -> None:
        """Draw tokens in order; where a draft fails, what it has behind that is never computed."""
        wanted.sort(key=lambda row: row[0])
        at_once = self.runner.program.limits.max_rows
        done: set[int] = set()
        while wanted:
            part, wanted = wanted[:at_once], wanted[at_once:]
            rows = [row for _, row, _ in part]
            logits = self.runner.head(rows, [s.request.sampler.keep for _, _, s in part])
            for (place, _, share), values in zip(part, logits, strict=True):
                if share.request.id not in done and not self._emit(share, place, values):
                    done.add(share.request.id)
            wanted = [row for row in wanted if row[2].request.id not in done]

    def _emit(self, share: Share, place: int, logits: NDArray[np.float32]) -> bool:
        """Draw a request's next token; whether it is the drafted one, so that another follows."""
        request, draft = share.request, share.draft
        try:
            sample = request.sampler.sample(logits)
        except PronkError as error:
            request.session = None  # its keys and values are as bad
            self._finish(request)
            self._events.append(Event(request.id, None, "error", error))
            return False
        request.tokens.append(sample.token)
        request.computed = len(request.tokens) - 1
        reason = None
        if sample.token in self.eos_ids and not request.params.ignore_eos:
            reason = "stop"
        elif len(request.tokens) >= request.max_length:
            reason = "length"
        self._events.append(Event(request.id, sample, reason))
        hit = place < len(draft) and draft[place] == sample.token
        if self.speculator:
            self.speculator.accepted += hit
        if reason:
            self._finish(request)
        return hit and reason is None

    def _finish(self, request: Request) -> None:
        self.scheduler.remove(request)
        del self._requests[request.id]
        if request.session is None:
            self.kv.release(request.holding)
        else:
            self.drop_session(request.session)
            self._sessions[request.session] = request

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
        for session in list(self._sessions):
            self.drop_session(session)

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
        self.check(tokens)
        if len(tokens) > self.context:
            raise RequestError(f"{len(tokens)} tokens do not fit the context of {self.context}")
        return self._logits(tokens, first, endings)

    def _logits(
        self, tokens: Sequence[int], first: int, endings: Iterable[Sequence[int]] | None
    ) -> Iterator[NDArray[np.float32]]:
        self.drop_sessions()
        holding = self.kv.hold()
        at_once = self.scheduler.max_tokens
        most = len(tokens) if endings is None else min(len(tokens) + at_once, self.context)
        if not self.kv.promise(holding, most):
            raise RequestError("the KV pool is in use by running requests: wait for them to end")

        def run(part: Sequence[int], start: int) -> NDArray[np.float32]:
            n = len(part)
            positions = list(range(start, start + n))
            rows = list(range(max(0, first - start), n))
            self.kv.move(holding, start, start + n)
            return self.runner.step(list(part), positions, [0] * n, [holding.blocks], rows)

        try:
            for start in range(0, len(tokens), at_once):
                logits = run(tokens[start : start + at_once], start)
                if len(logits):
                    yield logits
            for ending in endings or ():
                self.check(ending)
                if len(ending) > most - len(tokens):
                    raise RequestError(
                        f"{len(ending)} tokens after {len(tokens)} do not fit a step of {at_once} "
                        f"or the context of {self.context}"
                    )
                yield run(ending, len(tokens))  # over the keys and values of the ending before
        finally:
            self.kv.release(holding)
