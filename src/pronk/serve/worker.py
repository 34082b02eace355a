"""An `Engine` on a thread of its own, as the server asks for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from pronk.engine.engine import Engine
from pronk.engine.request import Constraint, Event
from pronk.engine.sampler import Sample, Sampler
from pronk.engine.stats import PoolStats, Stats
from pronk.errors import PronkError, RequestError
from pronk.spec import SamplingParams

__all__ = ["EngineThread"]


class Constrained:
    """A sampler whose tokens a constraint allows."""

    def __init__(self, sampler: Sampler, constraint: Constraint) -> None:
        self._sampler, self._constraint = sampler, constraint

    def sample(self, logits: NDArray[np.float32]) -> Sample:
        """The next token. Drafts are sampled in order too, so none needs taking back."""
        bits = self._constraint.mask().view(np.uint8)
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(np.bool_)
        sample = self._sampler.sample(np.where(allowed, logits, np.float32(-np.inf)))
        self._constraint.accept(sample.token)
        return sample


class EngineThread:
    """Runs an engine's steps while there is work; commands are carried out between steps.

    Parameters
    ----------
    engine : Engine
        From here on, nothing else may use it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, tuple[int, Callable[[Event], object]]] = {}
        self._numbers: dict[int, int] = {}  # the engine's, by ours
        self._next = 0
        self._lock = threading.Lock()
        self._steps = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pronk-engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        """Most tokens of one sequence."""
        return self._engine.context

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        listener: Callable[[Event], object],
        *,
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a prompt; refusals come as an event too. Gives the request's number."""
        with self._lock:
            number = self._next
            self._next += 1

        def add() -> None:
            try:
                request = self._engine.add(prompt, params)
            except PronkError as error:
                listener(Event(number, None, "error", error))
                return
            if constraint is not None:
                held = self._engine._requests[request]
                held.sampler = Constrained(held.sampler, constraint)  # type: ignore[assignment]
            self._listeners[request] = number, listener
            self._numbers[number] = request

        self._commands.put(add)
        return number

    def cancel(self, request: int) -> None:
        """End a request before the next step; nothing more is heard of it."""

        def abort() -> None:
            number = self._numbers.pop(request, None)
            if number is not None:
                del self._listeners[number]
                self._engine.abort(number)

        self._commands.put(abort)

    def embed(self, ids: Sequence[int]) -> Future[NDArray[np.float32]]:
        """Not here."""
        raise RequestError("this engine gives no embeddings")

    def stats(self) -> Stats:
        """How it is doing; counts may be of different moments."""
        engine, kv = self._engine, self._engine.kv
        speculator = engine.speculator
        held = kv.num_blocks - kv.free
        return Stats(
            running=len(engine.scheduler.running),
            waiting=len(engine.scheduler.waiting) + self._commands.qsize(),
            pools=(PoolStats("global", kv.num_blocks, held, 0, kv.free),),
            drafted_tokens=speculator.drafted if speculator else 0,
            accepted_tokens=speculator.accepted if speculator else 0,
            steps=self._steps,
        )

    def close(self) -> None:
        """End all requests, and the thread."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._obey(wait=not self._engine.busy):
            if not self._engine.busy:
                continue
            try:
                events = self._engine.step()
            except Exception as error:
                self._fail(error)
                continue
            self._steps += 1
            for event in events:
                self._tell(event)

    def _obey(self, wait: bool) -> bool:
        """Carry out what was asked; whether to go on."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _tell(self, event: Event) -> None:
        found = self._listeners.get(event.request_id)
        if found is None:
            return
        number, listener = found
        if event.finish_reason is not None:
            del self._listeners[event.request_id]
            del self._numbers[number]
        listener(event)

    def _fail(self, error: Exception) -> None:
        """A step failed: every request in it ends with the error."""
        known = error if isinstance(error, PronkError) else PronkError(f"a step failed: {error}")
        for request in list(self._listeners):
            self._engine.abort(request)
            self._tell(Event(request, None, "error", known))
