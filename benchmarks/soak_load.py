"""What the clients of `soak.py` do, a method a kind."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import openai
from clients import MODEL, Running

BODY = 1 << 20  # bytes of a request, at most
DENIED = "Rumpelstiltskin"  # what the guard refuses
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}]
FORMS = (
    {"regex": "[a-z]{3,12}( [a-z]{3,12}){2,6}"},
    {"choice": ["yes", "no", "it depends"]},
    {"json": SCHEMA},
)
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v1/completions", b'{"model": "it", "prompt', 400),
    ("/v1/completions", b'{"model":' + b"[" * 10_000, 400),
    ("/v1/completions", b"\xff\xfe\x00", 400),
    ("/v1/completions", {"prompt": 7}, 400),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 400),
    ("/v1/completions", {"prompt": "x", "colour": "red"}, 400),
    ("/v1/completions", {"prompt": "word " * 4000}, 400),
    ("/v1/completions", {"prompt": "x" * (BODY + 1)}, 413),
    ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "(("}}, 400),
    ("/v1/completions", {"prompt": [10**8]}, 400),
    ("/v1/chat/completions", {"messages": "hello"}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400),
    ("/v1/embeddings", {"input": []}, 400),
    ("/v1/completions", {"prompt": f"who is {DENIED}?"}, 400),
    ("/v1/completions", {"model": "nobody", "prompt": "x"}, 404),
    ("/nowhere", {}, 404),
)


class WrongError(Exception):
    """An answer that should not have been."""


class Load:
    """Everything that clients do, a method a kind; each gives what became of it.

    Parameters
    ----------
    running : Running
    source : list of str
        Words that prompts are made of.
    seed : int
    """

    def __init__(self, running: Running, source: list[str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.source = source
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.http = httpx.AsyncClient(base_url=running.url, timeout=None, limits=limits)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=None
        )
        self.grpc = running.grpc
        # Conversations that begin alike: a few long system messages.
        self.systems = [self.text(60, 200) for _ in range(4)]
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[str]]]] = {
            "chat": (4, self.chat),
            "chat stream": (4, lambda: self.stream("/v1/chat/completions", self.chat_body())),
            "completion": (3, self.completion),
            "completion stream": (4, lambda: self.stream("/v1/completions", self.body())),
            "responses stream": (1, lambda: self.stream("/v1/responses", self.response_body())),
            "long completion": (1, self.long),
            "embeddings": (2, self.embeddings),
            "structured": (3, self.structured),
            "tool call": (2, self.tool_call),
            "conversation": (2, self.conversation),
            "left while it waits": (2, self.leave_early),
            "left in mid-stream": (4, self.leave),
            "bad request": (4, self.bad),
            "gRPC stream": (2, self.grpc_stream),
            "gRPC cancelled": (2, self.grpc_cancel),
            "pages and figures": (1, self.look),
        }

    def text(self, least: int, most: int) -> str:
        """So many words that stand together in the text."""
        count = self.rng.randint(least, most)
        start = self.rng.randrange(len(self.source) - count)
        return " ".join(self.source[start : start + count])

    def sampling(self) -> dict[str, Any]:
        """How tokens are chosen: many ways."""
        rng = self.rng
        return {"max_tokens": rng.randint(1, 64), **rng.choice((
            {"temperature": 0}, {}, {"temperature": 1.2, "top_p": 0.9, "seed": rng.randrange(99)},
            {"top_k": 20, "presence_penalty": 0.5}, {"stop": [" the", "\n\n"]},
            {"repetition_penalty": 1.2, "min_p": 0.05}))}  # fmt: skip

    def body(self) -> dict[str, Any]:
        """A completion."""
        extra = self.rng.choice(({}, {}, {"n": 3}, {"logprobs": 3}, {"echo": True}))
        return {"model": MODEL, "prompt": self.text(5, 300), **self.sampling(), **extra}

    def chat_body(self) -> dict[str, Any]:
        """A question behind a system message that others have too."""
        messages = [{"role": "system", "content": self.rng.choice(self.systems)},
                    {"role": "user", "content": self.text(5, 100)}]  # fmt: skip
        extra = self.rng.choice(({}, {}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}))
        return {"model": MODEL, "messages": messages, **self.sampling(), **extra}

    def response_body(self) -> dict[str, Any]:
        """A text for the newer route."""
        return {"model": MODEL, "input": self.text(5, 100), "max_output_tokens": 32}

    async def post(self, path: str, body: Any, *expected: int) -> httpx.Response:
        """An answer whose status is expected, or 503 or 429."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        answer = await self.http.post(path, content=raw, headers=headers)
        if answer.status_code not in (*(expected or (200,)), 429, 503):
            raise WrongError(f"{path}: {answer.status_code} {answer.text[:200]}")
        return answer

    async def whole(self, path: str, body: Any) -> Any:
        """The JSON of an answer; None if it was refused."""
        answer = await self.post(path, body)
        return answer.json() if answer.status_code == 200 else None

    async def chat(self) -> str:
        found = await self.whole("/v1/chat/completions", self.chat_body())
        return _said(found and found["choices"][0]["message"]["content"] is not None, found)

    async def completion(self) -> str:
        found = await self.whole("/v1/completions", self.body())
        return _said(found and found["usage"]["completion_tokens"] > 0, found)

    async def long(self) -> str:
        """A long answer: it outgrows what the cache has, and others give way, or it does."""
        body = {"model": MODEL, "prompt": self.text(5, 20), "max_tokens": 500, "ignore_eos": True}
        found = await self.whole("/v1/completions", body)
        return _said(found and found["usage"]["completion_tokens"] == 500, found)

    async def embeddings(self) -> str:
        inputs = [self.text(5, 200) for _ in range(self.rng.randint(1, 4))]
        found = await self.whole("/v1/embeddings", {"model": MODEL, "input": inputs})
        return _said(found and len(found["data"]) == len(inputs), found)

    async def structured(self) -> str:
        form = self.rng.choice(FORMS)
        body = {"model": MODEL, "prompt": self.text(5, 60), "max_tokens": 64,
                "structured_outputs": form}  # fmt: skip
        found = await self.whole("/v1/completions", body)
        if found is None:
            return "refused"
        choice = found["choices"][0]
        if choice["finish_reason"] == "stop":
            kind, value = next(iter(form.items()))
            keeps = {
                "regex": lambda text: re.fullmatch(str(value), text),
                "choice": lambda text: text in value,
                "json": lambda text: set(json.loads(text)) == set(SCHEMA["properties"]),
            }[kind]
            if not keeps(choice["text"]):
                raise WrongError(f"not of the form {form}: {choice['text']!r}")
        return "ok"

    async def tool_call(self) -> str:
        how = self.rng.choice(("auto", "required"))
        body = {**self.chat_body(), "tools": TOOLS, "tool_choice": how, "n": 1, "max_tokens": 80}
        if self.rng.random() < 0.5:
            return await self.stream("/v1/chat/completions", body)
        found = await self.whole("/v1/chat/completions", body)
        called = found and found["choices"][0]["message"].get("tool_calls")
        return _said(called or how == "auto", found)

    async def stream(self, path: str, body: Any, leave: int | None = None) -> str:
        """Read a stream to its end, or leave after so many lines."""
        body = {**body, "stream": True}
        async with self.http.stream("POST", path, json=body) as answer:
            if answer.status_code in (429, 503):
                return "refused"
            if answer.status_code != 200:
                await answer.aread()
                raise WrongError(f"{path}: {answer.status_code} {answer.text[:200]}")
            last, count = "", 0
            async for line in answer.aiter_lines():
                last, count = line or last, count + 1
                if leave is not None and count > leave:
                    return "left"
        if last != "data: [DONE]" and '"response.' not in last:
            raise WrongError(f"{path}: the stream ends with {last[:200]!r}")
        return "ok"

    async def leave(self) -> str:
        body = {**self.rng.choice((self.body, self.chat_body))(), "max_tokens": 200, "n": 2}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return await self.stream(path, body, leave=self.rng.randrange(40))

    async def leave_early(self) -> str:
        """Leave at some moment, the first token come or not."""
        body = {**self.body(), "max_tokens": 300}
        try:
            await self.http.post("/v1/completions", json=body, timeout=self.rng.random())
        except httpx.TimeoutException:
            return "left"
        return "ok"

    async def bad(self) -> str:
        path, body, status = self.rng.choice(BAD)
        if isinstance(body, dict):
            body = {"model": MODEL, **body}
        answer = await self.post(path, body, status)
        return "refused" if answer.status_code == status else "busy"

    async def conversation(self) -> str:
        """A few turns; each begins with all before it."""
        messages: list[Any] = [{"role": "system", "content": self.rng.choice(self.systems)}]
        for _ in range(self.rng.randint(2, 5)):
            messages.append({"role": "user", "content": self.text(3, 40)})
            try:
                answer = await self.openai.chat.completions.create(
                    model=MODEL, messages=messages, max_tokens=40, temperature=0
                )
            except openai.APIStatusError as error:
                if error.status_code in (429, 503) or "context" in str(error):
                    return "refused"
                raise WrongError(f"conversation: {error}") from None
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        return "ok"

    async def look(self) -> str:
        for path in ("/", "/dashboard", "/stats", "/metrics", "/openapi.json", "/v1/models"):
            (await self.http.get(path)).raise_for_status()
        return "ok"

    @contextlib.asynccontextmanager
    async def parts(self, **sampling: Any) -> AsyncIterator[Any]:
        """A stream over gRPC, on a channel of its own."""
        import grpc

        from pronk.serve.grpc import generation_pb2 as pb

        async with grpc.aio.insecure_channel(self.grpc) as channel:
            method = channel.unary_stream(
                "/pronk.v1.Generation/GenerateStream",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GeneratePart.FromString,
            )
            request = pb.GenerateRequest(text=self.text(5, 200), sampling=pb.Sampling(**sampling))
            try:
                yield method(request)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise WrongError(f"gRPC: {error.code().name} {error.details()}") from None

    async def grpc_stream(self) -> str:
        last = None
        async with self.parts(max_tokens=self.rng.randint(1, 64), seed=1, temperature=1.0) as parts:
            async for part in parts:
                last = part
        return "ok" if last is not None and last.finish_reason else "refused"

    async def grpc_cancel(self) -> str:
        async with self.parts(max_tokens=200, ignore_eos=True) as parts:
            left = self.rng.randrange(20)
            async for _ in parts:
                left -= 1
                if left < 0:
                    parts.cancel()
                    return "left"
        return "refused"


def _said(right: Any, found: Any) -> str:
    if found is None:
        return "refused"
    if not right:
        raise WrongError(f"an answer is not whole: {json.dumps(found)[:300]}")
    return "ok"
