"""A model that is served: its engine's thread on one side, asyncio on the other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pronk.checkpoint.tokenizer import Tokenizer
from pronk.engine.request import Constraint, Event
from pronk.engine.service import Service
from pronk.errors import RequestError
from pronk.serve.config import ServeLimits
from pronk.serve.grammar import Form, Grammar, compile_form, grammar_tokenizer
from pronk.serve.line import Line
from pronk.spec import Budget, MemoryPlan, ModelSpec, SamplingParams

__all__ = ["Arrivals", "Hosted", "Mailbox"]

T = TypeVar("T")
_PAUSE = 0.005  # seconds between two wake-ups: nobody sees so short a time


class Mailbox:
    """Carries events from the engine's thread to the event loop.

    A wake-up takes the loop, and then the client, a good part of a small model's step, on cores
    that the engine computes on. So what comes soon after the last one waits for the next step,
    unless it is the last event of a request, or somebody waits for a first: steps with prompts
    are long.

    Parameters
    ----------
    loop : AbstractEventLoop
    line : Line
        Who waits for a first token.
    clock : callable
        Seconds, for tests.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        line: Line,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loop, self._line, self._clock = loop, line, clock
        self._items: deque[tuple[Callable[[int, Event], None], int, Event]] = deque()
        self._awake, self._woken = False, -_PAUSE

    def put(self, receiver: Callable[[int, Event], None], index: int, event: Event) -> None:
        """Called on the engine's thread."""
        self._items.append((receiver, index, event))
        if self._awake:
            return
        now = self._clock()
        if event.finish_reason is None and not self._line.waiting and now < self._woken + _PAUSE:
            return
        self._awake, self._woken = True, now
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody is left to hear
            self._items.clear()
            self._awake = False

    def _deliver(self) -> None:
        self._awake = False  # before taking: what comes now wakes the loop again
        while self._items:
            receiver, index, event = self._items.popleft()
            receiver(index, event)


class Arrivals:
    """The events of one request's generations, as they come, for one task that takes them."""

    def __init__(self) -> None:
        self._events: list[tuple[int, Event]] = []
        self._wanted: asyncio.Future[None] | None = None

    def put(self, index: int, event: Event) -> None:
        """Called on the event loop."""
        self._events.append((index, event))
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def take(self) -> list[tuple[int, Event]]:
        """What came since the last time, at least one: the generation and its event."""
        if not self._events:
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        found, self._events = self._events, []
        return found


@dataclass(slots=True)
class Hosted:
    """A model under the name that clients know it by.

    Parameters
    ----------
    name : str
    tokenizer : Tokenizer
    spec : ModelSpec
    memory : MemoryPlan
    context : int
        Most tokens of a prompt and its answer.
    engine : Service
    pool : Executor
        Threads for what takes long beside the event loop: long texts, templates, grammars.
    sequences : int
        Most requests that run at once.
    budget : Budget or None
        What the process was promised to stay within, if a bundle promises it.
    """

    name: str
    tokenizer: Tokenizer
    spec: ModelSpec
    memory: MemoryPlan
    context: int
    engine: Service
    pool: Executor
    sequences: int = 1
    budget: Budget | None = None
    created: int = 0
    warm: bool = False
    line: Line = field(default_factory=Line)
    limits: ServeLimits = field(default_factory=ServeLimits)
    mailbox: Mailbox | None = None
    words: Any = None  # the vocabulary, as forms of output need it
    lock: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, limits: ServeLimits) -> None:
        """Belong to the running event loop, within some limits."""
        self.limits = limits
        self.created = self.created or int(time.time())
        self.mailbox = Mailbox(asyncio.get_running_loop(), self.line)

    async def aside(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function on a thread beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    async def encode(self, prompt: str | Sequence[int], add_special: bool = True) -> list[int]:
        """Token ids of a text; ids are taken as they are.

        Raises
        ------
        RequestError
            If there are none, or the text is none.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt:
            raise RequestError("the prompt is empty: give some text")
        # However short it is: the tokenizer may be at work on a long one.
        return await self.aside(self.tokenizer.encode, prompt, add_special)

    async def render(
        self, messages: Sequence[Mapping[str, Any]], opening: str = "", **extra: Any
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's turn, and of how it must begin."""
        return await self.aside(self._render, messages, opening, extra)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], opening: str, extra: Mapping[str, Any]
    ) -> list[int]:
        from pronk.serve.chat import render

        if self.tokenizer.chat_template is None:
            raise RequestError(
                f"the model {self.name} has no chat template: use /v1/completions with raw text"
            )
        text = render(
            self.tokenizer.chat_template, messages,
            bos_token=self.tokenizer.bos_token, eos_token=self.tokenizer.eos_token, **extra,
        )  # fmt: skip
        # The template writes the special tokens itself.
        return self.tokenizer.encode(text + opening, add_special=False)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        arrivals: Arrivals,
        index: int,
        constraint: Constraint | None = None,
    ) -> int:
        """Queue a prompt whose events come to `arrivals` under `index`."""
        mailbox = self.mailbox
        assert mailbox is not None

        def listen(event: Event) -> None:
            mailbox.put(arrivals.put, index, event)

        return self.engine.submit(prompt, params, listen, constraint=constraint)

    async def constraints(
        self, form: Form | None, limit: int, count: int
    ) -> Sequence[Constraint | None]:
        """A form for each of some texts, compiled beside the event loop; at most `limit` bytes.

        Raises
        ------
        RequestError
            If it cannot be used.
        """
        if form is None:
            return [None] * count
        first = await self.aside(self._grammar, form, limit)
        return [first, *(first.copy() for _ in range(count - 1))]

    def _grammar(self, form: Form, limit: int) -> Grammar:
        with self.lock:
            if self.words is None:
                self.words = grammar_tokenizer(self.tokenizer, self.spec.vocab_size)
        return compile_form(form, self.words, limit)

    def read_vocabulary(self) -> None:
        """Have ready what forms of output need, so that no request waits for it."""
        with contextlib.suppress(RequestError), self.lock:  # without an end token: no forms
            self.words = grammar_tokenizer(self.tokenizer, self.spec.vocab_size)

    async def silent(self, marks: Sequence[str]) -> dict[int, bytes]:
        """Those of some marks that are tokens of no text, by their ids."""
        ids = [await self.encode(mark, add_special=False) for mark in marks]
        return {
            found[0]: mark.encode()
            for mark, found in zip(marks, ids, strict=True)
            if len(found) == 1 and not self.tokenizer.token_bytes(found[0])
        }

    def token_text(self, token: int) -> str:
        """A token's text for people: special ones by their names."""
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace") or (
            self.tokenizer.decode([token], skip_special=False)
        )
