"""Tokens a second against context length, batch size, threads and instruction set.

Steps of the runner are timed, in turns, on a cache of zeros: what keys and values are costs no
time. Measurements beside a slow spell of the machine do not count.

    python benchmarks/scaling.py [MODEL] [--isa amx,avx512,avx2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import output
import tables
from machine import Best, describe, isas, probe

from pronk import resolve
from pronk.checkpoint.open import open_checkpoint
from pronk.engine.runner import Runner
from pronk.engine.weights import load_weights
from pronk.errors import PronkError
from pronk.graph.program import Limits
from pronk.model import compile_checkpoint

PASTS = (0, 512, 1024, 2048, 4096, 7680)
BATCHES = (1, 2, 4, 8, 16)
PROMPT = 512
TOGETHER = 256  # positions of each of many sequences
LEAST = 0.1  # seconds a measurement takes at least


@dataclass(frozen=True)
class Point:
    """One figure: ``against`` names the axis that varies."""

    against: str
    kind: str
    isa: str
    threads: int
    past: int = 0
    sequences: int = 1

    @property
    def x(self) -> int | str:
        """Where the figure lies on its axis."""
        axes: dict[str, int | str] = {
            "context": self.past,
            "batch": self.sequences,
            "isa": self.isa,
            "threads": self.threads,
        }
        return axes[self.against]


def points(names: list[str], threads: int, context: int) -> list[Point]:
    """What is measured: every axis through the best instruction set with all threads."""
    best = names[0]
    found = []
    for kind in ("decode", "prefill"):
        found += [Point("context", kind, best, threads, p) for p in PASTS if p + PROMPT <= context]
        found += [Point("isa", kind, name, n) for name in names for n in sorted({1, threads})]
        found += [Point("threads", kind, best, n) for n in range(1, threads + 1)]
    return found + [Point("batch", "decode", best, threads, 128, n) for n in BATCHES]


class Scaling:
    """One runner for each instruction set and thread count."""

    def __init__(self, args: argparse.Namespace, names: list[str]) -> None:
        self.path, self.rounds, self.threads = resolve(args.model), args.rounds, args.threads
        with open_checkpoint(self.path) as checkpoint:
            self.spec = checkpoint.spec
        self.context = min(8192, self.spec.context_length)
        self.points = points(names, self.threads, self.context)
        self.runners: dict[tuple[str, int], Runner] = {}
        self.best = Best()

    def runner(self, point: Point) -> Runner:
        key = point.isa, point.threads
        if key not in self.runners:
            with open_checkpoint(self.path) as checkpoint:
                limits = Limits(self.context, max_rows=max(BATCHES), max_sequences=max(BATCHES))
                runner = Runner(compile_checkpoint(checkpoint, limits), point.threads, point.isa)
                load_weights(checkpoint, runner)
            self.runners[key] = runner
        return self.runners[key]

    def work(self, point: Point) -> tuple[Callable[[], object], int]:
        """What is timed, and the tokens it handles."""
        runner = self.runner(point)
        blocks = runner.program.limits.max_blocks
        if point.kind == "prefill":
            at_once, whole = runner.program.limits.max_tokens, [[list(range(blocks))]]

            def prefill() -> None:
                for at in range(0, PROMPT, at_once):
                    n = min(at_once, PROMPT - at)
                    start = point.past + at
                    rows = [n - 1] if at + n == PROMPT else []
                    runner.step([7] * n, list(range(start, start + n)), [0] * n, whole, rows)

            return prefill, PROMPT
        n = point.sequences
        each = blocks if n == 1 else TOGETHER * blocks // self.context
        held = [[list(range(i * each, (i + 1) * each))] for i in range(n)]
        every = list(range(n))
        return lambda: runner.step([7] * n, [point.past] * n, every, held, every), n

    def rate(self, point: Point) -> float:
        """Tokens a second."""
        work, tokens = self.work(point)
        start = time.perf_counter()
        work()
        times = max(1, math.ceil(LEAST / (time.perf_counter() - start)))
        start = time.perf_counter()
        for _ in range(times):
            work()
        return times * tokens / (time.perf_counter() - start)

    def run(self) -> list[dict[str, Any]]:
        """Rounds over all points."""
        seen: dict[Point, list[tuple[float, list[dict[str, float]]]]] = {p: [] for p in self.points}
        before = self.best.see(probe(self.threads, 1))
        for number in range(self.rounds):
            order = self.points if number % 2 else self.points[::-1]
            for point in order:
                value = self.rate(point)
                after = self.best.see(probe(self.threads, 1))
                seen[point].append((value, [before, after]))
                before = after
            print(f"round {number + 1} of {self.rounds}", file=sys.stderr, flush=True)
        rows = []
        for point, found in seen.items():
            limits = self.best.figures
            good = [v for v, probes in found if tables.share(probes, limits) >= tables.SLOW]
            values = good or [v for v, _ in found]
            spread = (max(values) - min(values)) / 2 / statistics.median(values)
            rows.append({
                **asdict(point), "x": point.x, "value": statistics.median(values),
                "spread": spread, "measured": len(good),
            })  # fmt: skip
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", default="", help="names to compare (default: all but generic)")
    output.add_output(parser)
    args = parser.parse_args()
    have = isas()
    names = args.isa.split(",") if args.isa else [n for n in have if n != "generic"] or have
    for name in names:
        if name not in have:
            raise SystemExit(f"scaling.py: this machine runs {', '.join(have)}, not {name}")
    try:
        scaling = Scaling(args, names)
        rows = scaling.run()
    except PronkError as error:
        raise SystemExit(f"scaling.py: {error}") from None
    result = {
        "benchmark": "scaling",
        "command": output.command(),
        "machine": describe(args.threads),
        "model": scaling.path.name,
        "prompt": PROMPT,
        "limits": scaling.best.figures,
        "rows": rows,
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
