"""What the ops of a program read, write and multiply: counted, for a step's own sizes.

Bytes are the least that must move (Williams et al. 2009): every weight once an op, the keys and
values of a sequence once however many of its tokens attend to them, every activation once. A
multiply-add has a weight and an activation, whatever halves they are multiplied in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pronk.graph.ir import Graph, Op, Ref
from pronk.graph.memory import weight_bytes
from pronk.graph.pack import KV_BLOCK, PANEL, kv_block_bytes, packed_bytes
from pronk.graph.program import Program

__all__ = ["Cost", "Step", "label", "program_costs"]


@dataclass(frozen=True, slots=True)
class Step:
    """The sizes of a step.

    Attributes
    ----------
    runs : tuple of (int, int, int)
        Sequence, first position and number of tokens that follow each other.
    heads : tuple of int
        Logit rows of each call of the head.
    """

    runs: tuple[tuple[int, int, int], ...]
    heads: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, positions: Sequence[int], sequences: Sequence[int], heads: Iterable[int] = ()
    ) -> Step:
        """The step that runs tokens at `positions` (from 0) of `sequences`."""
        runs: list[tuple[int, int, int]] = []
        for position, sequence in zip(positions, sequences, strict=True):
            last, first, count = runs[-1] if runs else (-1, 0, 0)
            if (last, first + count) == (sequence, position):
                runs[-1] = (sequence, first, count + 1)
            else:
                runs.append((sequence, position, 1))
        return cls(tuple(runs), tuple(heads))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(count for _, _, count in self.runs)

    def seen(self, window: int = 0, chunked: bool = False, sinks: int = 0) -> tuple[int, int]:
        """Positions that attention reads, as an op's attributes narrow it.

        Returns
        -------
        attended, past : int
            What a token attends to, summed over the tokens; and what is read of keys and values,
            where a sequence's tokens share it, summed over the sequences.
        """
        return _seen(self.runs, window, chunked, sinks)


@lru_cache(maxsize=4096)
def _seen(
    runs: tuple[tuple[int, int, int], ...], window: int, chunked: bool, sinks: int
) -> tuple[int, int]:
    attended, spans = 0, []
    for sequence, start, count in runs:
        for position in range(start, start + count):
            first = _first(position, window, chunked)
            before = min(sinks, first)
            attended += before + position + 1 - first
        # Tokens that follow each other see positions that do, besides the sinks.
        spans += [(sequence, 0, before), (sequence, _first(start, window, chunked), start + count)]
    past, at = 0, (-1, 0)
    for sequence, start, end in sorted(spans):
        start = max(start, at[1]) if sequence == at[0] else start
        past += max(0, end - start)
        at = (sequence, max(end, start))
    return attended, past


def _first(position: int, window: int, chunked: bool) -> int:
    """From where on a token sees all up to itself."""
    if not window:
        return 0
    return position // window * window if chunked else max(0, position - window + 1)


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of weights, of the KV cache and of activations; multiply-adds of dot products."""

    weights: int = 0
    kv: int = 0
    activations: int = 0
    macs: int = 0

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weights + self.kv + self.activations

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weights + other.weights,
            self.kv + other.kv,
            self.activations + other.activations,
            self.macs + other.macs,
        )


def program_costs(program: Program, steps: Iterable[Step]) -> list[Cost]:
    """What each op of a program's graph costs over some steps, in the order of the ops."""
    costs = [Cost()] * len(program.graph.ops)
    counted: dict[Step, list[Cost]] = {}
    for step in steps:
        if step not in counted:
            counted[step] = [_cost(program, op, step) for op in program.graph.ops]
        costs = [a + b for a, b in zip(costs, counted[step], strict=True)]
    return costs


def label(graph: Graph, op: Op) -> str:
    """A name for the ops that do the same in every layer: ``matmul gate|up q4_1``."""
    matrices = [w for w in (graph.weights[name] for name in op.weights) if w.rows > 1]
    formats = "+".join(dict.fromkeys(w.dtype for w in matrices))
    if op.kind != "matmul":
        return f"{op.kind} {formats}".strip()
    role = "|".join(w.name.split(".")[-2].removesuffix("_proj") for w in matrices)
    if graph.values[op.output].rows == "R":
        role = "head"
    return f"matmul {role} {formats}"


def _cost(program: Program, op: Op, step: Step) -> Cost:
    graph = program.graph
    if op.kind == "workspace":
        return Cost()
    if op.kind in ("attend", "attention", "rope_store"):
        return _attention(program, op, step)
    # The ops of the head run once for each of its calls.
    calls = (step.tokens,) if graph.values[op.output].rows == "T" else step.heads
    rows = sum(calls)
    activations = rows * (_output_bytes(graph, op) + _input_bytes(graph, op))
    weights = [graph.weights[name] for name in op.weights]
    if op.kind == "embed":  # a row lies across the lines of its panel
        table = weights[0]
        return Cost(rows * packed_bytes(table.dtype, PANEL, table.cols), 0, activations)
    macs = sum(w.rows * w.cols for w in weights if w.rows > 1) if op.kind == "matmul" else 0
    return Cost(len(calls) * sum(map(weight_bytes, weights)), 0, activations, rows * macs)


def _attention(program: Program, op: Op, step: Step) -> Cost:
    """Storing keys and values, or attending to them: q @ keys, then weights @ values."""
    spec, graph = program.spec, program.graph
    position = kv_block_bytes(1, spec.num_kv_heads, spec.head_dim, program.limits.kv_dtype)
    position //= KV_BLOCK
    if op.kind == "rope_store":
        matrix = sum(_bytes(graph, ref) for ref in op.inputs) + _output_bytes(graph, op)
        return Cost(0, step.tokens * position, step.tokens * matrix)
    width = op.integer("heads") * spec.head_dim
    queries = step.tokens * 2 * width * 4  # read, and written as the output
    sinks, chunked = int(op.attrs.get("sinks", 0)), bool(op.attrs.get("chunked", False))
    attended, past = step.seen(int(op.attrs.get("window", 0)), chunked, sinks)
    return Cost(0, past * position, queries, 2 * width * attended)


def _output_bytes(graph: Graph, op: Op) -> int:
    return _bytes(graph, Ref(op.output))


def _input_bytes(graph: Graph, op: Op) -> int:
    """Bytes of the inputs, a row: of the columns used, where an input is a part of a value."""
    total = 0
    for index, ref in enumerate(op.inputs):
        whole = op.kind == "matmul" and index == 0
        total += _bytes(graph, ref, None if whole else graph.values[op.output].width)
    return total


def _bytes(graph: Graph, ref: Ref, width: int | None = None) -> int:
    """Bytes of a row of a value, or of at most `width` columns from the one referred to."""
    value = graph.values[ref.value]
    if value.quantized:
        return value.row_bytes
    left = value.width - ref.column
    return 4 * (left if width is None else min(left, width))
