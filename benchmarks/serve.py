"""A server under load: tokens a second and latencies of 1, 4 and 16 clients over real HTTP.

Closed loop: each client asks, reads the stream to its end, and asks again. Prompts are pieces of
this repository's texts, of mixed length, and no two are the same. The other server gets the same
file, the same prompts and as many threads; ``engine`` is Pronk's engine alone in its own process,
fed with token ids, which tells what HTTP, JSON and text cost on top. Tokens of all sides are
counted by one tokenizer, from the text.

    python benchmarks/serve.py [--model MODEL] [--clients 1,4,16] [--requests 16] [--tokens 48]
                               [--rounds 3] [--llama-python PATH] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import output
from clients import MODEL, free_port, prompts, server
from machine import describe

from pronk import SamplingParams, load, resolve
from pronk.checkpoint.open import open_checkpoint
from pronk.engine.request import Event
from pronk.engine.service import Service
from pronk.model import choose_threads

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 1024


@dataclass
class Seen:
    """What a client saw of one answer: when each piece came, and the text."""

    start: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0


def texts() -> list[str]:
    """The words of the repository's texts."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return " ".join(file.read_text() for file in files).split()


async def ask(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> Seen:
    """One streamed completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "stream": True}  # fmt: skip
    seen = Seen(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise SystemExit(f"HTTP {answer.status_code}: {answer.text[:200]}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text = "".join(c["text"] for c in json.loads(line[6:])["choices"])
                if text:
                    seen.times.append(time.perf_counter())
                    seen.text += text
    return seen


async def closed_loop(
    url: str, model: str, asked: Sequence[str], clients: int, tokens: int
) -> tuple[list[Seen], float]:
    """All answers, and the seconds they took."""
    left = iter(asked)
    done: list[Seen] = []

    async def client(http: httpx.AsyncClient) -> None:
        for prompt in left:
            done.append(await ask(http, model, prompt, tokens))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return done, time.perf_counter() - start


def summary(done: Sequence[Seen], seconds: float) -> dict[str, Any]:
    """Throughput and percentiles."""
    steps = [
        (seen.times[-1] - seen.times[0]) / (seen.tokens - 1)
        for seen in done
        if seen.tokens > 1 and len(seen.times) > 1
    ]
    ttft = [seen.times[0] - seen.start for seen in done if seen.times]
    return {
        "requests": len(done),
        "tokens": sum(seen.tokens for seen in done),
        "tokens_per_second": sum(seen.tokens for seen in done) / seconds,
        "ttft": percentiles(ttft),
        "tpot": percentiles(steps),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, by the nearest rank."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {f"p{p}": ordered[min(last, p * len(ordered) // 100)] for p in (50, 90, 99)}


def engine_alone(
    service: Service, asked: Sequence[list[int]], clients: int, tokens: int
) -> tuple[int, float]:
    """Tokens of the engine alone, fed with ids by as many askers; and the seconds."""
    params = SamplingParams(max_tokens=tokens)
    left, count = iter(asked), 0
    loop = asyncio.new_event_loop()

    async def client() -> None:
        nonlocal count
        for ids in left:
            ended = loop.create_future()

            def heard(event: Event, ended: asyncio.Future[None] = ended) -> None:
                nonlocal count
                count += event.finish_reason != "stop"
                if event.finish_reason:
                    loop.call_soon_threadsafe(ended.set_result, None)

            service.submit(ids, params, heard)
            await ended

    async def everyone() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    start = time.perf_counter()
    loop.run_until_complete(everyone())
    return count, time.perf_counter() - start


def sides(args: argparse.Namespace, path: Path) -> dict[str, tuple[list[str], str, str]]:
    """The servers: command, address and probe."""
    port, other = free_port(), free_port()
    pronk = [
        sys.executable, "-m", "pronk", "serve", f"{MODEL}={path}", "--port", str(port),
        "--threads", str(args.threads), "--context", str(CONTEXT),
        "--kv-tokens", str(args.kv_contexts * CONTEXT),
    ]  # fmt: skip
    found = {"pronk": (pronk, f"http://127.0.0.1:{port}", "/ready")}
    if args.llama_python:
        llama = [
            args.llama_python, "-m", "llama_cpp.server", "--model", str(path),
            "--model_alias", MODEL, "--host", "127.0.0.1", "--port", str(other),
            "--n_ctx", str(CONTEXT),
            "--n_threads", str(args.threads), "--n_threads_batch", str(args.threads),
            "--interrupt_requests", "false",
        ]  # fmt: skip
        found["llama_cpp.server"] = (llama, f"http://127.0.0.1:{other}", "/v1/models")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, an address or a path")
    parser.add_argument("--clients", default="1,4,16", help="numbers of clients")
    parser.add_argument("--requests", type=int, default=16, help="of all clients together")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-contexts", type=int, default=8, help="size of Pronk's KV cache")
    parser.add_argument("--llama-python", metavar="PATH", help="a Python with llama_cpp.server")
    output.add_output(parser)
    args = parser.parse_args()
    args.threads = choose_threads(args.threads)
    path = resolve(args.model)
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.load_tokenizer()
    counts = [int(text) for text in args.clients.split(",")]
    words, runs = texts(), list[dict[str, Any]]()
    asked_tokens: list[int] = []
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, (command, url, ready) in sides(args, path).items():
            stack.enter_context(server(command, url, ready))
            asyncio.run(closed_loop(url, MODEL, ["Once upon a time"], 1, 8))
            urls[name] = url
        model = stack.enter_context(
            load(path, args.threads, CONTEXT, kv_tokens=args.kv_contexts * CONTEXT)
        )
        service = stack.enter_context(model.service())
        service.embed(tokenizer.encode("Once upon a time")).result()  # memory is touched
        # Sides take turns, so that a slow spell of the machine meets all of them.
        for turn, count in ((turn, count) for turn in range(args.rounds) for count in counts):
            asked = prompts(words, args.requests, seed=1000 * turn + count)
            ids = [tokenizer.encode(prompt) for prompt in asked]
            asked_tokens += map(len, ids)
            for name, url in urls.items():
                if turn and name != "pronk":
                    continue  # it takes long, and only Pronk has an engine to be held to
                done, seconds = asyncio.run(closed_loop(url, MODEL, asked, count, args.tokens))
                for seen in done:
                    seen.tokens = len(tokenizer.encode(seen.text, add_special=False))
                runs.append({"side": name, "round": turn, "clients": count,
                             **summary(done, seconds)})  # fmt: skip
            tokens, seconds = engine_alone(service, ids, count, args.tokens)
            runs.append({"side": "engine", "round": turn, "clients": count, "tokens": tokens,
                         "requests": len(ids), "tokens_per_second": tokens / seconds})  # fmt: skip
    rates = {(r["side"], r["round"], r["clients"]): r["tokens_per_second"] for r in runs}
    result = {
        "benchmark": "serve",
        "command": output.command(),
        "machine": describe(args.threads),
        "model": path.name,
        "prompt_tokens": statistics.mean(asked_tokens),
        "runs": runs,
        "overhead": {
            str(count): statistics.median(
                1 - rates["pronk", turn, count] / rates["engine", turn, count]
                for turn in range(args.rounds)
            )
            for count in counts
        },
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
