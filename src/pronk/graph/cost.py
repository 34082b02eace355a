"""What the ops of a program read, write and multiply: counted, for a step's own sizes.

Bytes are the least that must move (Williams et al. 2009): every weight once an op, the keys and
values of a sequence once however many of its tokens attend to them, every activation once. A
multiply-add has a weight and an activation, whatever halves they are multiplied in. Which experts
a step reads depends on its tokens: counted are as many as they can choose, min(E, T k).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pronk.graph.ir import Graph, Op, Ref
from pronk.graph.kv import KvGroup, place
from pronk.graph.memory import weight_bytes
from pronk.graph.pack import KV_BLOCK, PANEL, packed_bytes
from pronk.graph.program import Program

__all__ = ["Cost", "Step", "label", "program_costs"]


@dataclass(frozen=True, slots=True)
class Step:
    """The sizes of a step.

    Attributes
    ----------
    tokens : int
    spans : tuple of (int, int)
        Of each sequence, the position of its first token and the one behind its last.
    heads : tuple of int
        Logit rows of each call of the head.
    unread : int
        Bytes of its weights that calls for the largest logits alone did not read.
    """

    tokens: int
    spans: tuple[tuple[int, int], ...]
    heads: tuple[int, ...]
    unread: int = 0

    @classmethod
    def of(
        cls, positions: Sequence[int], sequences: Sequence[int], heads: Iterable[int] = ()
    ) -> Step:
        """The step that runs tokens at `positions` (from 0) of `sequences`."""
        spans: dict[int, tuple[int, int]] = {}
        for position, sequence in zip(positions, sequences, strict=True):
            start, stop = spans.get(sequence, (position, position + 1))
            spans[sequence] = min(start, position), max(stop, position + 1)
        return cls(len(positions), tuple(spans.values()), tuple(heads))

    def attended(self, group: KvGroup) -> int:
        """Positions a token attends to in a layer of a group, summed over the tokens."""
        if group.attention == "global":
            return sum((stop - start) * (start + stop + 1) // 2 for start, stop in self.spans)
        return sum(_seen(group, p) for start, stop in self.spans for p in range(start, stop))

    def past(self, group: KvGroup) -> int:
        """Positions whose keys and values are read there, summed over the sequences."""
        return sum(_seen(group, start) + stop - start - 1 for start, stop in self.spans)


def _seen(group: KvGroup, position: int) -> int:
    """Positions that one sees."""
    first = group.first_seen(position)
    return position + 1 - first + min(group.sinks, first)


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
    if op.kind not in ("matmul", "head", "expert_matmul"):
        return f"{op.kind} {formats}".strip()
    role = "|".join(w.name.split(".")[-2].removesuffix("_proj") for w in matrices)
    if graph.values[op.output].rows == "R":
        role = "head"
    kind = "matmul" if op.kind == "head" else op.kind
    return f"{kind} {role} {formats}"


def _cost(program: Program, op: Op, step: Step) -> Cost:
    graph = program.graph
    if op.kind == "workspace":
        return Cost()
    if op.kind in ("attend", "attention", "rope_store"):
        return _attention(program, op, step)
    if graph.values[op.output].rows == "X" or op.kind == "combine":
        return _experts(program, op, step)
    # The ops of the head run once for each of its calls.
    calls = (step.tokens,) if graph.values[op.output].rows == "T" else step.heads
    rows = sum(calls)
    activations = rows * (_output_bytes(graph, op) + _input_bytes(graph, op))
    weights = [graph.weights[name] for name in op.weights]
    if op.kind == "embed":  # a row lies across the lines of its panel
        table = weights[0]
        return Cost(rows * packed_bytes(table.dtype, PANEL, table.cols), 0, activations)
    product = op.kind in ("matmul", "head")
    macs = sum(w.rows * w.cols for w in weights if w.rows > 1) if product else 0
    read = len(calls) * sum(map(weight_bytes, weights))
    if op.kind == "head":
        read -= step.unread
    return Cost(read, 0, activations, rows * macs)


def _experts(program: Program, op: Op, step: Step) -> Cost:
    """What is done to the rows of experts: one for each choice of each token."""
    graph, experts = program.graph, op.integer("experts")
    rows = step.tokens * op.integer("top_k")
    weights = [graph.weights[name] for name in op.weights]
    if op.kind == "dispatch" or (op.kind == "expert_gather" and step.tokens == 1):
        return Cost()
    if op.kind == "combine":
        width = 4 * graph.values[op.output].width
        y, residual = rows * width, (len(op.inputs) - 3) * step.tokens * width
        return Cost(0, 0, y + residual + step.tokens * width)
    moved = _bytes(graph, op.inputs[0]) + _output_bytes(graph, op)
    read = sum(map(weight_bytes, weights)) * min(experts, rows) // experts
    macs = sum(w.rows * w.cols for w in weights) // experts
    return Cost(read, 0, rows * moved, rows * macs)


def _attention(program: Program, op: Op, step: Step) -> Cost:
    """Storing keys and values, or attending to them: q @ keys, then weights @ values."""
    spec, graph = program.spec, program.graph
    position = program.kv_layer_bytes // KV_BLOCK
    if op.kind == "rope_store":
        matrix = sum(_bytes(graph, ref) for ref in op.inputs) + _output_bytes(graph, op)
        return Cost(0, step.tokens * position, step.tokens * matrix)
    width = op.integer("heads") * spec.head_dim
    queries = step.tokens * 2 * width * 4  # read, and written as the output
    groups = [pool.group for pool in program.kv_pools]
    group = groups[place(groups, op.integer("layer"))[0]]
    return Cost(0, step.past(group) * position, queries, 2 * width * step.attended(group))


def _output_bytes(graph: Graph, op: Op) -> int:
    return _bytes(graph, Ref(op.output))


def _input_bytes(graph: Graph, op: Op) -> int:
    """Bytes of the inputs, a row: of the columns used, where an input is a part of a value."""
    total = 0
    for index, ref in enumerate(op.inputs):
        whole = op.kind in ("matmul", "head") and index == 0
        total += _bytes(graph, ref, None if whole else graph.values[op.output].width)
    return total


def _bytes(graph: Graph, ref: Ref, width: int | None = None) -> int:
    """Bytes of a row of a value, or of at most `width` columns from the one referred to."""
    value = graph.values[ref.value]
    if value.quantized:
        return value.row_bytes
    left = value.width - ref.column
    return 4 * (left if width is None else min(left, width))
