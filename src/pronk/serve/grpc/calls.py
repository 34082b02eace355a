"""What every gRPC method passes: its key, its share, and errors as gRPC states them."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

import grpc

from pronk.errors import PronkError
from pronk.serve.auth import ANYONE, Keys, Quotas
from pronk.serve.ended import TRACE_HEADERS, Ended, Tell
from pronk.serve.errors import ApiError, from_pronk
from pronk.serve.http.context import Context
from pronk.serve.http.gateway import Sink

__all__ = ["Calls", "Record", "status_of"]

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_log = logging.getLogger("pronk.serve")

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Call = Any  # grpc.aio.ServicerContext: grpc carries no types
Record = dict[str, object]  # what the audit log will say of a call


def status_of(error: ApiError) -> grpc.StatusCode:
    """The status that says the same as an HTTP one."""
    return _CODES.get(error.status, grpc.StatusCode.INTERNAL)


class Calls:
    """Turns methods that raise into handlers that answer.

    Parameters
    ----------
    context : Context
        The models, shared with the HTTP side.
    keys : Keys or None
    quotas : Quotas
        Those of the HTTP side: a key's share is one.
    audit, tell : callable, optional
        Told of each call when it ends.
    """

    def __init__(
        self,
        context: Context,
        keys: Keys | None,
        quotas: Quotas,
        audit: Sink | None = None,
        tell: Tell | None = None,
    ) -> None:
        self.context, self._keys, self._quotas = context, keys, quotas
        self._audit, self._tell = audit, tell

    @contextmanager
    def _told(self, route: str, call: Call) -> Iterator[Record]:
        record: Record = {"request": f"req-{secrets.token_hex(12)}", "method": "gRPC"}
        record |= {"route": route, "status": "CANCELLED"}  # unless it comes to its end
        start, began = time.perf_counter(), time.time_ns()
        try:
            yield record
        finally:
            seconds = time.perf_counter() - start
            if self._audit is not None:
                self._audit({**record, "seconds": round(seconds, 6)})
            if self._tell is not None:
                given = dict(call.invocation_metadata() or ())
                self._tell(Ended.of(
                    record, request=record["request"], method="gRPC", route=route,
                    status=record["status"], began=began, seconds=seconds, key=record.get("key"),
                    parent={name: given[name] for name in TRACE_HEADERS if name in given},
                ))  # fmt: skip

    @contextmanager
    def _admitted(self, call: Call, record: Record) -> Iterator[None]:
        gauge = self.context.gauge
        if gauge.draining:
            raise ApiError(503, "the server is shutting down", retry_after=gauge.retry_after)
        given = dict(call.invocation_metadata() or ())
        name = ANYONE if self._keys is None else self._keys.name(given.get("authorization"))
        if name is None:
            raise ApiError(
                401, "this server wants a key: send the metadata 'authorization: Bearer KEY'",
                "invalid_api_key",
            )  # fmt: skip
        record["key"] = name
        with self._quotas.take(name):
            gauge.running += 1
            try:
                yield
                record["status"] = "OK"
            finally:
                gauge.leave()

    async def _fail(self, call: Call, error: Exception, record: Record) -> None:
        if isinstance(error, PronkError):
            error = from_pronk(error)
        if not isinstance(error, ApiError):
            _log.error("a gRPC call failed", exc_info=error)
            error = ApiError(500, "the server failed: its log says how", "internal_error")
        self.context.metrics.failed(error, record)
        record["status"] = status_of(error).name
        trailing = tuple((k, v) for k, v in error.headers.items() if k == "retry-after")
        await call.abort(status_of(error), error.message, trailing)

    def unary(
        self, route: str, method: Callable[[Request, Record], Awaitable[Reply]]
    ) -> Callable[[Request, Call], Awaitable[Reply]]:
        """A handler with one answer."""

        async def answer(request: Request, call: Call) -> Reply:
            with self._told(route, call) as record:
                try:
                    with self._admitted(call, record):
                        return await method(request, record)
                except Exception as error:
                    await self._fail(call, error, record)
                    raise

        return answer

    def stream(
        self, route: str, method: Callable[[Request, Record], AsyncGenerator[Reply]]
    ) -> Callable[[Request, Call], AsyncIterator[Reply]]:
        """A handler whose answer comes in parts."""

        async def answer(request: Request, call: Call) -> AsyncIterator[Reply]:
            with self._told(route, call) as record:
                try:
                    with self._admitted(call, record):
                        async with aclosing(method(request, record)) as parts:
                            async for part in parts:
                                yield part
                except Exception as error:
                    await self._fail(call, error, record)
                    raise

        return answer
