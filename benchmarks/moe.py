"""What choosing experts costs: a mixture against a dense model that reads the same bytes a token.

Both have random weights and a router's choice is as good as random; steps of one token are timed in
turns. The mixture has 8 experts, of which a token goes to 2, and about 1 billion parameters; the
dense model has an MLP as wide as two experts.

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

import output
from machine import Best, describe, probe
from one_op import Bench

from pronk.engine.runner import Runner
from pronk.graph.cost import Step, program_costs
from pronk.graph.memory import weight_bytes
from pronk.graph.program import Limits, Program, compile_program
from pronk.spec import LayerSpec, ModelSpec, MoeSpec

EXPERTS, CHOSEN, WIDTH, LAYERS = 8, 2, 2048, 16
TOKENS = 24  # of a measurement
MOE = ModelSpec(
    family="mixtral", name="moe", vocab_size=32000, hidden_size=1024, num_heads=16, num_kv_heads=4,
    intermediate_size=WIDTH, head_dim=64, norm_eps=1e-5, context_length=1024, tie_embeddings=False,
    layers=(LayerSpec(mlp="moe"),) * LAYERS, moe=MoeSpec(EXPERTS, CHOSEN, WIDTH),
)  # fmt: skip
DENSE = replace(
    MOE, family="llama", name="dense", intermediate_size=CHOSEN * WIDTH,
    layers=(LayerSpec(),) * LAYERS, moe=None,
)  # fmt: skip


def compiled(spec: ModelSpec, dtype: str) -> Program:
    """A program of a spec; routers are float, as checkpoints keep them."""
    return compile_program(spec, lambda n: "f32" if "router" in n else dtype, Limits(256))


def figures(program: Program) -> dict[str, int]:
    """Sizes of a program, and what a step of one token reads of it."""
    weights = program.graph.weights
    costs = program_costs(program, [Step.of([0], [0], [1])])
    return {
        "parameters": sum(w.rows * w.cols for w in weights.values() if w.rows > 1),
        "weights": sum(weight_bytes(w) for w in weights.values()),
        "read": sum(cost.weights for cost in costs),
    }


def rate(runner: Runner, turn: int) -> float:
    """Tokens a second of decoding, each token another one so that it chooses other experts."""
    blocks = [list(range(runner.program.limits.max_blocks))]
    start = time.perf_counter()
    for i in range(TOKENS):
        runner.step([(turn * 997 + i * 7919) % 32000], [i], [0], blocks, [0])
    return TOKENS / (time.perf_counter() - start)


def measure(runners: dict[str, Runner], threads: int, rounds: int) -> dict[str, Any]:
    """Rounds in turns, each with what the machine could do beside it."""
    best, found = Best(), []
    for runner in runners.values():
        rate(runner, 0)
    before = best.see(probe(threads, 1))
    for turn in range(rounds):
        names = list(runners) if turn % 2 else list(runners)[::-1]
        values = {name: rate(runners[name], turn + 1) for name in names}
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
    runners = {name: bench.load(program) for name, program in programs.items()}
    measured = measure(runners, args.threads, args.rounds)
    counts = runners["moe"].expert_counts()
    result = {
        "benchmark": "moe",
        "command": output.command(),
        "machine": describe(args.threads),
        "format": args.format,
        "models": {name: figures(program) for name, program in programs.items()},
        "chosen": {"most": float(counts.max() / counts.sum(1).max()), "of": EXPERTS},
        "ratio": statistics.median(
            r["values"]["moe"] / r["values"]["dense"] for r in measured["rounds"]
        ),
        **measured,
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
