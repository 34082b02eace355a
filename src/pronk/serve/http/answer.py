"""What every route that generates does with its answer: send it whole, or piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pronk.serve.errors import ApiError, error_body
from pronk.serve.generate import Delta, Tally
from pronk.serve.hosted import Hosted
from pronk.serve.http.context import Context, context_of
from pronk.serve.http.sse import DONE, Chunks, EventStream, data, until_gone

__all__ = ["Answer", "Chunked", "answered"]


class _Body(Protocol):
    model: str
    stream: bool | None


B = TypeVar("B", bound=_Body)


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

    async def stream(
        self, failed: Callable[[ApiError], None]
    ) -> AsyncGenerator[tuple[bytes, bool]]:
        """The answer in pieces, the first once the engine has begun.

        Parameters
        ----------
        failed : callable
            Told of an error that comes later.

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
            failed(error)
            yield self.failure(error), False


class Chunked(Answer):
    """An answer whose stream is chunks that differ in their choices alone.

    Parameters
    ----------
    deltas, count
        As `Answer` takes them.
    head : mapping
        What every chunk says.
    tally : Tally
        What the answer took so far.
    usage : {"last", "each"} or None
        The chunks that tell it.
    """

    def __init__(
        self,
        deltas: AsyncGenerator[Delta],
        count: int,
        head: Mapping[str, Any],
        tally: Tally,
        usage: Literal["last", "each"] | None,
    ) -> None:
        super().__init__(deltas, count)
        self._tally, self._usage = tally, usage
        self._plain = Chunks(head)
        self._chunks = self._plain if usage is None else Chunks({**head, "usage": None})

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> bytes:
        """A chunk of some choices."""
        if self._usage == "each":
            return self._plain.of(choices, self._tally.usage())
        return self._chunks.of(choices)

    def ending(self) -> list[bytes]:
        """What it took, if asked for, and the mark of the end."""
        return [*([self._plain.of([], self._tally.usage())] if self._usage else []), DONE]


async def answered(
    body: B,
    request: Request,
    begin: Callable[[Context, Hosted, B, Request], Coroutine[Any, Any, Answer]],
) -> Response:
    """The response to a body, whole or a stream; its work ends when the client leaves.

    Parameters
    ----------
    body : pydantic model
    request : Request
    begin : callable
        Makes the answer of a body, by the model that it names.

    Raises
    ------
    ApiError, PronkError
        If it is refused.
    """
    context = context_of(request)
    begun = begin(context, context.model(body.model), body, request)
    answer = await until_gone(request.receive, begun)
    if not body.stream:
        return JSONResponse(await until_gone(request.receive, answer.whole()))

    def failed(error: ApiError) -> None:
        context.metrics.failed(error, request.state.record)

    source = answer.stream(failed)

    async def first() -> tuple[bytes, bool]:
        return await anext(source)

    # Taken before the response begins, so that what is refused has a status of its own.
    return EventStream(await until_gone(request.receive, first()), source)
