"""What every route that generates does with its answer: send it whole, or piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pronk.serve.errors import ApiError, error_body
from pronk.serve.generate import Delta
from pronk.serve.http.sse import EventStream, data, until_gone

__all__ = ["Answer", "send"]


class Answer(ABC):
    """All texts of one request, in the shape that its route gives them.

    Parameters
    ----------
    deltas : async generator of Delta
        What `generate` yields; read once.
    count : int
        Of the texts.
    """

    def __init__(self, deltas: AsyncGenerator[Delta], count: int) -> None:
        self._deltas, self._left = deltas, count

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""

    @abstractmethod
    def pieces(self, delta: Delta) -> Iterable[bytes]:
        """What a stream tells of a delta."""

    @abstractmethod
    def ending(self) -> Iterable[bytes]:
        """What a stream tells after the last delta."""

    def failure(self, error: ApiError) -> bytes:
        """What a stream that has begun tells of an error, and ends with."""
        return data(error_body(error))

    async def stream(self) -> AsyncGenerator[tuple[bytes, bool]]:
        """The answer in pieces, the first once the engine has begun.

        Yields
        ------
        bytes, bool
            What to send at once, and whether more follows.

        Raises
        ------
        ApiError
            If it is refused before that.
        """
        begun = False
        try:
            async with aclosing(self._deltas):
                async for delta in self._deltas:
                    told = [*self.pieces(delta)]
                    self._left -= delta.finish_reason is not None
                    if not self._left:
                        told += self.ending()
                    if told:
                        begun = True
                        yield b"".join(told), self._left > 0
        except ApiError as error:
            if not begun:
                raise
            yield self.failure(error), False


async def send(answer: Answer, request: Request, stream: bool | None) -> Response:
    """The response that carries an answer; its work ends when the client leaves."""
    if not stream:
        return JSONResponse(await until_gone(request.receive, answer.whole()))
    source = answer.stream()

    async def first() -> tuple[bytes, bool]:
        return await anext(source)

    # Taken before the response begins, so that what is refused has a status of its own.
    return EventStream(await until_gone(request.receive, first()), source)
