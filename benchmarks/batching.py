"""What sharing blocks and steps buys: times to the first token, and between tokens under load.

One loaded model is served to requests that come from another thread. Prompts are random tokens.
``prefix``: a prompt of 2,000 tokens and a short question, whose 2,000 tokens are new or known.
``short``: a short prompt right behind a long one, beside the same prompt alone.
``tpot``: what 8 decoding requests wait for a token while long prompts keep coming, without and
with a target.

    python benchmarks/batching.py [--model MODEL] [--rounds 5] [--target 0.05] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import pairwise
from queue import Queue
from typing import Any

import output
from machine import describe

from pronk import SamplingParams, load, resolve
from pronk.engine.service import Service

PREFIX, QUESTION, LONG, DECODES = 2000, 24, 8000, 8


class Asked:
    """A request, and when each of its tokens came."""

    def __init__(self, service: Service, prompt: list[int], tokens: int, priority: int = 0) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self.stamps: list[float] = []
        self.cached = 0
        self._events: Queue[Any] = Queue()
        self.start = time.perf_counter()
        self.handle = service.submit(prompt, params, self._on_event, priority=priority)

    def _on_event(self, event: Any) -> None:
        self.stamps.append(time.perf_counter())
        self.cached = event.cached_tokens
        if event.finish_reason:
            self._events.put(event.finish_reason)

    def wait(self) -> Asked:
        self._events.get(timeout=600)
        return self

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0] - self.start


def prefix(service: Service, words: random.Random, vocab: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token, new and known."""

    def tokens(count: int) -> list[int]:
        return [words.randrange(vocab) for _ in range(count)]

    new, known = [], []
    for _ in range(rounds):
        start = tokens(PREFIX)
        new.append(Asked(service, start + tokens(QUESTION), 1).wait().ttft)
        again = Asked(service, start + tokens(QUESTION), 1).wait()
        known.append(again.ttft)
    ratios = [a / b for a, b in zip(new, known, strict=True)]
    return {
        "before": statistics.median(new),
        "after": statistics.median(known),
        "ratio": statistics.median(ratios),
        "cached": again.cached,
    }


def short(service: Service, words: random.Random, vocab: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of a short prompt: of a long one before it, and its own."""

    def tokens(count: int) -> list[int]:
        return [words.randrange(vocab) for _ in range(count)]

    long_ttft, behind, alone = [], [], []
    for _ in range(rounds):
        alone.append(Asked(service, tokens(QUESTION), 1).wait().ttft)
        first = Asked(service, tokens(LONG), 1)
        time.sleep(0.1)
        behind.append(Asked(service, tokens(QUESTION), 1).wait().ttft)
        long_ttft.append(first.wait().ttft)
    ratios = [a / b for a, b in zip(long_ttft, behind, strict=True)]
    return {
        "before": statistics.median(long_ttft),
        "after": statistics.median(behind),
        "ratio": statistics.median(ratios),
        "alone": statistics.median(alone),
    }


def tpot(
    service: Service, words: random.Random, vocab: int, target: float, seconds: float
) -> dict[str, Any]:
    """Seconds between tokens, the ninth of ten, while prompts keep coming."""

    def side(value: float | None) -> tuple[float, float]:
        def aim(engine: Any) -> None:
            engine.scheduler.pace.target = value

        service.call(aim).result()
        asked = [Asked(service, [words.randrange(vocab)], 4000) for _ in range(DECODES)]
        prompts = 0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            Asked(service, [words.randrange(vocab) for _ in range(500)], 1).wait()
            prompts += 500
        for request in asked:
            service.cancel(request.handle)
        gaps = []
        for request in asked:
            stamps = request.wait().stamps[8:-1]
            gaps += [b - a for a, b in pairwise(stamps)]
        return statistics.quantiles(gaps, n=10)[8], prompts / seconds

    before, rate = side(None)
    after, slower = side(target)
    return {
        "before": before,
        "after": after,
        "ratio": before / after,
        "target": target,
        "prompt_rate": [rate, slower],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, an address or a path")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", type=float, default=0.05, help="seconds an output token")
    parser.add_argument("--seconds", type=float, default=10, help="of each side of tpot")
    parser.add_argument("--threads", type=int)
    output.add_output(parser)
    args = parser.parse_args()
    path = resolve(args.model)
    model = load(path, args.threads, context=8192, kv_tokens=16384, speculate=False)
    words, vocab = random.Random(1), model.spec.vocab_size
    with model.service() as service:
        Asked(service, [words.randrange(vocab) for _ in range(300)], 16).wait()
        tasks = {
            "prefix": prefix(service, words, vocab, args.rounds),
            "short": short(service, words, vocab, min(args.rounds, 3)),
            "tpot": tpot(service, words, vocab, args.target, args.seconds),
        }
    result = {
        "benchmark": "batching",
        "command": output.command(),
        "machine": describe(model.threads),
        "model": path.name,
        "rounds": args.rounds,
        "tasks": tasks,
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
