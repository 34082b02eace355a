"""A server under every kind of load at once, for long: nothing leaks, hangs or fails.

Clients chat, complete, embed, call over gRPC, ask for forms and tools, talk in conversations that
share beginnings, leave in the middle, send what is no request, and come in bursts that the queue
cannot take. All the while the server's memory, files and KV blocks are sampled. The script fails
if memory still grows after the first fifth, if a block is held or a request runs when all is over,
if a request did not end in its time, if any was answered with a 5xx other than 503, or if the
audit log does not hold. Time that the machine sleeps does not count.

    python benchmarks/soak.py [MODEL] [--minutes 30] [--clients 12] [--text FILE] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import output
from clients import MODEL, Running, pronk_command, server, words
from machine import describe
from soak_load import BODY, DENIED, Load, WrongError

from pronk import resolve
from pronk.errors import PronkError
from pronk.model import choose_threads
from pronk.serve.audit import verify_set

CONTEXT, KV_TOKENS, QUEUE = 1024, 2048, 48
WARM = 0.2  # of the time, before memory is held to its bound
TICK = 1.0
AUDIT_BYTES = 64 << 10  # of a file of the log: there will be many
GUARD = f"""
[[filter]]
name = "deny"
kind = "words"
on = "input"
action = "block"
words = ["{DENIED}"]

[[filter]]
name = "private"
kind = "pii"
action = "flag"

[[filter]]
name = "links"
kind = "regex"
action = "flag"
pattern = "https?://[a-z.]{{1,40}}"

[[filter]]
name = "attack"
kind = "injection"
on = "input"
action = "flag"
"""  # what answers hold is flagged alone, so that they stay what they are
SERIES = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "preempted": "num_preemptions_total",
    "generated": "generation_tokens_total",
}


class Awake:
    """Seconds that this machine was awake for: while it sleeps, nobody waits."""

    def __init__(self) -> None:
        self._total, self._last = 0.0, time.monotonic()

    def now(self) -> float:
        """From the first call on; a gap counts as two ticks at most."""
        return self._total + min(time.monotonic() - self._last, 2 * TICK)

    async def run(self) -> None:
        """Count until cancelled."""
        while True:
            await asyncio.sleep(TICK)
            self._total, self._last = self.now(), time.monotonic()

    async def within(self, seconds: float, work: Coroutine[Any, Any, str]) -> str:
        """What work gives.

        Raises
        ------
        TimeoutError
            If it takes longer.
        """
        task, start = asyncio.create_task(work), self.now()
        while not (await asyncio.wait({task}, timeout=TICK))[0]:
            if self.now() - start > seconds:
                task.cancel()
                await asyncio.wait({task})
                raise TimeoutError
        return task.result()


class Watch:
    """Samples a server while it is under load."""

    def __init__(self, running: Running, every: float, awake: Awake) -> None:
        self.running, self.every, self.awake = running, every, awake
        self.rows: list[dict[str, float]] = []

    async def sample(self, http: httpx.AsyncClient) -> dict[str, float]:
        """Memory, files and threads as the system counts them; the rest as /metrics says."""
        text = (await http.get("/metrics")).text
        process = Path(f"/proc/{self.running.process.pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        row = {
            "time": self.awake.now(),
            "rss": int(status["VmRSS"].split()[0]) * 1024.0,
            "threads": float(status["Threads"]),
            "files": float(len(list((process / "fd").iterdir()))),
        }
        for name, series in SERIES.items():
            row[name] = _value(text, f'pronk:{series}{{model_name="{MODEL}"}}')
        for state in ("held", "cached", "free"):
            series = f'pronk:kv_cache_blocks{{model_name="{MODEL}",state="{state}"}}'
            row[state] = _value(text, series)
        return row

    async def run(self) -> None:
        """Sample until cancelled."""
        async with httpx.AsyncClient(base_url=self.running.url, timeout=None) as http:
            while True:
                self.rows.append(await self.sample(http))
                await asyncio.sleep(self.every)

    async def settled(self, seconds: float) -> dict[str, float]:
        """The figures once nothing runs; what is left after so many seconds, if anything is."""
        async with httpx.AsyncClient(base_url=self.running.url, timeout=None) as http:
            deadline = self.awake.now() + seconds
            while True:
                row = await self.sample(http)
                if not (row["running"] or row["waiting"] or row["held"]):
                    return row
                if self.awake.now() > deadline:
                    return row
                await asyncio.sleep(0.2)


def _value(text: str, series: str) -> float:
    line = next(line for line in text.splitlines() if line.startswith(series + " "))
    return float(line.rsplit(" ", 1)[1])


async def soak(running: Running, args: argparse.Namespace) -> dict[str, Any]:
    """Load a server and say what was seen."""
    load, awake = Load(running, words(args.text), args.seed), Awake()
    watch = Watch(running, args.every, awake)
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    hung: list[str] = []
    longest = 0.0
    names = list(load.kinds)
    weights = [weight for weight, _ in load.kinds.values()]
    deadline = args.minutes * 60

    async def one(name: str) -> str:
        nonlocal longest
        start = awake.now()
        bound = args.bound * (5 if name == "conversation" else 1)  # several requests
        try:
            outcome = await awake.within(bound, load.kinds[name][1]())
        except TimeoutError:
            outcome = "hung"
            hung.append(name)
        except (WrongError, httpx.HTTPError, openai.OpenAIError) as error:
            outcome = "wrong"
            wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])
        counts[name, outcome] += 1
        longest = max(longest, awake.now() - start)
        return outcome

    async def client() -> None:
        while awake.now() < deadline:
            name = load.rng.choices(names, weights)[0]
            if await one(name) == "refused" and name != "bad request":
                await asyncio.sleep(1)

    async def bursts() -> None:
        """More at once than the queue takes."""
        while awake.now() < deadline - args.burst_every:
            await asyncio.sleep(args.burst_every)
            await asyncio.gather(*(one("completion") for _ in range(2 * QUEUE)))

    aside = [asyncio.create_task(awake.run()), asyncio.create_task(watch.run())]
    await asyncio.gather(bursts(), *(client() for _ in range(args.clients)))
    sampling = aside.pop()
    if sampling.done():  # a soak that was seen in part tells nothing
        sampling.result()
    sampling.cancel()
    after = await watch.settled(args.bound)
    aside.pop().cancel()
    await load.http.aclose()
    await load.openai.close()
    return {
        "seconds": watch.rows[-1]["time"],
        "counts": {
            name: {o: n for (k, o), n in sorted(counts.items()) if k == name} for name in names
        },
        "longest": longest,
        "hung": hung,
        "wrong": wrong[:50],
        "growth": growth(watch.rows),
        "after": after,
        "samples": watch.rows,
    }


def growth(rows: list[dict[str, float]]) -> float:
    """Bytes a minute that memory grows by after warming up: the slope of a line through it."""
    begin = WARM * rows[-1]["time"]
    settled = [row for row in rows if row["time"] >= begin]
    if len(settled) < 3:
        return 0.0
    times = [row["time"] / 60 for row in settled]
    return statistics.linear_regression(times, [row["rss"] for row in settled]).slope


def faults(result: dict[str, Any]) -> list[str]:
    """What must not have been, in words."""
    after = result["after"]
    found = [f"hung: {name}" for name in result["hung"]]
    found += [f"wrong: {what}" for what in result["wrong"]]
    if result["growth"] > result["bound_growth"]:
        found.append(f"memory grows by {result['growth'] / 1e6:.2f} MB a minute")
    if after["running"] or after["waiting"]:
        found.append(f"requests are left: {after}")
    if after["held"]:
        found.append(f"{after['held']:.0f} KV blocks are held by nobody's request")
    if result["audit"]["error"]:
        found.append(f"the audit log does not hold: {result['audit']['error']}")
    if result["printed"]:
        found.append(f"the server printed: {result['printed'][:300]}")
    return found


def audited(files: list[Path]) -> dict[str, Any]:
    """Whether an audit log holds, over all its files."""
    try:
        found = verify_set(files)
    except PronkError as error:
        return {"files": len(files), "lines": 0, "error": str(error)}
    return {"files": len(files), "lines": found.lines, "error": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--text", help="UTF-8 text of prompts (default: Python's topics)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--burst-every", type=float, default=60.0, help="seconds between bursts")
    parser.add_argument("--bound", type=float, default=120.0, help="seconds a request may take")
    parser.add_argument("--growth", default=0.5, type=float, help="MB a minute that are no leak")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    output.add_output(parser)
    args = parser.parse_args()
    threads = choose_threads(args.threads)
    path = resolve(args.model)
    with tempfile.TemporaryDirectory() as folder:
        command = pronk_command(
            path, threads, "--context", str(CONTEXT), "--kv-tokens", str(KV_TOKENS),
            "--max-queue", str(QUEUE), "--max-body", str(BODY), "--grpc-port", "0",
            "--audit", f"{folder}/audit.jsonl", "--audit-max-bytes", str(AUDIT_BYTES),
            "--audit-text", "--guard", f"{folder}/guard.toml",
        )  # fmt: skip
        Path(folder, "guard.toml").write_text(GUARD)
        with server(command) as running:
            seen = asyncio.run(soak(running, args))
            running.log.seek(0)
            printed = running.log.read().decode()
        audit = audited(sorted(Path(folder).glob("audit.jsonl*")))
    result = {
        "benchmark": "soak",
        "command": output.command(),
        "machine": describe(threads),
        "model": path.name,
        "bound": args.bound,
        "bound_growth": args.growth * 1e6,
        "warm": WARM,
        "audit": audit,
        # Notes of the start, and changes of latencies, are no faults.
        "printed": "\n".join(line for line in printed.splitlines() if _is_fault(line)),
        **seen,
    }
    output.finish(result, args)
    found = faults(result)
    if found:
        raise SystemExit("\n".join(found))


def _is_fault(line: str) -> bool:
    return not re.match(r"pronk: .*(planned|loaded in|changed from|finishing|stored as)", line)


if __name__ == "__main__":
    main()
