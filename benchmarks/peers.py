"""Pronk beside llama.cpp (llama-cpp-python) on one GGUF file, in one interleaved run.

Each engine lives in a process of its own and answers one measurement at a time, in turns, so that
both meet the same machine. Prompts are random tokens, new for every round. Prints medians, and the
medians of the ratios round by round.

    python benchmarks/peers.py [MODEL] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ENGINES = ("pronk", "llama_cpp")
FIGURES = ("prefill", "decode")

Generate = Callable[[list[int], int], Iterator[int]]


def start_pronk(path: str, threads: int, context: int) -> tuple[Generate, int]:
    """Load with Pronk; gives a generator of greedy tokens and the vocabulary's size."""
    from pronk import SamplingParams, load

    model = load(path, threads=threads, context=context, speculate=False)

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        return (piece.token for piece in model.generate(prompt, params))

    return generate, model.spec.vocab_size


def start_llama_cpp(path: str, threads: int, context: int) -> tuple[Generate, int]:
    """Load with llama.cpp, driven through its C interface so that no wrapper slows it down."""
    import ctypes

    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=context,
        verbose=False)  # fmt: skip
    vocab = model.n_vocab()

    def decode(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        row = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab,))
        return int(row.argmax())

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        token = decode(prompt)
        yield token
        for _ in range(count - 1):
            token = decode([token])
            yield token

    return generate, vocab


def worker(engine: str, path: str, threads: int, context: int) -> None:
    """Answer measurements: a line of JSON in, a line of JSON out."""
    start = time.perf_counter()
    generate, vocab = {"pronk": start_pronk, "llama_cpp": start_llama_cpp}[engine](
        path, threads, context
    )
    print(json.dumps({"load_time": time.perf_counter() - start, "vocab": vocab}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        stamps = [time.perf_counter()]
        for _ in generate(task["prompt"], task["tokens"]):
            stamps.append(time.perf_counter())
        result = {
            "prefill": len(task["prompt"]) / (stamps[1] - stamps[0]),
            "decode": (len(stamps) - 2) / (stamps[-1] - stamps[1]),
            "peak_memory": peak_memory(),
        }
        print(json.dumps(result), flush=True)


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))


class Peer:
    """A worker process."""

    def __init__(self, engine: str, python: str, path: str, threads: int, context: int) -> None:
        command = [python, __file__, path, "--worker", engine, "--threads", str(threads),
                   "--context", str(context)]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self.read()

    def read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise SystemExit(f"a worker ended: {line.strip() or 'is its package installed?'}")
        return dict(json.loads(line))

    def measure(self, prompt: list[int], tokens: int) -> dict[str, float]:
        assert self.process.stdin is not None
        print(json.dumps({"prompt": prompt, "tokens": tokens}), file=self.process.stdin, flush=True)
        return self.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a GGUF file or a name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--peer-python", default=sys.executable, help="one with llama-cpp-python")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.model, args.threads, args.context)
        return
    from pronk import resolve

    path = str(resolve(args.model))
    pythons = {"pronk": sys.executable, "llama_cpp": args.peer_python}
    peers = {e: Peer(e, pythons[e], path, args.threads, args.context) for e in ENGINES}
    draw = random.Random(0)
    vocab = int(peers["pronk"].loaded["vocab"])
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds + 1):
        prompt = [draw.randrange(vocab) for _ in range(args.prompt_tokens)]
        order = ENGINES if number % 2 else ENGINES[::-1]
        measured = {e: peers[e].measure(prompt, args.tokens) for e in order}
        if number:  # the first round warms up
            rounds.append(measured)
    result = {
        "model": path,
        "threads": args.threads,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "engines": {
            e: {
                **{f: statistics.median(r[e][f] for r in rounds) for f in FIGURES},
                "load_time": peers[e].loaded["load_time"],
                "peak_memory": rounds[-1][e]["peak_memory"],
            }
            for e in ENGINES
        },
        "ratios": {
            f: statistics.median(r["pronk"][f] / r["llama_cpp"][f] for r in rounds) for f in FIGURES
        },
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{path}, {args.threads} threads, {args.rounds} rounds")
    for e, figures in result["engines"].items():
        print(
            f"  {e:<10} prefill {figures['prefill']:7.1f}/s  decode {figures['decode']:6.1f}/s  "
            f"load {figures['load_time']:.2f} s  peak {figures['peak_memory'] / 1e6:.1f} MB"
        )
    print("  ratio      " + "  ".join(f"{f} {result['ratios'][f]:.2f}" for f in FIGURES))


if __name__ == "__main__":
    main()
