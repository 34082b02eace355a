"""What sparse activation buys: divergence, share of zeros and speed of a model, and exact relu.

A model's thresholds are calibrated to several divergences, and measured on another text; its
speed with and without is of steps of one token, in turns of 32. The relu model has random weights,
so that a share of its gates is open: each by itself, or 32 neighbours together. Without skipping
it computes the same bits; the script fails if one differs.

    python benchmarks/sparse_mlp.py [MODEL ...] [--text FILE] [--rounds 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import output
from machine import describe
from numpy.typing import NDArray

from pronk.checkpoint.blocks import quantize
from pronk.checkpoint.sources import resolve
from pronk.engine.runner import Runner
from pronk.evaluate.corpus import Corpus, default_corpus, encode, load_corpus
from pronk.evaluate.divergence import divergence
from pronk.evaluate.sparsity import activity, calibrate
from pronk.graph.passes import CPU_PASSES, skip_inactive
from pronk.graph.program import Limits, compile_program
from pronk.graph.rope import model_frequencies
from pronk.graph.sparse import SparseMlp
from pronk.model import load
from pronk.spec import LayerSpec, ModelSpec

BUDGETS = (0.003, 0.01, 0.03, 0.1)  # nats a token
OPEN = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # shares of gates
TOKENS = 32  # steps of a round
CONTEXT = 512
RELU = ModelSpec(
    family="llama", name="relu", vocab_size=4096, hidden_size=1024, intermediate_size=4096,
    num_heads=16, num_kv_heads=4, head_dim=64, norm_eps=1e-5, context_length=CONTEXT,
    tie_embeddings=True, activation="relu", layers=(LayerSpec(),) * 12,
)  # fmt: skip


def turns(steps: dict[str, Callable[[int], None]], rounds: int) -> dict[str, Any]:
    """Medians of tokens a second, and of the ratio to the first, which takes turns with it."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        spent = {}
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            for i in range(TOKENS):
                steps[name](i)
            spent[name] = time.perf_counter() - start
        for name, seconds in spent.items() if turn else ():  # the first is to warm up
            rates[name].append(TOKENS / seconds)
    first = rates[next(iter(steps))]
    return {
        name: {
            "decode": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, first, strict=True)),
        }
        for name, found in rates.items()
    }


def of_model(name: str, text: Corpus, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A model's figures by budget."""
    path, found = resolve(name), []
    with load(path, args.threads, CONTEXT, speculate=False) as dense:
        rows = min(256, (128 << 20) // (4 * dense.spec.vocab_size))
        ids = encode(default_corpus(), dense.tokenizer, 256 + rows)
        held_out = encode(text, dense.tokenizer, args.tokens)
        for budget in args.budgets:
            chosen = calibrate(dense, ids, rows, kl=budget)
            dense.set_thresholds([0.0] * len(chosen.thresholds))
            policy = SparseMlp(chosen.thresholds)
            with load(path, args.threads, CONTEXT, speculate=False, sparse_mlp=policy) as sparse:
                sparse.watch()
                apart = divergence(dense, sparse, held_out, bos=dense.tokenizer.bos_id)
                shares = activity(sparse.activity())
                sparse.watch(False)
                steps = {
                    which: lambda i, m=model: m.logits(held_out[i : i + 1])
                    for which, model in (("dense", dense), ("sparse", sparse))
                }
                speed = turns(steps, args.rounds)["sparse"]["ratio"] if args.rounds else None
            shown = shares.to_dict()
            del shown["layers"]
            found.append({"model": name, "budget": budget, "calibrated": chosen.kl,
                          **apart.to_dict(), **shown, "ratio": speed})  # fmt: skip
            print(found[-1], file=sys.stderr, flush=True)
    return found


def relu_weights(share: float, together: int) -> dict[str, NDArray[np.float32]]:
    """Random weights of which a share of the gates is open for any token.

    Every embedding has one large element, of which each gate's row takes off what leaves that
    share of a normal distribution; rows of neighbours that open together are alike.
    """
    rng = np.random.default_rng(7)
    hidden, width = RELU.hidden_size, RELU.intermediate_size

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    embed = normal(RELU.vocab_size, hidden)
    embed[:, 0] = 32.0
    gate = np.repeat(normal(width // together, hidden), together, 0)
    # After the norm the others' root mean square is 1 / sqrt(2), and this element 32 / sqrt(2).
    gate[:, 0] = -NormalDist().inv_cdf(1 - share) * np.sqrt(hidden) / 32.0
    kv = RELU.num_kv_heads * RELU.head_dim
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    small = {"o_proj": 1e-4, "down_proj": 1e-4}  # layers leave the embedding much as it is
    weights = {name: small.get(name, 0.03) * normal(*size) for name, size in sizes.items()}
    return {"embed_tokens": embed, "gate_proj": gate, **weights}


def relu_runner(rows: dict[str, NDArray[np.uint8]], skip: bool, args: argparse.Namespace) -> Runner:
    """The relu model, with skipping or without; all layers have the same weights."""
    passes = tuple(p for p in CPU_PASSES if skip or p is not skip_inactive)
    program = compile_program(RELU, lambda _: args.format, Limits(CONTEXT), passes)
    runner = Runner(program, args.threads, args.isa)
    for name, weight in program.graph.weights.items():
        at = program.layout.weight_offsets[name]
        if weight.rows == 1:
            computed = model_frequencies(RELU, name, CONTEXT)
            runner.executor.write(at, np.ones(weight.cols, np.float32)
                                  if computed is None else computed.astype(np.float32))  # fmt: skip
        else:
            part = rows[name.split(".")[-2]]
            runner.executor.pack(weight.dtype, at, weight.rows, weight.cols, 0, part)
    return runner


def of_relu(share: float, together: int, args: argparse.Namespace) -> dict[str, Any]:
    """What skipping does for the relu model."""
    rows = {name: quantize(w, args.format) for name, w in relu_weights(share, together).items()}
    runners = {name: relu_runner(rows, name == "skip", args) for name in ("dense", "skip")}
    blocks = [[list(range(-(-CONTEXT // 32)))]]

    def step(runner: Runner, i: int) -> NDArray[np.float32]:
        token = i * 997 % RELU.vocab_size
        return runner.step([token], [i], [0], blocks, [0])

    runners["skip"].watch()
    for i in range(TOKENS):
        if not np.array_equal(step(runners["dense"], i), step(runners["skip"], i)):
            raise SystemExit(f"skipping changed the logits of token {i}")
    shares = activity(runners["skip"].activity()).to_dict()
    runners["skip"].watch(False)
    speed = turns({n: lambda i, r=r: step(r, i) for n, r in runners.items()}, args.rounds)
    found = {"open": share, "together": together, "skipped": shares["skipped"],
             "skipped_groups": shares["skipped_groups"], **speed["skip"]}  # fmt: skip
    print(found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--text", help="UTF-8 text to measure on (default: Python's topics)")
    parser.add_argument("--tokens", type=int, default=2000, help="of the text")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--open", type=float, nargs="*", default=OPEN)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--format", default="q4_0", help="of the relu model's weights")
    parser.add_argument("--isa", default="")
    output.add_output(parser)
    args = parser.parse_args()
    text = load_corpus(args.text)
    result = {
        "benchmark": "sparse_mlp",
        "command": output.command(),
        "machine": describe(args.threads),
        "calibrated_on": default_corpus().name,
        "text": text.name,
        "models": [row for name in args.models for row in of_model(name, text, args)],
        "relu": [of_relu(share, n, args) for n in (1, 32) for share in args.open],
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
