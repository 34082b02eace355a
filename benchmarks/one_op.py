"""Programs that hold one kind of op, so that a kernel is timed alone, with the team's threads.

The op is repeated over weights (or inputs) of its own, as the layers of a model do, so that a
small step streams its weights from memory; a program without it gives what to subtract.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pronk.engine.runner import Runner
from pronk.graph.ir import Graph, Op, Ref, Value, Weight
from pronk.graph.memory import plan_layout, weight_bytes
from pronk.graph.pack import block_dtype
from pronk.graph.passes import CPU_PASSES, chain_rows, fuse_siblings, run_passes
from pronk.graph.program import Limits, Program, compile_program
from pronk.graph.rope import model_frequencies
from pronk.spec import LayerSpec, ModelSpec

VOCAB = 256
_STREAMED = 160 << 20  # bytes of weights in a program: more than caches keep between two steps

# Elements and bytes of a block as GGUF stores it, and the offsets of its float16 fields.
BLOCKS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "q8_0": (32, 34, (0,)),
    "q4_0": (32, 18, (0,)),
    "q4_1": (32, 20, (0, 2)),
    "q5_0": (32, 22, (0,)),
    "q5_1": (32, 24, (0, 2)),
    "q4_k": (256, 144, (0, 2)),
    "q5_k": (256, 176, (0, 2)),
    "q6_k": (256, 210, (208,)),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a real model that kernels see."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    formats: tuple[str, ...]

    def matmuls(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the products of a layer, and of the head."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q, k, v": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate, up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }


SHAPES = (
    Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, ("q4_1", "q8_0", "q4_0")),
    Shape("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, 151936, ("q8_0", "q5_0", "q4_k", "q6_k")),
    Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, ("q4_0", "q4_k", "q5_k", "q6_k")),
)


def native_formats() -> list[str]:
    """The grouped formats whose weights this build keeps as they are."""
    from pronk.graph.pack import GROUPED

    return [name for name in BLOCKS if name in GROUPED]


def random_rows(
    rng: np.random.Generator, dtype: str, rows: int, cols: int, scale: float = 0.01
) -> NDArray[np.uint8]:
    """Rows of random blocks of a format with one scale, as they lie in a file."""
    elements, size, scales = BLOCKS[dtype]
    blocks = rng.integers(0, 256, (rows, cols // elements, size), np.uint8)
    bytes_of_scale = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    for at in scales:
        blocks[..., at : at + 2] = bytes_of_scale
    return blocks.reshape(rows, -1)


class Bench:
    """Builds a program of one op kind and times its steps."""

    def __init__(self, threads: int, isa: str) -> None:
        self.threads, self.isa = threads, isa
        self.rng = np.random.default_rng(0)

    def program(self, graph: Graph, cols: int, tokens: int) -> Program:
        """A graph without attention as a program that the executor takes."""
        joining = (fuse_siblings, chain_rows)
        passes = tuple(p for p in CPU_PASSES if p not in joining)  # one op each
        graph = run_passes(graph, passes)
        spec = ModelSpec("llama", "", VOCAB, cols, cols, 1, 1, 32, 1e-5, 64, True, (LayerSpec(),))
        limits = Limits(64, max_tokens=tokens, max_rows=1)
        return Program(spec, limits, graph, plan_layout(graph, tokens, 1))

    def load(self, program: Program) -> Runner:
        """Random weights; the same rows over and over, for their values cost no time."""
        runner = Runner(program, self.threads, self.isa)
        tiles: dict[tuple[str, int], NDArray[np.uint8]] = {}
        for name, weight in program.graph.weights.items():
            at = program.layout.weight_offsets[name]
            if weight.rows == 1:
                values = model_frequencies(program.spec, name, program.limits.context)
                if values is None:
                    values = np.ones(weight.cols, np.float32)
                runner.executor.write(at, values)
                continue
            key = weight.dtype, weight.cols
            if key not in tiles:
                tiles[key] = self._rows(block_dtype(weight.dtype), 512, weight.cols)
            for start in range(0, weight.rows, 512):
                rows = tiles[key][: weight.rows - start]
                runner.executor.pack(weight.dtype, at, weight.rows, weight.cols, start, rows)
        return runner

    def _rows(self, dtype: str, rows: int, cols: int) -> NDArray[np.uint8]:
        if dtype == "f32":
            values = self.rng.standard_normal((rows, cols)).astype(np.float32)
            return values.view(np.uint8).reshape(rows, -1)
        return random_rows(self.rng, dtype, rows, cols)

    def graph(self, width: int, ops: Sequence[Op], values: Sequence[Value],
              weights: Sequence[Weight]) -> Graph:  # fmt: skip
        """An embedding that gives ``x``, the ops over it, and a row to end with."""
        first, last = Value("x", "T", width), Value("last", "R", width)
        table = Weight("table", VOCAB, width, "f32")
        every = [Op("embed", (), "x", ("table",)), *ops, Op("gather", (Ref("x"),), "last")]
        graph = Graph(
            tuple(every),
            {v.name: v for v in (first, *values, last)},
            {w.name: w for w in (table, *weights)},
            "last",
        )
        graph.check()
        return graph

    def matmul(
        self, rows: int, cols: int, dtype: str, tokens: int, streamed: bool
    ) -> tuple[Runner, int, int]:
        """A runner over repeated products, how many there are, and the bytes of one."""
        one = weight_bytes(Weight("w", rows, cols, dtype))
        count = max(2, min(-(-_STREAMED // one), 400)) if streamed else 4
        ops, values, weights = [], [], []
        for i in range(count):
            ops.append(Op("matmul", (Ref("x"),), f"y{i}", (f"w{i}",), {"cols": cols}))
            values.append(Value(f"y{i}", "T", rows))
            weights.append(Weight(f"w{i}", rows, cols, dtype))
        program = self.program(self.graph(cols, ops, values, weights), cols, tokens)
        return self.load(program), count, one

    def rowwise(self, kind: str, width: int, tokens: int, count: int) -> Runner:
        """A runner over a repeated op on rows of floats."""
        ops, values, weights = [], [], [Weight("norm", 1, width, "f32")]
        for i in range(count):
            out = f"y{i}"
            if kind == "rms_norm":
                ops.append(Op(kind, (Ref("x"),), out, ("norm",), {"eps": 1e-5}))
            else:
                attrs = {"fn": "silu"} if kind == "activate" else {}
                ops.append(Op(kind, (Ref("x"), Ref("x")), out, attrs=attrs))
            values.append(Value(out, "T", width))
        return self.load(self.program(self.graph(width, ops, values, weights), width, tokens))

    def attention(self, shape: Shape, context: int, layers: int, tokens: int) -> Runner:
        """A decoder whose other parts are tiny."""
        spec = ModelSpec("llama", "", VOCAB, 64, 32, shape.heads, shape.kv_heads, shape.head_dim,
                         1e-5, context, True, (LayerSpec(),) * layers)  # fmt: skip
        limits = Limits(context, max_tokens=tokens, max_rows=1)
        return self.load(compile_program(spec, lambda _: "q8_0", limits))


def seconds(runner: Runner, tokens: int, past: int = 0, least: float = 0.03) -> float:
    """Seconds of a step of one sequence: the best mean of four stretches of `least` seconds."""
    blocks = [[list(range(runner.program.limits.max_blocks))]]
    ids = [i % VOCAB for i in range(tokens)]
    # Without a real context, positions repeat within what the pool holds.
    room = runner.program.limits.context
    positions = [min(past + i, room - 1) if past else i % room for i in range(tokens)]

    def stretch(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            runner.step(ids, positions, [0] * tokens, blocks, [])
        return (time.perf_counter() - start) / steps

    steps = max(1, math.ceil(least / stretch(1)))
    return min(stretch(steps) for _ in range(4))
