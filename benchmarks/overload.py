"""A server that is asked for ten times what it can do: what it takes it serves in time.

First what it carries is measured, with as many clients as keep it busy. Then requests come as a
Poisson process: at nine tenths of that, and at ten times, without ``--target-ttft`` and with it, at
the 99th percentile that the first load had. Requests that are refused are, and how soon, is told
apart from those that are taken.

    python benchmarks/overload.py [--model MODEL] [--overload 10] [--seconds 40] [--tokens 48]
                                  [--text FILE] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import output
from clients import (
    Seen,
    closed_loop,
    counted,
    load_parser,
    open_loop,
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

from pronk import resolve
from pronk.checkpoint.open import open_checkpoint

CONTEXT, CONTEXTS, CLIENTS = 1024, 8, 32
NEAR = 0.9  # of what the server carries


class Overload:
    """The loads, each on a server of its own."""

    def __init__(self, args: argparse.Namespace, path: Path) -> None:
        self.args, self.path = args, path
        self.words = words(args.text)
        with open_checkpoint(path) as checkpoint:
            self.tokenizer = checkpoint.load_tokenizer()

    def _server(self, *options: str) -> Any:
        return server(pronk_command(
            self.path, self.args.threads, "--context", str(CONTEXT),
            "--kv-tokens", str(CONTEXTS * CONTEXT), *options,
        ))  # fmt: skip

    def carried(self) -> float:
        """Requests a second with many clients, once the first of them have come and gone."""
        asked = prompts(self.words, 4 * CLIENTS, seed=1)
        with self._server() as running:
            touch(over_http(running.url))
            done, _ = asyncio.run(closed_loop(
                over_http(running.url), asked, CLIENTS, self.args.tokens))  # fmt: skip
        ends = sorted(seen.end for seen in done)
        # From when all clients are busy to when the first has nothing left to ask.
        first, last = CLIENTS, len(ends) - CLIENTS
        return (last - first) / (ends[last] - ends[first])

    def load(self, rate: float, target: float | None) -> dict[str, Any]:
        """Figures of requests that come at a rate."""
        asked = prompts(self.words, round(rate * self.args.seconds), seed=2)
        options = () if target is None else ("--target-ttft", f"{target:.3f}s")
        with self._server(*options) as running:
            # It must have seen load before it can foretell any.
            warm = prompts(self.words, 32, seed=3)
            asyncio.run(closed_loop(over_http(running.url), warm, 8, self.args.tokens))
            done, seconds = asyncio.run(
                open_loop(over_http(running.url), asked, rate, self.args.tokens)
            )
        return {"rate": rate, "target": target, "seconds": seconds,
                **summary(counted(done, self.tokenizer), seconds), **refusals(done)}  # fmt: skip


def refusals(done: list[Seen]) -> dict[str, Any]:
    """How many were refused, how, and how soon."""
    refused = [seen for seen in done if seen.refused]
    return {
        "refused": dict(Counter(str(seen.refused) for seen in refused)),
        "refusal": percentiles([seen.end - seen.start for seen in refused]),
    }


def main() -> None:
    parser = load_parser(__doc__)
    parser.add_argument("--overload", type=float, default=10, help="times what it carries")
    parser.add_argument("--seconds", type=float, default=40, help="that requests come for")
    output.add_output(parser)
    args = parser.parse_args()
    path = resolve(args.model)
    bench = Overload(args, path)
    carried = bench.carried()
    near = bench.load(NEAR * carried, None)
    target = near["ttft"]["p99"]
    runs = [near, *(bench.load(args.overload * carried, one) for one in (None, target))]
    result = {
        "benchmark": "overload",
        "command": output.command(),
        "machine": describe(args.threads),
        "model": path.name,
        "carried": carried,
        "runs": [{"load": run["rate"] / carried, **run} for run in runs],
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
