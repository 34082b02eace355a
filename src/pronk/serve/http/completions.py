"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pronk.serve.generate import Delta, Job, Tally, admit, generate, make_way, whole
from pronk.serve.hosted import Hosted
from pronk.serve.http.answer import Chunked, answered
from pronk.serve.http.context import Context
from pronk.serve.http.prepare import completion_logprobs, form_of
from pronk.serve.http.replies import CompletionReply
from pronk.serve.http.schema import CompletionRequest

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/completions", response_model=None, responses={200: {"model": CompletionReply}})
async def complete(body: CompletionRequest, request: Request) -> Response:
    """What follows one or more prompts."""
    return await answered(body, request, _begin)


async def _begin(
    context: Context, model: Hosted, body: CompletionRequest, request: Request
) -> _Texts:
    limits, count = context.config.limits, body.count
    prompts = body.prompts
    if len(prompts) * count > limits.completions:  # before any is tokenized
        admit(model, [[0]] * len(prompts), count, limits)
    make_way(model, len(prompts) * count, 0, limits)
    watch = context.watch(request.state.record)
    watch.refuse_logprobs(body.logprobs is not None)
    prompts = [await watch.prompt(model, prompt) for prompt in prompts]
    ids = [await model.encode(prompt) for prompt in prompts]
    admit(model, ids, count, limits)
    form = form_of(None, body.structured_outputs)
    forms = iter(await model.constraints(form, limits.grammar, len(ids) * count))
    jobs = [
        Job(prompt, body.params(choice), next(forms), repeats=choice > 0)
        for prompt in ids
        for choice in range(count)
    ]
    echoes = [""] * len(jobs)
    if body.echo:
        written = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in prompts]
        echoes = [text for text in written for _ in range(count)]
    tally = Tally()
    deltas = generate(model, jobs, context.metrics, tally, watch)
    request.state.record.update(model=model.name, choices=len(jobs), tokens=tally)
    head = {
        "id": f"cmpl-{request.state.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": context.fingerprint,
    }
    return _Texts(model, body, echoes, deltas, tally, head)


class _Texts(Chunked):
    """All texts of one request, whole or as a stream."""

    def __init__(
        self,
        model: Hosted,
        body: CompletionRequest,
        echoes: list[str],
        deltas: AsyncGenerator[Delta],
        tally: Tally,
        head: dict[str, Any],
    ) -> None:
        super().__init__(deltas, len(echoes), head, tally, body.usage)
        self._model, self._body, self._head = model, body, head
        self._echoes = echoes
        self._offsets = [0] * len(echoes)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs, self._offsets[delta.index] = completion_logprobs(
                self._model, delta.samples, self._offsets[delta.index]
            )
        echo, self._echoes[delta.index] = self._echoes[delta.index], ""
        return {
            "index": delta.index,
            "text": echo + delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        texts = await whole(self._deltas, len(self._echoes))
        choices = [self._choice(delta) for delta in texts]
        return {**self._head, "choices": choices, "usage": self._tally.usage()}

    def pieces(self, delta: Delta) -> list[bytes]:
        """A delta as a chunk."""
        return [self.chunk([self._choice(delta)])]
