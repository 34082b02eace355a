"""What less memory for experts costs, and what fewer of them a token: a synthetic mixture.

There is no small real mixture to measure, so weights are random, in the proportions of OLMoE: 64
experts, of which a token goes to 8. Routers are made as real ones are found to be: a layer's
choice follows from the token more than from its context (OpenMoE, arXiv:2402.01739), and some
experts are much busier than others. The tokens are the words of Python's documentation topics by
how often they come, so that they repeat as text does.

    python benchmarks/experts.py [--rounds 7] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import output
from machine import Best, describe, probe
from moe import compiled
from numpy.typing import NDArray
from one_op import Bench

from pronk.engine.packing import read_packed, write_packed
from pronk.engine.runner import ExpertReads, Runner
from pronk.evaluate.corpus import default_corpus
from pronk.evaluate.divergence import divergence
from pronk.evaluate.experts import expert_load
from pronk.graph.experts import apply_experts
from pronk.graph.program import Limits, Program
from pronk.spec import LayerSpec, ModelSpec, MoeSpec

LAYERS, EXPERTS, CHOSEN, WIDTH = 12, 64, 8, 384
SPEC = ModelSpec(
    family="olmoe", name="experts", vocab_size=8192, hidden_size=1024, num_heads=16,
    num_kv_heads=4, intermediate_size=WIDTH, head_dim=64, norm_eps=1e-5, context_length=1024,
    tie_embeddings=False, layers=(LayerSpec(mlp="moe"),) * LAYERS,
    moe=MoeSpec(EXPERTS, CHOSEN, WIDTH),
)  # fmt: skip
FORMAT = "q4_0"  # of the weights, but for the routers
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the experts' bytes that are in memory
THRESHOLDS = ("", "0.8:1", "0.6:1", "0.4:1", "max=4")
PROMPT, ANSWER = 128, 64  # tokens of a round
SPREAD = 0.5  # of the routers' rows: how much busier some experts are than others
LOGITS = 1.5  # deviation of the routers' logits: how sure they are
SCALES = {"o_proj.weight": 1e-4, "down_proj.weight": 5e-4}  # layers add to a token, not drown it


def words(count: int) -> list[int]:
    """The topics' words as ids by how often they come; the rarest share the last ones."""
    found = re.findall(r"\w+|[^\w\s]", default_corpus().text)
    order = [word for word, _ in collections.Counter(found).most_common(SPEC.vocab_size)]
    ids = {word: i for i, word in enumerate(order)}
    return [ids.get(word, len(word) % SPEC.vocab_size) for word in found[:count]]


def centred(rng: np.random.Generator, rows: int, cols: int, scale: float) -> NDArray[np.uint8]:
    """Rows of q4_0 whose values have no mean, which would lead all tokens the same way."""
    nibbles = rng.integers(1, 16, (2, rows, cols // 32, 16), np.uint8)  # -7 to 7
    blocks = np.empty((rows, cols // 32, 18), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    blocks[..., 2:] = nibbles[0] | nibbles[1] << np.uint8(4)
    return blocks.reshape(rows, -1)


def fill(bench: Bench, program: Program) -> Runner:
    """Random weights, of each expert its own, with routers and last matrices as said above."""
    runner = bench.load(program)
    for name, weight in program.graph.weights.items():
        at = program.layout.weight_offsets[name]
        if "router" in name:
            values = bench.rng.standard_normal((weight.rows, weight.cols))
            gains = np.exp(SPREAD * bench.rng.standard_normal((weight.rows, 1)))
            values = (values * gains * LOGITS / np.sqrt(weight.cols)).astype(np.float32)
            rows = values.view(np.uint8).reshape(weight.rows, -1)
            runner.executor.pack("f32", at, weight.rows, weight.cols, 0, rows)
        elif weight.rows > 1:
            scale = next((s for end, s in SCALES.items() if name.endswith(end)), 0.01)
            for start in range(0, weight.rows, 1024):
                rows = centred(bench.rng, min(1024, weight.rows - start), weight.cols, scale)
                runner.executor.pack(weight.dtype, at, weight.rows, weight.cols, start, rows)
    return runner


class Mixture:
    """One file of packed weights, and runners over it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as self)
        runner = fill(Bench(threads, ""), self.program(SPEC, None))
        self.sums = write_packed(runner, self.file.fileno())
        os.fsync(self.file.fileno())  # pages that are not on disk cannot be dropped
        self.expert_bytes = runner.program.layout.expert_bytes

    def program(self, spec: ModelSpec, memory: int | None) -> Program:
        limits = Limits(512, max_tokens=PROMPT, expert_memory=memory)
        return compiled(spec, FORMAT, limits)

    def runner(self, spec: ModelSpec | None = None, share: float = 1.0) -> Runner:
        program = self.program(
            spec or SPEC, round(self.expert_bytes * share) if share < 1 else None
        )
        runner = Runner(program, self.threads)
        if not read_packed(runner, self.file.fileno(), self.sums):
            raise SystemExit("the file of packed weights has changed")
        return runner

    def drop(self) -> None:
        """Have the system forget what it holds of the file."""
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def step(runner: Runner, ids: list[int], at: int) -> float:
    """Seconds of a step of one sequence."""
    blocks = [[list(range(runner.program.limits.max_blocks))]]
    start = time.perf_counter()
    runner.step(ids, list(range(at, at + len(ids))), [0] * len(ids), blocks, [len(ids) - 1])
    return time.perf_counter() - start


def answer(mixture: Mixture, runners: dict[str, Runner], text: list[int], cold: bool
           ) -> tuple[dict[str, float], dict[str, float], dict[str, ExpertReads]]:  # fmt: skip
    """Rates of a prompt and of the tokens after it, taken in turns; and what these read."""
    prompts, spent = {}, dict.fromkeys(runners, 0.0)
    before = {}
    for name, runner in runners.items():
        prompts[name] = PROMPT / step(runner, text[:PROMPT], 0)
        before[name] = runner.expert_reads()
    for i in range(PROMPT, PROMPT + ANSWER):
        for name in list(runners)[:: 1 if i % 2 else -1]:
            if cold:
                mixture.drop()
            spent[name] += step(runners[name], [text[i]], i)
    reads = {name: runner.expert_reads().since(before[name]) for name, runner in runners.items()}
    return prompts, {name: ANSWER / seconds for name, seconds in spent.items()}, reads


def shares(mixture: Mixture, text: list[int], rounds: int, threads: int) -> dict[str, Any]:
    """Rounds with all experts in memory and with fewer, each with a stretch of text of its own."""
    runners = {f"{share:g}": mixture.runner(share=share) for share in SHARES}
    best, found = Best(), []
    stretch = PROMPT + ANSWER
    answer(mixture, runners, text[:stretch], cold=False)
    before = best.see(probe(threads, 1))
    for turn in range(1, rounds + 1):
        prompts, rates, reads = answer(
            mixture, runners, text[turn * stretch : (turn + 1) * stretch], cold=False
        )
        after = best.see(probe(threads, 1))
        found.append({
            "values": rates, "prompts": prompts, "probes": [before, after],
            "hit_rates": {name: one.hit_rate for name, one in reads.items()},
            "read": {name: one.read_per_token for name, one in reads.items()},
        })  # fmt: skip
        before = after
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    _, cold, _ = answer(mixture, runners, text[-stretch:], cold=True)
    load = expert_load(runners["1"].expert_counts(), CHOSEN)
    return {
        "rounds": found,
        "cold": cold,
        "limits": best.figures,
        "memory": {name: runner.expert_reads().memory for name, runner in runners.items()},
        "entropy": float(load.entropies.mean()),
        "busiest": float(load.loads.max(1).mean() * EXPERTS),
    }


class Logits:
    """A runner as `divergence` takes it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        blocks = [[list(range(self.runner.program.limits.max_blocks))]]
        places = list(range(len(ids)))
        return self.runner.step(list(ids), places, [0] * len(ids), blocks, places)


def fewer(mixture: Mixture, text: list[int], rounds: int) -> list[dict[str, Any]]:
    """Tokens that go to fewer experts: how fast, and how far from those that go to all."""
    reference = mixture.runner()
    result = []
    for how in THRESHOLDS:
        spec = apply_experts(SPEC, how) if how else SPEC
        runner = mixture.runner(spec)
        runners = {"all": reference, "fewer": runner}
        stretch = PROMPT + ANSWER
        answer(mixture, runners, text[:stretch], cold=False)
        runner.reset_experts()
        turns = [
            answer(mixture, runners, text[turn * stretch : (turn + 1) * stretch], cold=False)
            for turn in range(1, rounds + 1)
        ]
        compared = divergence(Logits(reference), Logits(runner), text[: 4 * PROMPT], PROMPT)
        result.append({
            "how": how,
            "experts": runner.experts_per_token(),
            "decode": statistics.median(rates["fewer"] for _, rates, _ in turns),
            "ratio": statistics.median(rates["fewer"] / rates["all"] for _, rates, _ in turns),
            **compared.to_dict(),
        })  # fmt: skip
        print(f"{how or 'all'}: done", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    output.add_output(parser)
    args = parser.parse_args()
    mixture = Mixture(args.threads)
    text = words((args.rounds + 2) * (PROMPT + ANSWER))
    result = {
        "benchmark": "experts",
        "command": output.command(),
        "machine": describe(args.threads),
        "format": FORMAT,
        "sizes": {"layers": LAYERS, "experts": EXPERTS, "chosen": CHOSEN,
                  "expert": mixture.expert_bytes // LAYERS // EXPERTS,
                  "prompt": PROMPT, "answer": ANSWER},
        **shares(mixture, text, args.rounds, args.threads),
        "fewer": fewer(mixture, text, args.rounds),
    }  # fmt: skip
    output.finish(result, args)


if __name__ == "__main__":
    main()
