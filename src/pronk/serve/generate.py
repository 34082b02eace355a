"""From prompts to text that arrives piece by piece, for every choice of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.engine.request import Constraint, Event
from pronk.engine.sampler import Sample
from pronk.errors import PronkError
from pronk.serve.config import ServeLimits
from pronk.serve.errors import ApiError, from_pronk
from pronk.serve.guard.filters import Chain
from pronk.serve.guard.watch import Watch
from pronk.serve.hosted import Arrivals, Hosted
from pronk.serve.metrics import Metrics
from pronk.serve.stream import TextStream
from pronk.spec import SamplingParams

__all__ = ["Delta", "Job", "Tally", "admit", "embed", "generate", "make_way", "whole"]


@dataclass(slots=True)
class Job:
    """A prompt, and how to go on from it."""

    prompt: Sequence[int]
    params: SamplingParams
    constraint: Constraint | None = None
    repeats: bool = False  # a prompt that another job has too: its tokens are counted once
    marks: Mapping[int, bytes] = field(default_factory=dict)  # tokens of no text to show as one


@dataclass(slots=True)
class Tally:
    """What a request took so far: tokens, and when.

    ``asked`` is when the engine was asked, in nanoseconds since 1970. Seconds are from then on: to
    the first step, the first token and the last one. Ends are by choice.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    choices: int = 0
    params: SamplingParams | None = None
    asked: int | None = None
    queued: float | None = None
    ttft: float | None = None
    last: float | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    def usage(self) -> dict[str, Any]:
        """As OpenAI counts."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Delta:
    """What a choice has gained: text that is certain, and the tokens behind it."""

    index: int
    text: str = ""
    samples: list[Sample] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, later: Delta) -> None:
        """Take in what the same choice gained behind it."""
        self.text += later.text
        self.samples += later.samples
        self.finish_reason = later.finish_reason


class _Choice:
    """One generation under way."""

    def __init__(
        self, model: Hosted, job: Job, metrics: Metrics, start: float, watch: Watch
    ) -> None:
        self.watch, self.guard, self.hides = watch, watch.answer(), watch.hides_tokens
        self.stream = TextStream(_shown(model, job.marks), job.params.stop)
        self.metrics, self.model = metrics.of(model.name), model
        self.job = job
        self.number = -1
        self.start = self.last = start
        self.tokens = self.timed = 0
        self.done = False

    @property
    def _new_tokens(self) -> int:
        return 0 if self.job.repeats else len(self.job.prompt)

    def submit(self, arrivals: Arrivals, index: int) -> None:
        """Hand it to the engine."""
        job, line = self.job, self.model.line
        line.enter(self._new_tokens)  # before its first token can come
        try:
            self.number = self.model.submit(job.prompt, job.params, arrivals, index, job.constraint)
        except BaseException:
            line.leave(self._new_tokens, served=False)
            raise

    def end(self) -> None:
        """Nobody waits for more of it."""
        if self.number < 0:
            return
        if not self.tokens:
            self.model.line.leave(self._new_tokens, served=False)
        if not self.done:
            self.done = True
            self.model.engine.cancel(self.number)
            self.metrics.finished("abort", self.tokens, time.perf_counter() - self.start)

    async def take(self, index: int, event: Event, now: float, tally: Tally) -> Delta:
        """Turn an event that came now into what the client sees of it."""
        sample, reason = event.sample, event.finish_reason
        if sample is None:
            self.done = True
            self.metrics.finished("error", self.tokens, now - self.start)
            raise event.error or PronkError("the request ended without a token")
        if not self.tokens:
            self.model.line.leave(self._new_tokens, served=True)
            self.metrics.first_token(now - self.start, event.waited)
            if tally.ttft is None:
                tally.queued, tally.ttft = event.waited, now - self.start
            if not self.job.repeats:
                tally.cached += event.cached_tokens
            self.last, self.timed = now, 1
        self.tokens += 1
        tally.completion += 1
        tally.last = now - self.start
        ended = reason == "stop"  # an end token is no text
        text = "" if ended else self.stream.push(sample.token)
        if self.stream.stopped:
            if reason is None:
                self.model.engine.cancel(self.number)
            reason = "stop"
        elif reason:
            text += self.stream.flush()
        if self.guard is not None:
            text = await self._guarded(self.guard, text, reason is not None)
            if self.guard.blocked:
                if event.finish_reason is None:
                    self.model.engine.cancel(self.number)
                reason = "content_filter"
        self.watch.heard(index, text)
        if reason:
            self.done = True
            tally.reasons[index] = reason
            self.metrics.finished(reason, self.tokens, now - self.start)
        return Delta(index, text, [] if ended or self.hides else [sample], reason)

    def time(self, now: float) -> None:
        """Tokens that came together count as if they had come one by one since the last."""
        if self.tokens > self.timed:
            self.metrics.next_tokens(self.tokens - self.timed, now - self.last)
            self.last, self.timed = now, self.tokens

    async def _guarded(self, guard: Chain, text: str, final: bool) -> str:
        """What the guard gives; one that asks a judge does so beside the event loop."""
        if guard.asks:
            return await self.model.aside(guard.push, text, final)
        return guard.push(text, final)


def _shown(model: Hosted, marks: Mapping[int, bytes]) -> Callable[[int], bytes]:
    """The text of a token, marks included."""
    plain = model.tokenizer.token_bytes
    return (lambda token: marks.get(token) or plain(token)) if marks else plain


async def generate(
    model: Hosted, jobs: Sequence[Job], metrics: Metrics, tally: Tally, watch: Watch
) -> AsyncGenerator[Delta]:
    """Run jobs side by side, their texts as the guard lets them pass; ending it ends them.

    Yields
    ------
    Delta
        With ``index`` the place of its job. What a job gained in one step, or while the one before
        was taken, is one.

    Raises
    ------
    ApiError
        If too many wait by now, or the engine refuses or fails one: then the others are ended too.
    """
    # Asked again, now that they are handed over at once: others came in between.
    tokens = sum(len(job.prompt) for job in jobs if not job.repeats)
    make_way(model, len(jobs), tokens, model.limits)
    arrivals = Arrivals()
    start = time.perf_counter()
    tally.asked, tally.choices, tally.params = time.time_ns(), len(jobs), jobs[0].params
    choices = [_Choice(model, job, metrics, start, watch) for job in jobs]
    try:
        for index, choice in enumerate(choices):
            choice.submit(arrivals, index)
            if not choice.job.repeats:
                tally.prompt += len(choice.job.prompt)
                choice.metrics.began(len(choice.job.prompt))
        left = len(choices)
        while left:
            gained: dict[int, Delta] = {}
            error: PronkError | None = None
            found, now = await arrivals.take(), time.perf_counter()
            for index, event in found:
                choice = choices[index]
                if choice.done:  # what a step gave it beyond a stop string
                    continue
                try:
                    delta = await choice.take(index, event, now, tally)
                except PronkError as failed:  # what came before it is told first
                    error = failed
                    break
                left -= choice.done
                if index in gained:
                    gained[index].add(delta)
                else:
                    gained[index] = delta
            for index, delta in gained.items():
                choices[index].time(now)
                yield delta
            if error is not None:
                raise error
    except PronkError as error:
        raise from_pronk(error) from error
    finally:
        for choice in choices:
            choice.end()


async def whole(deltas: AsyncGenerator[Delta], count: int) -> list[Delta]:
    """All of each choice, as one delta each."""
    parts: list[list[str]] = [[] for _ in range(count)]
    out = [Delta(index, "") for index in range(count)]
    async with aclosing(deltas):
        async for delta in deltas:
            parts[delta.index].append(delta.text)
            out[delta.index].samples += delta.samples
            out[delta.index].finish_reason = delta.finish_reason
    for delta, texts in zip(out, parts, strict=True):
        delta.text = "".join(texts)
    return out


def admit(model: Hosted, prompts: Sequence[Sequence[int]], count: int, limits: ServeLimits) -> None:
    """Refuse at once what could not be served.

    Raises
    ------
    ApiError
        400 for a prompt that is empty or too long, or too many texts; 503 if it would wait with
        too many others, or for too long.
    """
    texts = len(prompts) * count
    if texts > limits.completions:
        raise ApiError(
            400, f"the request asks for {texts} texts, of at most {limits.completions}: lower n "
            "or send fewer prompts", "invalid_value", "n",
        )  # fmt: skip
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "the prompt is empty: give some text", "invalid_value", "prompt")
        if len(prompt) >= model.context:
            raise ApiError(
                400, f"the prompt has {len(prompt)} tokens, but the context holds {model.context} "
                "with at least one for the answer: shorten it", "context_length_exceeded",
            )  # fmt: skip
    make_way(model, texts, sum(map(len, prompts)), limits)


def make_way(model: Hosted, texts: int, tokens: int, limits: ServeLimits) -> None:
    """Refuse so many more texts, of so many tokens, if too many wait, or they would for too long.

    Where nobody waits, none is refused: it would never be served.

    Raises
    ------
    ApiError
        503.
    """
    line, target = model.line, limits.target_ttft
    if line.waiting + texts > limits.queue:
        raise ApiError(
            503, f"{line.waiting} requests wait already, of at most {limits.queue}: try again "
            "later", "server_overloaded", retry_after=2,
        )  # fmt: skip
    if target is None or not line.waiting:
        return
    wait = line.wait(texts, tokens)
    if wait is not None and wait > target:
        raise ApiError(
            503, f"the first token would come in {wait:.1f} s, of at most {target:g}: try again "
            "later", "server_overloaded", retry_after=wait - target,
        )  # fmt: skip


async def embed(
    model: Hosted, inputs: Sequence[Sequence[int]], limits: ServeLimits
) -> list[NDArray[np.float32]]:
    """The mean of each input's last hidden states; ending the call ends the work.

    Raises
    ------
    ApiError
        400 for an input that is too long; 503 if it would wait with too many others, or for too
        long.
    """
    for ids in inputs:
        if len(ids) > model.context:
            raise ApiError(
                400, f"an input has {len(ids)} tokens, of at most {model.context}: shorten it",
                "context_length_exceeded", "input",
            )  # fmt: skip
    make_way(model, len(inputs), sum(map(len, inputs)), limits)
    futures: list[asyncio.Future[NDArray[np.float32]]] = []
    try:
        for ids in inputs:
            future = asyncio.wrap_future(model.engine.embed(ids))
            model.line.enter(len(ids))
            future.add_done_callback(_leave(model, len(ids)))
            futures.append(future)
        return list(await asyncio.gather(*futures))
    finally:
        for future in futures:
            future.cancel()


def _leave(model: Hosted, tokens: int) -> Callable[[asyncio.Future[Any]], None]:
    def leave(future: asyncio.Future[Any]) -> None:
        model.line.leave(tokens, served=not future.cancelled() and future.exception() is None)

    return leave
