"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pronk.engine.sampler import Sample
from pronk.serve.generate import Delta, Job, Tally, admit, generate, make_way
from pronk.serve.hosted import Hosted
from pronk.serve.http.answer import Chunked, answered
from pronk.serve.http.context import Context
from pronk.serve.http.prepare import Turn, chat_logprobs, prepare
from pronk.serve.http.replies import ChatReply
from pronk.serve.http.schema import ChatRequest
from pronk.serve.tools import ArgumentText, CallStart, Found

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None, responses={200: {"model": ChatReply}})
async def chat(body: ChatRequest, request: Request) -> Response:
    """The assistant's next turn of a conversation."""
    return await answered(body, request, _begin)


async def _begin(context: Context, model: Hosted, body: ChatRequest, request: Request) -> _Answer:
    make_way(model, body.count, 0, context.config.limits)  # before anything is tokenized
    watch = context.watch(request.state.record)
    watch.refuse_logprobs(bool(body.logprobs))
    turn = await prepare(model, body, watch)
    admit(model, [turn.prompt], body.count, context.config.limits)
    forms = await model.constraints(turn.form, context.config.limits.grammar, body.count)
    jobs = [
        Job(turn.prompt, body.params(choice), form, choice > 0, turn.marks)
        for choice, form in enumerate(forms)
    ]
    tally = Tally()
    deltas = generate(model, jobs, context.metrics, tally, watch)
    request.state.record.update(model=model.name, choices=body.count, tokens=tally)
    head = {
        "id": f"chatcmpl-{request.state.request_id}",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": context.fingerprint,
    }
    return _Answer(model, body, turn, deltas, tally, head)


@dataclass(slots=True)
class _Choice:
    """One of ``n`` answers, as far as it has come."""

    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    reason: str | None = None
    opened: bool = False

    def add(self, found: Found) -> dict[str, Any]:
        """Take a part of the answer, and give it as a stream carries it."""
        if isinstance(found, CallStart):
            function = {"name": found.name, "arguments": ""}
            call = {"id": found.id, "type": "function", "function": function}
            self.calls.append({**call, "function": dict(function)})
            return {"tool_calls": [{"index": found.index, **call}]}
        if isinstance(found, ArgumentText):
            self.calls[found.index]["function"]["arguments"] += found.text
            return {"tool_calls": [{"index": found.index, "function": {"arguments": found.text}}]}
        self.content.append(found)
        return {"content": found}


class _Answer(Chunked):
    """All choices of one request, whole or as a stream."""

    def __init__(
        self,
        model: Hosted,
        body: ChatRequest,
        turn: Turn,
        deltas: AsyncGenerator[Delta],
        tally: Tally,
        head: dict[str, Any],
    ) -> None:
        chunk = {**head, "object": "chat.completion.chunk"}
        super().__init__(deltas, body.count, chunk, tally, body.usage)
        self._model, self._body, self._head = model, body, head
        self._choices = [_Choice() for _ in range(body.count)]
        self._parsers = [turn.parser() for _ in range(body.count)]

    def _take(self, delta: Delta) -> list[dict[str, Any]]:
        """What a delta adds to its choice."""
        parser, choice = self._parsers[delta.index], self._choices[delta.index]
        found: list[Found] = [delta.text] if delta.text else []
        if parser is not None:
            found = parser.push(delta.text)
            if delta.finish_reason:
                found += parser.flush()
        if delta.finish_reason:
            called = choice.calls or any(isinstance(f, CallStart) for f in found)
            reason = delta.finish_reason
            choice.reason = "tool_calls" if called and reason == "stop" else reason
        return [choice.add(part) for part in found]

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        async with aclosing(self._deltas):
            async for delta in self._deltas:
                self._take(delta)
                self._choices[delta.index].samples += delta.samples
        choices = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.content)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text if text or not choice.calls else None,
                "refusal": None,
            }
            if choice.calls:
                message["tool_calls"] = choice.calls
            logprobs = chat_logprobs(self._model, choice.samples) if self._body.logprobs else None
            choices.append({"index": index, "message": message, "logprobs": logprobs,
                            "finish_reason": choice.reason})  # fmt: skip
        return {**self._head, "object": "chat.completion", "choices": choices,
                "usage": self._tally.usage()}  # fmt: skip

    def pieces(self, delta: Delta) -> list[bytes]:
        """A delta as chunks; those of one delta share its log-probabilities."""
        choice = self._choices[delta.index]
        parts = self._take(delta)
        if not choice.opened:
            choice.opened = True
            first = {"role": "assistant", "content": "", "refusal": None}
            parts = [{**first, **parts[0]}, *parts[1:]] if parts else [first]
        logprobs = None
        if self._body.logprobs and delta.samples:
            logprobs = chat_logprobs(self._model, delta.samples)
            parts = parts or [{}]
        if delta.finish_reason:
            parts.append({})
        out = []
        for at, part in enumerate(parts):
            last = at == len(parts) - 1
            entry = {
                "index": delta.index,
                "delta": part,
                "logprobs": logprobs if at == 0 else None,
                "finish_reason": choice.reason if last and delta.finish_reason else None,
            }
            out.append(self.chunk([entry]))
        return out
