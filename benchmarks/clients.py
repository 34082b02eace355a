"""What the benchmarks of serving share: prompts, and servers in processes of their own."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pronk.evaluate.corpus import load_corpus

MODEL = "it"  # the name that every server serves its model by


def words(text: str | None) -> list[str]:
    """The words of a file, or of Python's own documentation."""
    return load_corpus(text).text.split()


def prompts(source: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Pieces of a text, 20 to 300 words long, each with a beginning of its own."""
    rng = random.Random(seed)
    out = []
    for number in range(count):
        length = round(20 * 15 ** rng.random())
        start = rng.randrange(len(source) - length)
        out.append(f"Text {number}. Go on: " + " ".join(source[start : start + length]))
    return out


def pronk_command(path: Path, threads: int, *options: str) -> list[str]:
    """``pronk serve`` of a model, on a free port that it tells."""
    return [sys.executable, "-m", "pronk", "serve", f"{MODEL}={path}", "--port", "0", "--json",
            "--threads", str(threads), *options]  # fmt: skip


@dataclass
class Running:
    """A server in a process of its own."""

    url: str
    process: subprocess.Popen[bytes]
    grpc: str | None = None
    log: Any = None


@contextlib.contextmanager
def server(
    command: Sequence[str], url: str | None = None, ready: str = "/ready"
) -> Iterator[Running]:
    """A server from when it answers; without an address, it tells its own in a line of JSON."""
    with tempfile.TemporaryFile() as log:
        out = subprocess.DEVNULL if url else subprocess.PIPE
        child = subprocess.Popen(command, stdout=out, stderr=log)
        try:
            grpc = None
            if url is None:
                assert child.stdout is not None
                told = json.loads(child.stdout.readline() or b"{}")
                url = told.get("url", "")
                grpc = f"127.0.0.1:{told['grpc_port']}" if told.get("grpc_port") else None
            wait_ready(child, f"{url}{ready}", log)
            yield Running(url, child, grpc, log)
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()


def wait_ready(child: subprocess.Popen[bytes], probe: str, log: Any) -> None:
    """Wait until a server answers a probe."""
    for _ in range(1200):
        if child.poll() is not None:
            log.seek(0)
            raise SystemExit(f"a server did not start: {log.read().decode()[-500:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(probe, timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise SystemExit(f"{probe} does not answer")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
