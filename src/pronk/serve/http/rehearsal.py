"""Requests of a server's own before it takes work: every kind once, and as many at once as run.

The first users then find code loaded and memory touched. And what serving takes beside weights,
cache and arena cannot be told from a header: it is what is resident after this, and so the memory
plan of a server is made here.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from starlette.types import ASGIApp, Message

from pronk.serve.auth import ANYONE
from pronk.serve.errors import ApiError
from pronk.serve.guard.watch import Watch
from pronk.serve.hosted import Hosted
from pronk.serve.http.context import Context
from pronk.serve.http.gateway import Gauge
from pronk.serve.line import Line
from pronk.serve.metrics import Metrics

__all__ = ["rehearse"]

_TEXT = "Once upon a time"
Body = Callable[[int], Mapping[str, Any]]
_KNOWN = (
    "a.b+c@mail.example.org, http://x.y/z?a=b&c=d, +44 20 7946 0958, (030) 123456, 212 555 0123, "
    "4111 1111 1111 1111, DE89 3704 0044 0532 0130 00, 123-45-6789, 10.0.0.1, 2001:db8::1"
)
_PARTS = [*map(chr, (*range(1, 127), *range(0xA0, 0x250), *range(0x4E00, 0x4F00))), *_KNOWN.split()]
_RANDOM = 120  # texts of 100 parts
_SECONDS = 5.0  # for all of them: a classifier may be slow
# Sampling that looks at the whole vocabulary, which takes the most memory.
_WIDE = {"temperature": 2.0, "top_p": 0.99}
_READ = ("/metrics", "/stats", "/openapi.json", "/")


async def rehearse(api: ASGIApp, context: Context, resident: Callable[[], int]) -> dict[str, str]:
    """Ask every model for every kind of answer.

    It counts in no quota, in no log, and in no metric but those of the engine (steps, lookups).

    A request that is refused (a model without a chat template, a guard that blocks) is as good as
    one that is answered.

    Parameters
    ----------
    api : ASGI application
        Behind the gateway.
    context : Context
    resident : callable
        Bytes of memory that the process takes now.

    Returns
    -------
    dict of str to str
        By the names of models that fail: what they say.
    """
    limits = replace(context.config.limits, queue=1 << 20, target_ttft=None)
    models = {name: replace(model, line=Line()) for name, model in context.models.items()}
    for model in models.values():
        model.attach(limits)
    metrics, config = Metrics([*models.values()], resident), replace(context.config, limits=limits)
    own = replace(context, models=models, config=config, metrics=metrics, gauge=Gauge(), audit=None)
    keep = context.audit is not None and config.audit_text
    await _guard(Watch(context.guard, metrics.guarded, keep), next(iter(models.values())))
    failed: dict[str, str] = {}
    for name, model in models.items():
        answers = [await _ask(api, own, "POST", *one) for one in _kinds(name)]
        token = model.spec.vocab_size // 2  # any
        for path, body in _many(name, token, model.context):
            answers += await asyncio.gather(
                *(_ask(api, own, "POST", path, body(at)) for at in range(model.sequences))
            )
        errors = [text for status, text in answers if status >= 500]
        if errors:
            failed[name] = errors[0]
    for path in _READ:
        await _ask(api, own, "GET", path)
    return failed


def _completion(name: str, prompt: str | list[int]) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": 4, "ignore_eos": True}


def _schema(at: int) -> dict[str, Any]:
    values = {"type": "string", "maxLength": 40}, {"type": "integer"}
    return {"type": "object", "properties": dict(zip((f"name{at}", "n"), values, strict=True)),
            "required": ["n"], "additionalProperties": False}  # fmt: skip


def _kinds(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Routes, and a request of each kind."""
    plain = _completion(name, _TEXT)
    yield "/v1/completions", plain
    yield "/v1/completions", {**plain, **_WIDE, "logprobs": 5}
    yield "/v1/completions", {**plain, "structured_outputs": {"json": _schema(0)}}
    chat = {"model": name, "messages": [{"role": "user", "content": _TEXT}], "max_tokens": 4}
    yield "/v1/chat/completions", chat
    yield "/v1/chat/completions", {**chat, "stream": True}
    yield "/v1/responses", {"model": name, "input": _TEXT, "max_output_tokens": 4}
    yield "/v1/embeddings", {"model": name, "input": _TEXT}


def _many(name: str, token: int, context: int) -> Iterator[tuple[str, Body]]:
    """Routes, and what is asked there by as many as run at once, each by its number.

    Short prompts, for these tokens are computed, and texts as long as any, which are not.
    """
    plain = {**_completion(name, [token]), "max_tokens": 2}
    yield "/v1/completions", lambda at: {**plain, **_WIDE}
    yield "/v1/completions", lambda at: {**plain, "structured_outputs": {"json": _schema(at)}}
    yield "/tokenize", lambda at: {"model": name, "prompt": f"{_TEXT} " * (context // 4)}


async def _guard(watch: Watch, model: Hosted) -> None:
    """Pass on texts of every kind, as they are asked and as they are answered.

    RE2 writes its automata as texts need them: most of what they grow to is there from then on.
    """
    if watch.guard is None and not watch.keep:
        return
    draw = random.Random(0)
    texts = [_KNOWN, *("".join(draw.choices(_PARTS, k=100)) for _ in range(_RANDOM))]
    end = time.monotonic() + _SECONDS

    def answer(text: str) -> None:
        chain = watch.answer()
        if chain is not None:
            for at in range(0, len(text), 3):
                chain.push(text[at : at + 3])
            chain.push("", final=True)
        watch.heard(0, text)

    for text in texts:
        with suppress(ApiError):  # blocked
            await watch.prompt(model, text)
        await model.aside(answer, text)
        if time.monotonic() > end:
            break
    await model.aside(watch.entry)


async def _ask(
    api: ASGIApp, context: Context, method: str, path: str, body: Mapping[str, Any] | None = None
) -> tuple[int, str]:
    """Send a request to the application; gives the status and the answer's first words."""
    sent = [{"type": "http.request", "body": json.dumps(body).encode() if body else b""}]
    status, said = 0, b""

    async def receive() -> Message:
        return sent.pop() if sent else await asyncio.Future()  # a client that stays

    async def send(message: Message) -> None:
        nonlocal status, said
        status = message.get("status", status)
        said = (said + message.get("body", b""))[:200]

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": None, "server": None,
        "state": {"context": context, "request_id": "rehearsal", "record": {}, "send": send,
                  "key": ANYONE},
    }  # fmt: skip
    with suppress(Exception):  # raised again after it was answered with 500
        await api(scope, receive, send)
    return status, said.decode(errors="replace")
