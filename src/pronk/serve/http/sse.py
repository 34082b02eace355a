"""Answers that arrive in pieces, and work that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "Chunks", "ClientGoneError", "EventStream", "data", "event", "until_gone"]

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
# ASCII alone: some clients take U+2028 and its like for the end of a line.
_encode = json.JSONEncoder(separators=(",", ":")).encode


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


def data(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % _encode(value).encode()


def event(name: str, value: Any) -> bytes:
    """One server-sent event with a name."""
    return f"event: {name}\n".encode() + data(value)


class Chunks:
    """Server-sent events of one stream, which differ in their choices alone.

    Parameters
    ----------
    head : mapping
        What all of them say; it is written once.
    """

    def __init__(self, head: Mapping[str, Any]) -> None:
        self._head = b"data: %b" % _encode(head)[:-1].encode()

    def of(
        self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None = None
    ) -> bytes:
        """The event of some choices, and of what they took."""
        event = b'%b,"choices":%b' % (self._head, _encode(choices).encode())
        if usage is not None:
            event += b',"usage":%b' % _encode(usage).encode()
        return event + b"}\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do some work, or end it when the client disconnects.

    Raises
    ------
    ClientGoneError
        If it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for future in (task, watch):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events; the source is closed when the client disconnects.

    Parameters
    ----------
    first : (bytes, bool)
        A piece that was taken from the source already, and whether others follow.
    source : async generator of (bytes, bool)
        These.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: tuple[bytes, bool], source: AsyncGenerator[tuple[bytes, bool]]
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._first, self._source = first, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            await until_gone(receive, self._pump(scope["state"]["send"]))
        except ClientGoneError:
            return
        finally:
            await self._source.aclose()

    async def _pump(self, send: Send) -> None:
        piece, more = self._first
        await send({"type": "http.response.body", "body": piece, "more_body": more})
        while more:
            piece, more = await anext(self._source)
            await send({"type": "http.response.body", "body": piece, "more_body": more})
