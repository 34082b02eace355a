"""A server under load: tokens a second and latencies, over real HTTP and gRPC.

Closed loop: each client asks, reads the stream to its end, and asks again. Open loop: requests come
as a Poisson process, at shares of what a side carried with the most clients. Prompts are pieces of
a text, of mixed length, and no two are the same. The other server gets the same file, the same
prompts and as many threads; ``engine`` is Pronk's engine alone in its own process, fed with token
ids, which tells what HTTP, JSON and text cost on top. Tokens of all sides are counted by one
tokenizer, from the text. A repeated prefix is a prompt of 2,000 tokens whose beginning was asked
before, on a server of its own. A round trip is a prompt of one word answered by one token, with
nothing else to do.

    python benchmarks/serve.py [--model MODEL] [--clients 1,4,16,64] [--loads 0.5,0.8]
                               [--requests 16] [--tokens 48] [--rounds 3] [--text FILE]
                               [--llama-python PATH] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import output
from clients import (
    MODEL,
    Over,
    closed_loop,
    counted,
    free_port,
    load_parser,
    open_loop,
    over_grpc,
    over_http,
    percentiles,
    prompts,
    pronk_command,
    server,
    summary,
    touch,
    words,
)
from machine import describe

from pronk import SamplingParams, load, resolve
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.tokenizer import Tokenizer
from pronk.engine.request import Event
from pronk.engine.service import Service

CONTEXT = 1024
WORD, TRIPS = "Hello", 100
PREFIX, PREFIXES = 2000, 5  # tokens, and how many of them
Reach = Callable[[], Over]


def engine_alone(
    service: Service, asked: Sequence[list[int]], clients: int, tokens: int
) -> tuple[int, list[float], float]:
    """Tokens of the engine alone, fed with ids by as many askers; times to the first; seconds."""
    params = SamplingParams(max_tokens=tokens)
    left, count = iter(asked), 0
    first: list[float] = []
    loop = asyncio.new_event_loop()

    async def client() -> None:
        nonlocal count
        for ids in left:
            ended, start, times = loop.create_future(), time.perf_counter(), []

            def heard(
                event: Event, ended: asyncio.Future[None] = ended, times: list[float] = times
            ) -> None:
                nonlocal count
                count += event.finish_reason != "stop"
                times.append(time.perf_counter())
                if event.finish_reason:
                    loop.call_soon_threadsafe(ended.set_result, None)

            service.submit(ids, params, heard)
            await ended
            first.append(times[0] - start)

    async def everyone() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    start = time.perf_counter()
    loop.run_until_complete(everyone())
    return count, first, time.perf_counter() - start


def start_sides(
    args: argparse.Namespace, path: Path, stack: contextlib.ExitStack
) -> dict[str, Reach]:
    """Start the servers; how each side is reached, by its name."""
    pronk = stack.enter_context(server(pronk_command(
        path, args.threads, "--context", str(CONTEXT), "--grpc-port", "0",
        "--kv-tokens", str(args.kv_contexts * CONTEXT),
    )))  # fmt: skip
    assert pronk.grpc is not None
    address = pronk.grpc
    sides: dict[str, Reach] = {
        "pronk": lambda: over_http(pronk.url),
        "pronk gRPC": lambda: over_grpc(address),
    }
    if args.llama_python:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        llama = [
            args.llama_python, "-m", "llama_cpp.server", "--model", str(path),
            "--model_alias", MODEL, "--host", "127.0.0.1", "--port", str(port),
            "--n_ctx", str(CONTEXT),
            "--n_threads", str(args.threads), "--n_threads_batch", str(args.threads),
            "--interrupt_requests", "false",
        ]  # fmt: skip
        stack.enter_context(server(llama, url, "/v1/models"))
        sides["llama_cpp.server"] = lambda: over_http(url)
    for reach in sides.values():
        touch(reach())
    return sides


class Bench:
    """Runs the sides in turns, so that a slow spell of the machine meets all of them."""

    def __init__(
        self, args: argparse.Namespace, tokenizer: Tokenizer, sides: dict[str, Reach],
        service: Service,
    ) -> None:  # fmt: skip
        self.args, self.tokenizer, self.sides, self.service = args, tokenizer, sides, service
        self.words = words(args.text)
        self.counts = [int(text) for text in args.clients.split(",")]
        self.loads = [float(text) for text in args.loads.split(",") if text]
        self.runs: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.asked_tokens: list[int] = []

    def turn(self, turn: int) -> None:
        """One round of all loads."""
        for count in self.counts:
            self.closed(turn, count)
        for share in self.loads:
            self.opened(turn, share)

    def _sides(self, turn: int) -> list[tuple[str, Reach]]:
        # Others take long, and only Pronk has an engine and a second protocol to be held to.
        return [(n, r) for n, r in self.sides.items() if not turn or n.startswith("pronk")]

    def closed(self, turn: int, count: int) -> None:
        """As many clients, each with one request at a time."""
        where = {"round": turn, "clients": count}

        def asked_of(side: str) -> list[str]:
            most = max(self.args.requests, count)
            return prompts(self.words, most, seed=1000 * turn + count, to=side)

        for name, reach in self._sides(turn):
            asked = asked_of(name)
            done, seconds = asyncio.run(closed_loop(reach(), asked, count, self.args.tokens))
            self.runs.append(
                {"side": name, **where, **summary(counted(done, self.tokenizer), seconds)}
            )
        ids = [self.tokenizer.encode(prompt) for prompt in asked_of("engine")]
        self.asked_tokens += map(len, ids)
        tokens, first, seconds = engine_alone(self.service, ids, count, self.args.tokens)
        alone = {"requests": len(ids), "tokens": tokens, "ttft": percentiles(first)}
        rate = {"tokens_per_second": tokens / seconds}
        self.runs.append({"side": "engine", **where, **alone, **rate})

    def opened(self, turn: int, share: float) -> None:
        """Requests that come by themselves."""
        seed = 1000 * turn + 500 + round(100 * share)
        for name, reach in self._sides(turn):
            asked = prompts(self.words, 2 * self.args.requests, seed, name)
            rate = share * self._carried(name)
            run = open_loop(reach(), asked, rate, self.args.tokens, seed=turn)
            done, seconds = asyncio.run(run)
            self.open.append({"side": name, "round": turn, "load": share, "rate": rate,
                              **summary(counted(done, self.tokenizer), seconds)})  # fmt: skip

    def _carried(self, name: str) -> float:
        """Requests a second of a side's first round with the most clients."""
        most = max(self.counts)
        run = next(r for r in self.runs if (r["side"], r["clients"]) == (name, most))
        return float(run["requests"] * run["tokens_per_second"] / run["tokens"])

    def trips(self) -> dict[str, dict[str, float]]:
        """Seconds of round trips of each side, one after the other."""
        found = {}
        for name, reach in self._sides(1):
            done, _ = asyncio.run(closed_loop(reach(), [WORD] * TRIPS, 1, 1))
            found[name] = percentiles([seen.end - seen.start for seen in done])
        ids = [self.tokenizer.encode(WORD)] * TRIPS
        _, first, _ = engine_alone(self.service, ids, 1, 1)
        return {**found, "engine": percentiles(first)}

    def prefixes(self, path: Path) -> dict[str, Any]:
        """Seconds to the first token of long prompts, and of others with the same beginning.

        Between the two comes another long prompt, so that more than the last one must be kept.
        """
        text = " ".join(self.words)
        begins = []
        for at in range(PREFIXES + 1):
            rest = text[at * len(text) // (PREFIXES + 1) :][: 12 * PREFIX]
            begins.append(self.tokenizer.decode(self.tokenizer.encode(rest)[:PREFIX]))
        asked = [f"{begins[0]} One:"]
        for begin in begins[1:]:
            asked += [f"{begin} One:", f"{begins[0]} {len(asked)}:", f"{begin} Two:"]
        context = 2 * PREFIX
        command = pronk_command(path, self.args.threads, "--context", str(context))
        with server(command) as running:
            touch(over_http(running.url))
            done, _ = asyncio.run(closed_loop(over_http(running.url), asked, 1, 1))
        first = [seen.end - seen.start for seen in done]
        cold, warm = first[1::3], first[3::3]
        return {
            "tokens": PREFIX, "cold": cold, "warm": warm,
            "ratio": statistics.median(a / b for a, b in zip(cold, warm, strict=True)),
        }  # fmt: skip

    def ratios(
        self, side: str, other: str, key: Callable[[dict[str, Any]], float]
    ) -> dict[str, float]:
        """The median over rounds of a figure of one side over another's, by clients."""
        values = {(r["side"], r["round"], r["clients"]): key(r) for r in self.runs}
        rounds = range(self.args.rounds)
        return {
            str(c): statistics.median(values[side, t, c] / values[other, t, c] for t in rounds)
            for c in self.counts
        }


def main() -> None:
    parser = load_parser(__doc__)
    parser.add_argument("--clients", default="1,4,16,64", help="numbers of clients")
    parser.add_argument("--loads", default="0.5,0.8", help="shares of what a side carries")
    parser.add_argument("--requests", type=int, default=16, help="of all clients, or one for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-contexts", type=int, default=8, help="size of Pronk's KV cache")
    parser.add_argument("--llama-python", metavar="PATH", help="a Python with llama_cpp.server")
    output.add_output(parser)
    args = parser.parse_args()
    path = resolve(args.model)
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.load_tokenizer()
    with contextlib.ExitStack() as stack:
        sides = start_sides(args, path, stack)
        model = stack.enter_context(
            load(path, args.threads, CONTEXT, kv_tokens=args.kv_contexts * CONTEXT)
        )
        service = stack.enter_context(model.service())
        service.embed(tokenizer.encode("Once upon a time")).result()  # memory is touched
        bench = Bench(args, tokenizer, sides, service)
        for turn in range(args.rounds):
            bench.turn(turn)
        trips = bench.trips()
        prefixes = bench.prefixes(path)
    lost = bench.ratios("pronk", "engine", lambda run: run["tokens_per_second"])
    result = {
        "benchmark": "serve",
        "command": output.command(),
        "machine": describe(args.threads),
        "model": path.name,
        "prompt_tokens": statistics.mean(bench.asked_tokens),
        "runs": bench.runs,
        "open": bench.open,
        "round_trip": trips,
        "prefix": prefixes,
        "grpc": {
            "rate": bench.ratios("pronk gRPC", "pronk", lambda run: run["tokens_per_second"]),
            "ttft": bench.ratios("pronk gRPC", "pronk", lambda run: run["ttft"]["p50"]),
        },
        "overhead": {count: 1 - ratio for count, ratio in lost.items()},
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
