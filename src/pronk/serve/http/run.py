"""A server that runs until it is told to stop, and then finishes what it has begun."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from types import FrameType

import uvicorn

from pronk.errors import RequestError
from pronk.serve.config import ServeConfig
from pronk.serve.http.app import Served

__all__ = ["Server", "bind", "serve"]

_log = logging.getLogger("pronk.serve")


class Server(uvicorn.Server):
    """uvicorn, but that a first signal drains: what runs may finish, and what comes is refused."""

    def __init__(self, config: uvicorn.Config, served: Served, drain: float) -> None:
        super().__init__(config)
        self._served, self._gauge, self._drain = served, served.gauge, drain
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also where the server cannot go on."""
        return await super().on_tick(counter) or self._served.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second ends at once."""
        if self._gauge.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._gauge.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if not self._gauge.running:
            self.should_exit = True
            return
        _log.warning("finishing %d requests; once more to end at once", self._gauge.running)
        self._gauge.idle.append(lambda: setattr(self, "should_exit", True))
        asyncio.get_running_loop().call_later(self._drain, self._end)

    def _end(self) -> None:
        self.should_exit = self.force_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, so that a taken port is an error before anything is loaded.

    Raises
    ------
    RequestError
        If the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise RequestError(f"{host}:{port} cannot be bound: {error.strerror or error}") from None
    return sock


def serve(
    served: Served,
    config: ServeConfig,
    sock: socket.socket,
    started: Callable[[Server], None] | None = None,
) -> None:
    """Serve until told to stop.

    Raises
    ------
    RequestError
        If the TLS files cannot be used.
    PronkError
        If it ended because it could not go on (`Served.failure`).
    """
    settings = uvicorn.Config(
        served.app, lifespan="on", log_config=None, access_log=False, server_header=False,
        ssl_certfile=config.tls_cert, ssl_keyfile=config.tls_key,
        timeout_keep_alive=30, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        raise RequestError(f"the TLS certificate or key cannot be used: {error}") from None
    server = Server(settings, served, config.limits.drain)
    if started is not None:
        started(server)
    server.run(sockets=[sock])
    if served.failure is not None:
        raise served.failure
