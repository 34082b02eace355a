"""What every request passes: its id, where it comes from, its key, its size, its share."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronk.serve.auth import ANYONE, Keys, Quotas
from pronk.serve.config import ServeConfig
from pronk.serve.ended import TRACE_HEADERS, Ended, Tell
from pronk.serve.errors import ApiError, error_body
from pronk.serve.metrics import Metrics

__all__ = ["OPEN_ROUTES", "Gateway", "Gauge", "Sink"]

OPEN_ROUTES = frozenset({"/health", "/ready"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")

Sink = Callable[[dict[str, object]], None]


@dataclass(slots=True)
class Gauge:
    """Whether the server takes work, and how much is under way."""

    draining: bool = False
    running: int = 0
    retry_after: float = 5.0
    idle: list[Callable[[], None]] = field(default_factory=list)

    def leave(self) -> None:
        """A request ended."""
        self.running -= 1
        if not self.running:
            for call in self.idle:
                call()


class Gateway:
    """ASGI middleware; pure, so that streams and disconnects pass as they are.

    Parameters
    ----------
    app : ASGIApp
    config : ServeConfig
    keys : Keys or None
    metrics : Metrics
    gauge : Gauge
    quotas : Quotas
    audit : callable, optional
        Told of each request when it ends.
    tell : callable, optional
        Told too, but of every one.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        keys: Keys | None,
        metrics: Metrics,
        gauge: Gauge,
        quotas: Quotas,
        audit: Sink | None = None,
        tell: Tell | None = None,
    ) -> None:
        self.app, self.config, self.keys, self.metrics = app, config, keys, metrics
        self.gauge, self._audit, self._tell = gauge, audit, tell
        self._quotas = quotas
        self._hosts = _LOOPBACK | {config.host} | set(config.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state["request_id"], state["record"] = request_id, {}
        state["send"] = send  # for the pieces of a stream, which nothing on the way looks at
        origin = headers.get("origin")
        allowed = origin if origin in self.config.origins else None
        start, began, status, begun = time.perf_counter(), time.time_ns(), 0, False

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out["x-content-type-options"] = "nosniff"
                if allowed:
                    out["access-control-allow-origin"] = allowed
                    out["access-control-expose-headers"] = "x-request-id, retry-after"
                    out.add_vary_header("origin")
            await send(message)

        try:
            with ExitStack() as stack:
                try:
                    if scope["method"] == "OPTIONS" and allowed:
                        await _preflight(answer)
                        return
                    self._admit(scope, headers, origin, stack)
                    await self.app(scope, self._bounded(receive, headers), answer)
                except ApiError as error:
                    self.metrics.failed(error, state["record"])
                    if not begun:
                        await _refuse(error, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - start
            self.metrics.answers.labels(path, str(status or 499)).inc()
            # Probes, whatever they are told, and pages that are only read leave no line.
            told = scope["method"] == "POST" or (status >= 400 and path not in OPEN_ROUTES)
            if self._audit is not None and told:
                self._audit({
                    "request": request_id, "key": state.get("key"), "method": scope["method"],
                    "route": path, "status": status or 499,
                    "seconds": round(seconds, 6), **state["record"],
                })  # fmt: skip
            if self._tell is not None:
                self._tell(Ended.of(
                    state["record"], request=request_id, method=scope["method"], route=path,
                    status=status or 499, began=began, seconds=seconds, key=state.get("key"),
                    parent={name: headers[name] for name in TRACE_HEADERS if name in headers},
                ))  # fmt: skip

    def _admit(self, scope: Scope, headers: Headers, origin: str | None, stack: ExitStack) -> None:
        host = headers.get("host", "")
        if self.config.local and _name(host) not in self._hosts:
            # A page elsewhere may have pointed its own name at this machine (DNS rebinding).
            raise ApiError(403, "this host name is not served: see --allow-host", "unknown_host")
        if origin and origin not in self.config.origins and _authority(origin) != host:
            raise ApiError(
                403, "this web origin is not allowed: see --cors-origin", "origin_not_allowed"
            )
        name = ANYONE
        path = scope["path"]
        if self.keys is not None and path not in OPEN_ROUTES:
            found = self.keys.name(headers.get("authorization"))
            if found is None:
                raise ApiError(401, "a valid API key is required", "invalid_api_key")
            name = found
        scope["state"]["key"] = name
        if scope["method"] != "POST":
            return
        if self.gauge.draining:
            raise ApiError(
                503, "the server is shutting down: try another, or again later", "shutting_down",
                retry_after=self.gauge.retry_after,
            )  # fmt: skip
        stack.enter_context(self._quotas.take(name))
        self.gauge.running += 1
        stack.callback(self.gauge.leave)

    def _bounded(self, receive: Receive, headers: Headers) -> Receive:
        most = self.config.limits.body
        error = ApiError(413, f"the request is larger than {most} bytes", "request_too_large")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > most:
            raise error
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > most:
                    # FastAPI lets only its own kind of error through while it reads a body.
                    raise HTTPException(error.status, error.message)
            return message

        return bounded


def _authority(origin: str) -> str | None:
    """The host and port of a web origin, if it is one."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


async def _refuse(error: ApiError, send: Callable[[Message], Awaitable[None]]) -> None:
    await _send(send, error.status, error.headers, json.dumps(error_body(error)).encode())


async def _preflight(send: Callable[[Message], Awaitable[None]]) -> None:
    headers = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization, content-type, x-request-id",
        "access-control-max-age": "600",
    }
    await _send(send, 204, headers, b"")


async def _send(
    send: Callable[[Message], Awaitable[None]], status: int, headers: dict[str, str], body: bytes
) -> None:
    if body:
        headers = {**headers, "content-type": "application/json"}
    headers = {**headers, "content-length": str(len(body))}
    if status == 204:
        del headers["content-length"]
    raw: Sequence[tuple[bytes, bytes]] = [
        (key.encode(), value.encode()) for key, value in headers.items()
    ]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
