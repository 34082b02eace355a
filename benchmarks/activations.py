"""What the precision of activations and of the cache costs and buys: agreement, and speed.

The reference is the same file with its weights dequantized, float32 activations and a float32
cache. Speeds are medians of interleaved rounds.

    python benchmarks/activations.py [MODEL] [--text FILE] [--tokens 2000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import output
from machine import describe
from numpy.typing import NDArray

from pronk import resolve
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.open import open_checkpoint
from pronk.engine.runner import Runner
from pronk.engine.weights import load_weights
from pronk.evaluate.corpus import encode, load_corpus
from pronk.evaluate.windows import log_normalizer
from pronk.graph.program import Limits, compile_program, stored_dtypes

WINDOW = 500


def make_runner(checkpoint: Checkpoint, exact: bool, **limits: object) -> Runner:
    """A loaded runner; an exact one has every matrix in float32."""
    stored = stored_dtypes({n: (t.dtype, t.cols) for n, t in checkpoint.tensors.items()})
    options = Limits(**{"context": 1024, **limits})
    program = compile_program(checkpoint.spec, (lambda _: "f32") if exact else stored, options)
    runner = Runner(program, len(os.sched_getaffinity(0)))
    load_weights(checkpoint, runner)
    return runner


def logits(runner: Runner, ids: list[int]) -> NDArray[np.float32]:
    """Logits of every token of one sequence from its start."""
    blocks = [[list(range(runner.program.limits.max_blocks))]]
    parts = []
    for start in range(0, len(ids), 128):
        part = ids[start : start + 128]
        n = len(part)
        parts.append(
            runner.step(part, list(range(start, start + n)), [0] * n, blocks, list(range(n)))
        )
    return np.concatenate(parts)


def log_probabilities(runner: Runner, ids: list[int]) -> NDArray[np.float64]:
    """Log-softmax of the logits in float64."""
    x = logits(runner, ids).astype(np.float64)
    return x - log_normalizer(x)[:, None]


def speeds(runner: Runner, ids: list[int]) -> tuple[float, float]:
    """Prefill and decode rates in tokens per second."""
    blocks = [[list(range(runner.program.limits.max_blocks))]]
    start = time.perf_counter()
    for at in range(0, 512, 128):
        runner.step(ids[at : at + 128], list(range(at, at + 128)), [0] * 128, blocks, [127])
    middle = time.perf_counter()
    for i in range(100):
        runner.step(ids[i : i + 1], [512 + i], [0], blocks, [0])
    return 512 / (middle - start), 100 / (time.perf_counter() - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--text", help="UTF-8 text (default: Python's topics)")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    output.add_output(parser)
    args = parser.parse_args()
    variants: dict[str, dict[str, Any]] = {
        "float32 activations, bf16 cache": {"exact": True},
        "12 bits, float32 cache": {"exact": False, "kv_dtype": "f32"},
        "12 bits, bf16 cache (default)": {"exact": False},
        "8 bits, bf16 cache": {"exact": False, "activations": "int8"},
    }
    path = resolve(args.model)
    with open_checkpoint(path) as checkpoint:
        ids = encode(load_corpus(args.text), checkpoint.load_tokenizer(), args.tokens)
        reference = make_runner(checkpoint, True, kv_dtype="f32")
        runners = {name: make_runner(checkpoint, **options) for name, options in variants.items()}
    sums = {name: [0.0, 0.0] for name in runners}
    for at in range(0, len(ids), WINDOW):
        part = ids[at : at + WINDOW]
        p = log_probabilities(reference, part)
        for name, runner in runners.items():
            q = log_probabilities(runner, part)
            sums[name][0] += float((p.argmax(1) == q.argmax(1)).sum())
            sums[name][1] += float((np.exp(p) * (p - q)).sum())
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(args.rounds):
        for name, runner in runners.items():
            rates[name].append(speeds(runner, (ids * 512)[:512]))
    rows = {
        name: {
            "top1_agreement": sums[name][0] / len(ids),
            "kl": sums[name][1] / len(ids),
            "prefill": statistics.median(r[0] for r in rates[name]),
            "decode": statistics.median(r[1] for r in rates[name]),
        }
        for name in runners
    }
    result = {
        "benchmark": "activations",
        "command": output.command(),
        "machine": describe(len(os.sched_getaffinity(0))),
        "model": path.name,
        "tokens": len(ids),
        "rows": [{"variant": name, **row} for name, row in rows.items()],
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
