"""What a KV cache of fewer bits takes, costs and buys, and what the rotation before int4 is worth.

Divergence is what `pronk eval --reference` measures, from the same file with a float32 cache. Rates
are of steps of the runner, in turns, on a cache of zeros: what keys and values are costs no time.

    python benchmarks/kv_cache.py [MODEL ...] [--text FILE] [--tokens 4096] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import output
from machine import describe

from pronk import load, resolve
from pronk.checkpoint.open import open_checkpoint
from pronk.engine.runner import Runner
from pronk.engine.weights import load_weights
from pronk.errors import PronkError
from pronk.evaluate.corpus import encode, load_corpus
from pronk.evaluate.divergence import divergence
from pronk.graph.pack import KV_BLOCK
from pronk.graph.program import Limits
from pronk.model import compile_checkpoint

MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")
DTYPES = ("bf16", "int8", "int4", "int4_plain")
PASTS = (2048, 8064)
TOGETHER = 128  # tokens of a prompt
DECODED = 20


def losses(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Divergence from a float32 cache, and bytes, of every kind of cache."""
    rows = []
    with load(name, args.threads, args.window, kv_dtype="f32") as reference:
        ids = encode(load_corpus(args.text), reference.tokenizer, args.tokens)
        for dtype in DTYPES:
            with load(name, args.threads, args.window, kv_dtype=dtype) as model:
                found = divergence(reference, model, ids, args.window, bos=model.tokenizer.bos_id)
            rows.append({"model": Path(name).name, "kv": dtype, **found.to_dict()})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def make_runner(name: str, dtype: str, threads: int) -> Runner:
    """A loaded runner with a context of the longest past."""
    limits = Limits(max(PASTS) + TOGETHER, kv_dtype=dtype)
    with open_checkpoint(resolve(name)) as checkpoint:
        runner = Runner(compile_checkpoint(checkpoint, limits), threads)
        load_weights(checkpoint, runner)
    return runner


def rates(runner: Runner, past: int) -> tuple[float, float]:
    """Tokens a second of a prompt behind a past, and one by one."""
    blocks = [[list(range(runner.program.limits.max_blocks))]]
    places = list(range(past, past + TOGETHER))
    runner.step([7], [past], [0], blocks, [0])
    start = time.perf_counter()
    runner.step([7] * TOGETHER, places, [0] * TOGETHER, blocks, [TOGETHER - 1])
    middle = time.perf_counter()
    for place in places[:DECODED]:
        runner.step([7], [place], [0], blocks, [0])
    return TOGETHER / (middle - start), DECODED / (time.perf_counter() - middle)


def speeds(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates and bytes behind every past, medians of rounds."""
    runners = {dtype: make_runner(name, dtype, args.threads) for dtype in DTYPES[:-1]}
    seen: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for past in PASTS:
            for dtype, runner in runners.items():
                seen.setdefault((dtype, past), []).append(rates(runner, past))
    rows = []
    for (dtype, past), found in seen.items():
        program = runners[dtype].program
        position = program.kv_layer_bytes * program.spec.num_layers // KV_BLOCK
        prefill, decode = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append({"kv": dtype, "past": past, "bytes": position * past,
                     "prefill": prefill, "decode": decode})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: Python's topics)")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7, help="of the rates, on the first model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    output.add_output(parser)
    args = parser.parse_args()
    try:
        found = speeds(args.models[0], args)
        gc.collect()
        rows = [row for name in args.models for row in losses(name, args)]
    except PronkError as error:
        raise SystemExit(f"kv_cache.py: {error}") from None
    result = {
        "benchmark": "kv_cache",
        "command": output.command(),
        "machine": describe(args.threads),
        "model": Path(args.models[0]).name,
        "prompt": TOGETHER,
        "window": args.window,
        "rates": found,
        "rows": rows,
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
