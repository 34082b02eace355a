"""What the benchmarks of serving share: servers in processes, clients that load them, figures."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from pronk.checkpoint.tokenizer import Tokenizer
from pronk.evaluate.corpus import load_corpus
from pronk.model import choose_threads

MODEL = "it"  # the name that every server serves its model by


@dataclass
class Seen:
    """What a client saw of one answer: when each piece came, and the text.

    ``end`` is when the answer was whole; ``refused`` the status of one that was not given.
    """

    start: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    end: float = 0.0
    refused: int | str = 0


Ask = Callable[[str, int], Awaitable[Seen]]
"""Asks for a prompt to be continued by so many tokens at most."""


def load_parser(doc: str) -> argparse.ArgumentParser:
    """The options of what loads a server: its model, its threads, its prompts and answers."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, an address or a path")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=choose_threads(None))
    parser.add_argument("--text", help="UTF-8 text of prompts (default: Python's topics)")
    return parser


def words(text: str | None) -> list[str]:
    """The words of a file, or of Python's own documentation."""
    return load_corpus(text).text.split()


def prompts(source: Sequence[str], count: int, seed: int = 0, to: str = "all") -> list[str]:
    """Pieces of a text, 20 to 300 words long.

    Each has a beginning of its own, and those for another side or seed have others: no server
    finds any in its cache.
    """
    rng = random.Random(seed)
    out = []
    for number in range(count):
        length = round(20 * 15 ** rng.random())
        start = rng.randrange(len(source) - length)
        piece = " ".join(source[start : start + length])
        out.append(f"Text {seed}.{number} for {to}. Go on: {piece}")
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


@contextlib.asynccontextmanager
async def over_http(url: str) -> AsyncIterator[Ask]:
    """Streamed completions over HTTP; connections are kept.

    The client has the cores of the server: aiohttp takes the least of them for a line.
    """
    limits = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(url, connector=limits, timeout=timeout) as http:

        async def ask(prompt: str, tokens: int) -> Seen:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                    "stream": True}  # fmt: skip
            seen = Seen(time.perf_counter())
            async with http.post("/v1/completions", json=body) as answer:
                if answer.status != 200:
                    await answer.read()
                    seen.refused, seen.end = answer.status, time.perf_counter()
                    return seen
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        text = "".join(c["text"] for c in json.loads(line[6:])["choices"])
                        if text:
                            seen.times.append(time.perf_counter())
                            seen.text += text
            seen.end = time.perf_counter()
            return seen

        yield ask


@contextlib.asynccontextmanager
async def over_grpc(address: str) -> AsyncIterator[Ask]:
    """Streamed completions over gRPC, on one channel."""
    import grpc

    from pronk.serve.grpc import generation_pb2 as pb

    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_stream(
            "/pronk.v1.Generation/GenerateStream",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GeneratePart.FromString,
        )

        async def ask(prompt: str, tokens: int) -> Seen:
            sampling = pb.Sampling(max_tokens=tokens)
            seen = Seen(time.perf_counter())
            try:
                async for part in method(pb.GenerateRequest(text=prompt, sampling=sampling)):
                    if part.text:
                        seen.times.append(time.perf_counter())
                        seen.text += part.text
            except grpc.aio.AioRpcError as error:
                seen.refused = error.code().name
            seen.end = time.perf_counter()
            return seen

        yield ask


Over = contextlib.AbstractAsyncContextManager[Ask]


async def closed_loop(
    over: Over, asked: Sequence[str], clients: int, tokens: int
) -> tuple[list[Seen], float]:
    """Clients that ask, read the answer and ask again: all answers, and the seconds they took."""
    left = iter(asked)
    done: list[Seen] = []

    async def client(ask: Ask) -> None:
        for prompt in left:
            seen = await ask(prompt, tokens)
            if seen.refused:
                raise SystemExit(f"a request was refused: {seen.refused}")
            done.append(seen)

    async with over as ask:
        start = time.perf_counter()
        await asyncio.gather(*(client(ask) for _ in range(clients)))
        return done, time.perf_counter() - start


async def open_loop(
    over: Over, asked: Sequence[str], rate: float, tokens: int, seed: int = 0
) -> tuple[list[Seen], float]:
    """Requests that come by themselves, as a Poisson process of so many a second."""
    rng = random.Random(seed)
    async with over as ask:
        start = due = time.perf_counter()
        tasks = []
        for prompt in asked:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(prompt, tokens)))
        done = list(await asyncio.gather(*tasks))
        return done, time.perf_counter() - start


def touch(over: Over) -> None:
    """Ask for a few tokens, so that what follows finds memory touched."""
    asyncio.run(closed_loop(over, ["Once upon a time"], 1, 8))


def counted(done: list[Seen], tokenizer: Tokenizer) -> list[Seen]:
    """Answers with their tokens, as one tokenizer counts those of all sides."""
    for seen in done:
        seen.tokens = len(tokenizer.encode(seen.text, add_special=False))
    return done


def summary(done: Sequence[Seen], seconds: float) -> dict[str, Any]:
    """Throughput and percentiles of the answers that were given."""
    given = [seen for seen in done if not seen.refused]
    steps = [
        (seen.times[-1] - seen.times[0]) / (seen.tokens - 1)
        for seen in given
        if seen.tokens > 1 and len(seen.times) > 1
    ]
    return {
        "requests": len(given),
        "tokens": sum(seen.tokens for seen in given),
        "tokens_per_second": sum(seen.tokens for seen in given) / seconds,
        "ttft": percentiles([seen.times[0] - seen.start for seen in given if seen.times]),
        "tpot": percentiles(steps),
        "e2e": percentiles([seen.end - seen.start for seen in given]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, by the nearest rank; nothing of nothing."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {f"p{p}": ordered[min(last, p * len(ordered) // 100)] for p in (50, 90, 99) if ordered}
