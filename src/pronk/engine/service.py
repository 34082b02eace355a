"""A thread that owns the engine; other threads submit requests and are told of their events."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pronk.engine.engine import Engine
from pronk.engine.request import Constraint, Event, Request
from pronk.engine.stats import Stats
from pronk.errors import PronkError
from pronk.spec import SamplingParams

__all__ = ["Service", "UnavailableError"]

T = TypeVar("T")
OnEvent = Callable[[Event], object]


class UnavailableError(PronkError):
    """The service takes no more requests: it drains or is closed."""


class Service:
    """Runs an engine on a thread of its own, until `close`. All methods are thread-safe.

    Parameters
    ----------
    engine : Engine
        No other thread may touch it until the service is closed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._listeners: dict[int, OnEvent] = {}
        self._lock = threading.Lock()
        self._open = True  # to new requests
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="pronk-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_event: OnEvent,
        *,
        priority: int = 0,
        session: str | None = None,
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a prompt and return its handle.

        Parameters
        ----------
        prompt : sequence of int
        params : SamplingParams
            Its stop strings are the caller's to watch for: the engine knows no text.
        on_event : callable
            Called on the engine's thread with each `Event`, and so must be quick
            (``loop.call_soon_threadsafe``); it may be called before this returns. The last
            event, and only that, has a ``finish_reason``. What it raises aborts the request.
        priority : int
            Higher ones are served earlier and are preempted later.
        session : str, optional
            Keep keys and values under this name; see `Engine.add`.
        constraint : Constraint, optional

        Raises
        ------
        RequestError
            If the prompt is empty, too long for the context, or holds an unknown id.
        UnavailableError
            If the service drains or is closed.
        """
        request = self._engine.request(
            prompt, params, session=session, priority=priority, constraint=constraint
        )
        return self._submit(request, on_event)

    def embed(self, ids: Sequence[int]) -> Future[NDArray[np.float32]]:
        """The mean of the tokens' last hidden states (after the final norm), float32 [hidden].

        It shares the steps with other requests. Cancelling the future ends the work.

        Raises
        ------
        RequestError, UnavailableError
            As `submit`.
        """
        future: Future[NDArray[np.float32]] = Future()

        def on_event(event: Event) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if event.embedding is not None:
                future.set_result(event.embedding)
            else:
                future.set_exception(event.error or PronkError("the request was aborted"))

        handle = self._submit(self._engine.embedding_request(ids), on_event)
        future.add_done_callback(lambda f: self.cancel(handle) if f.cancelled() else None)
        return future

    def _submit(self, request: Request, on_event: OnEvent) -> int:
        def enqueue() -> None:
            self._listeners[request.id] = on_event
            self._engine.enqueue(request)

        with self._lock:
            if not self._open:
                raise UnavailableError("the engine takes no more requests: it is being stopped")
            self._idle.clear()
            self._inbox.put(enqueue)
        return request.id

    def cancel(self, handle: int) -> None:
        """End a request before the next step, with an event ``"abort"``; if it ended, nothing."""
        self._inbox.put(lambda: self._abort(handle))

    def _abort(self, handle: int) -> None:
        if handle in self._listeners:
            self._engine.abort(handle)
            self._tell(Event(handle, None, "abort"))

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run a function on the engine's thread, between two steps: requests wait for it.

        Raises
        ------
        UnavailableError
            If the service is closed.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self._engine))
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            if self._closed:
                raise UnavailableError("the engine is stopped")
            self._inbox.put(run)
        return future

    def stats(self) -> Stats:
        """Figures of about now; the engine is not asked to wait."""
        return self._engine.stats()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those there are; whether all ended in the time."""
        with self._lock:
            self._open = False
        return self._idle.wait(timeout)

    @property
    def closed(self) -> bool:
        """Whether the engine is the caller's again."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Abort what runs and end the thread; the engine is the caller's again."""
        with self._lock:
            self._open = False
            if not self._closed:
                self._closed = True
                self._inbox.put(lambda: None)  # wakes the thread
        self._thread.join()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a fault of the engine's own: nobody may wait for ever
            with self._lock:
                self._open, self._closed = False, True
            while not self._inbox.empty():
                with contextlib.suppress(Exception):  # the others must hear of it too
                    self._take(wait=False)
            failed = PronkError(f"the engine has stopped: {error!r}")
            for handle in list(self._listeners):
                with contextlib.suppress(Exception):  # a listener's own fault
                    self._listeners.pop(handle)(Event(handle, None, "error", failed))
            raise
        finally:
            self._idle.set()

    def _serve(self) -> None:
        engine = self._engine
        while not self._closed:
            self._take(wait=not engine.busy)
            if engine.busy:
                try:
                    events = engine.step()
                except BaseException as error:
                    events = engine.fail(error)
                for event in events:
                    self._tell(event)
            if not self._listeners:
                self._rest()
        self._take(wait=False)
        for handle in list(self._listeners):
            self._abort(handle)

    def _take(self, wait: bool) -> None:
        """Do what others have asked for."""
        with contextlib.suppress(Empty):
            while True:
                self._inbox.get(wait)()
                wait = False

    def _tell(self, event: Event) -> None:
        listener = self._listeners.get(event.request_id)
        if listener is None:
            return
        if event.finish_reason:
            del self._listeners[event.request_id]
        try:
            listener(event)
        except Exception:  # its caller is gone
            self._listeners.pop(event.request_id, None)
            self._engine.abort(event.request_id)

    def _rest(self) -> None:
        with self._lock:
            if self._inbox.empty():
                self._idle.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
