"""Real servers for tests: one in a thread of this process, or the command in a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pronk.device.memory import resident_memory
from pronk.model import load
from pronk.serve.config import ServeConfig
from pronk.serve.guard.config import read_guard
from pronk.serve.hosted import Hosted
from pronk.serve.http.app import Served, make_app
from pronk.serve.http.run import Server, bind, serve
from pronk.serve.trace import Tracer


@dataclass
class Running:
    """A server in a thread."""

    url: str
    served: Served
    server: Server
    models: list[Hosted]

    def client(self, **options: Any) -> httpx.Client:
        """An HTTP client of it."""
        return httpx.Client(base_url=self.url, timeout=120, **options)


def hosted(name: str, path: Path, stack: ExitStack, **options: Any) -> Hosted:
    """A model on an engine's thread; the stack ends it."""
    options = {"threads": 1, "context": 256, "kv_tokens": 1024, "packed_cache": False, **options}
    model = load(path, **options)
    stack.callback(model.close)
    pool = stack.enter_context(ThreadPoolExecutor(2))
    engine = stack.enter_context(model.service())
    return Hosted(name, model.tokenizer, model.spec, model.memory, model.context, engine, pool)


@contextmanager
def running(
    models: dict[str, Path], config: ServeConfig, *, tracer: Tracer | None = None, **options: Any
) -> Iterator[Running]:
    """Serve models until the block ends."""
    with ExitStack() as stack:
        sock = stack.enter_context(bind(config.host, config.port))
        served_models = [hosted(name, path, stack, **options) for name, path in models.items()]
        guard = read_guard(config.guard) if config.guard else None
        served = make_app(
            served_models, config, resident_memory, "test", guard=guard, tracer=tracer
        )
        stack.callback(served.close)
        begun: list[Server] = []
        thread = threading.Thread(target=serve, args=(served, config, sock, begun.append))
        thread.start()
        scheme = "https" if config.tls_cert else "http"
        url = f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"
        try:
            wait_ready(url)
            yield Running(url, served, begun[0], served_models)
        finally:
            begun[0].should_exit = True
            thread.join()


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until something is so."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"it does not come to be that {what}")


def idle(server: Running) -> None:
    """Wait until nothing runs, no block is held, and all is told of what was."""

    def free() -> bool:
        stats = server.models[0].engine.stats()
        held = sum(pool.held for pool in stats.pools)
        waits = stats.waiting or server.models[0].line.waiting
        return not (stats.running or waits or held or server.served.gauge.running)

    until(free, "nothing runs and no block is held")
    httpx.get(f"{server.url}/health", verify=False)  # the loop has gone on to the next


def wait_ready(url: str) -> None:
    """Wait until a server takes work."""

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", verify=False, timeout=60).status_code == 200
        except httpx.TransportError:  # it does not listen yet
            return False

    until(ready, "the server is ready")


@contextmanager
def process(*args: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``pronk serve`` in a process of its own, killed in the end; gives its address."""
    command = [sys.executable, "-m", "pronk", "serve", *args, "--port", "0", "--json"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    try:
        line = child.stdout.readline()
        assert line, child.stderr.read()
        url = json.loads(line)["url"]
        wait_ready(url)
        yield url, child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.communicate()
