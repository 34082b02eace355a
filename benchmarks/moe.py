"""What choosing experts costs: a mixture against a dense model that reads the same bytes a token.

Both have random weights; steps of one token are timed in turns, one of each. The mixture has 8
experts, of which a token goes to 2, and about 1 billion parameters; the dense model has an MLP as
wide as two experts.

    python benchmarks/moe.py [--format q4_0] [--rounds 9] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import output
from machine import Best, describe, probe
from one_op import Bench, random_rows

from pronk.engine.runner import Runner
from pronk.graph.cost import Step, program_costs
from pronk.graph.memory import weight_bytes
from pronk.graph.program import Limits, Program, compile_program
from pronk.spec import LayerSpec, ModelSpec, MoeSpec

EXPERTS, CHOSEN, WIDTH, LAYERS = 8, 2, 2048, 16
TOKENS = 48  # of a round
MOE = ModelSpec(
    family="mixtral", name="moe", vocab_size=32000, hidden_size=1024, num_heads=16, num_kv_heads=4,
    intermediate_size=WIDTH, head_dim=64, norm_eps=1e-5, context_length=1024, tie_embeddings=False,
    layers=(LayerSpec(mlp="moe"),) * LAYERS, moe=MoeSpec(EXPERTS, CHOSEN, WIDTH),
)  # fmt: skip
DENSE = replace(
    MOE, family="llama", name="dense", intermediate_size=CHOSEN * WIDTH,
    layers=(LayerSpec(),) * LAYERS, moe=None,
)  # fmt: skip


def compiled(spec: ModelSpec, dtype: str, limits: Limits | None = None) -> Program:
    """A program of a spec; routers are float, as checkpoints keep them."""
    return compile_program(spec, lambda n: "f32" if "router" in n else dtype, limits or Limits(256))


def figures(program: Program) -> dict[str, int]:
    """Sizes of a program, and what a step of one token reads of it."""
    weights = program.graph.weights
    costs = program_costs(program, [Step.of([0], [0], [1])])
    return {
        "parameters": sum(w.rows * w.cols for w in weights.values() if w.rows > 1),
        "weights": sum(weight_bytes(w) for w in weights.values()),
        "read": sum(cost.weights for cost in costs),
    }


def loaded(bench: Bench, program: Program) -> Runner:
    """Random weights, so that tokens choose as they like: by routers of their own in each layer.

    Layers add nothing to a token's embedding (scales are zero); else all tokens become alike.
    """
    runner = bench.load(program)
    for name, weight in program.graph.weights.items():
        at = program.layout.weight_offsets[name]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            rows = random_rows(bench.rng, weight.dtype, 512, weight.cols, 0)
            for start in range(0, weight.rows, 512):
                runner.executor.pack(weight.dtype, at, weight.rows, weight.cols, start, rows)
        elif "router" in name:
            values = bench.rng.standard_normal((weight.rows, weight.cols)).astype(np.float32)
            rows = values.view(np.uint8).reshape(weight.rows, -1)
            runner.executor.pack("f32", at, weight.rows, weight.cols, 0, rows)
    return runner


def rates(runners: dict[str, Runner], turn: int) -> dict[str, float]:
    """Tokens a second of decoding: a token of one model, then the same one of the other."""
    spent = dict.fromkeys(runners, 0.0)
    for i in range(TOKENS):
        names = list(runners) if i % 2 else list(runners)[::-1]
        token = (turn * 997 + i * 7919) % MOE.vocab_size
        for name in names:
            runner = runners[name]
            blocks = [[list(range(runner.program.limits.max_blocks))]]
            start = time.perf_counter()
            runner.step([token], [i], [0], blocks, [0])
            spent[name] += time.perf_counter() - start
    return {name: TOKENS / seconds for name, seconds in spent.items()}


def measure(runners: dict[str, Runner], threads: int, rounds: int) -> dict[str, Any]:
    """Rounds, each with what the machine could do beside it."""
    best, found = Best(), []
    rates(runners, 0)
    before = best.see(probe(threads, 1))
    for turn in range(rounds):
        values = rates(runners, turn + 1)
        after = best.see(probe(threads, 1))
        found.append({"values": values, "probes": [before, after]})
        before = after
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return {"rounds": found, "limits": best.figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--format", default="q4_0", help="of the weights, but for the routers")
    parser.add_argument("--isa", default="")
    output.add_output(parser)
    args = parser.parse_args()
    bench = Bench(args.threads, args.isa)
    programs = {spec.name: compiled(spec, args.format) for spec in (MOE, DENSE)}
    runners = {name: loaded(bench, program) for name, program in programs.items()}
    measured = measure(runners, args.threads, args.rounds)
    counts = runners["moe"].expert_counts()
    result = {
        "benchmark": "moe",
        "command": output.command(),
        "machine": describe(args.threads),
        "format": args.format,
        "models": {name: figures(program) for name, program in programs.items()},
        "busiest": float((counts / counts.sum(1, keepdims=True)).max()),
        "ratio": statistics.median(
            r["values"]["moe"] / r["values"]["dense"] for r in measured["rounds"]
        ),
        **measured,
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
