"""Passes: Graph -> Graph, each small, each keeping the meaning.

`cpu_passes` gives the ordered list that the native executor needs; the NumPy interpreter runs the
graph before and after any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from pronk.graph.ir import Attr, Graph, Op, Ref, Value
from pronk.graph.moe import split_experts
from pronk.graph.pack import ACTIVATIONS, PART_TAIL, bound_plan_floats

__all__ = [
    "CPU_PASSES",
    "Pass",
    "chain_rows",
    "cpu_passes",
    "fuse_quantize",
    "fuse_residual",
    "fuse_rope",
    "fuse_siblings",
    "quantize_activations",
    "run_passes",
    "skip_inactive",
    "split_experts",
    "split_head",
    "split_threads",
]

Pass = Callable[[Graph], Graph]


def _redirect(op: Op, moved: dict[str, Ref]) -> Op:
    """Replace inputs that have moved into a wider value."""
    if not any(ref.value in moved for ref in op.inputs):
        return op
    inputs = tuple(
        Ref(moved[r.value].value, moved[r.value].column + r.column) if r.value in moved else r
        for r in op.inputs
    )
    return replace(op, inputs=inputs)


def fuse_siblings(graph: Graph) -> Graph:
    """Matmuls in a row that read the same value become one with several parts (QKV, gate and up).

    Each part keeps its own weight and format; the outputs lie side by side. Parts start at
    multiples of 16 columns, which is what a packed panel writes.
    """
    ops: list[Op] = []
    values = dict(graph.values)
    moved: dict[str, Ref] = {}
    i = 0
    while i < len(graph.ops):
        op = graph.ops[i]
        group = [op]
        if op.kind == "matmul":
            grouped = graph.weights[op.weights[0]].grouped
            for other in graph.ops[i + 1 :]:
                width = graph.values[group[-1].output].width
                if (
                    other.kind != "matmul"
                    or other.inputs != op.inputs
                    or graph.weights[other.weights[0]].grouped != grouped
                    or width % 16
                ):
                    break
                group.append(other)
        if len(group) == 1:
            ops.append(_redirect(op, moved))
        else:
            name = "+".join(member.output for member in group)
            column = 0
            for member in group:
                moved[member.output] = Ref(name, column)
                column += graph.values[member.output].width
            values[name] = replace(graph.values[op.output], name=name, width=column)
            weights = tuple(w for member in group for w in member.weights)
            ops.append(replace(_redirect(op, moved), output=name, weights=weights))
        i += len(group)
    return graph.with_ops(ops, values)


def fuse_rope(graph: Graph) -> Graph:
    """Norms and rotations of q and k and the attention over them work on the one q|k|v matrix.

    ``rope_store`` norms and rotates q and k in place and stores k and v into the cache; ``attend``
    then reads q from the matrix and everything else from the cache. ``workspace`` holds its parts
    where a long past is cut over threads: per head, values and ``PART_TAIL`` floats.
    """
    values = dict(graph.values)
    producer = {op.output: op for op in graph.ops}
    absorbed: set[str] = set()
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind != "attention":
            ops.append(op)
            continue
        (source, *way), (k_source, *k_way) = (_way(producer, ref) for ref in op.inputs[:2])
        heads = op.integer("heads")
        width, kv_width = (values[ref.value].width for ref in op.inputs[:2])
        dim = values[op.output].width // heads
        if not way:  # nothing is done to q and k: they are columns of the matrix
            columns = [ref.column for ref in op.inputs]
            width, kv_width = columns[1], columns[2] - columns[1]
        expected = (Ref(source.value, width), Ref(source.value, width + kv_width))
        together = source.column == 0 and (k_source, op.inputs[2]) == expected
        if not together or [o.kind for o in way] != [o.kind for o in k_way]:
            ops.append(op)
            continue
        absorbed |= {o.output for o in (*way, *k_way)}
        attrs: dict[str, Attr] = {"layer": op.attrs["layer"], "heads": heads, "head_dim": dim,
                                  "kv_heads": kv_width // dim, "inplace": True}  # fmt: skip
        norms = [o for o in (*way, *k_way) if o.kind == "head_norm"]
        if norms:
            per_head = norms[0].integer("heads") > 1 or heads == 1
            attrs["qk_norm"] = ("head" if per_head else "full") if norms[0].weights else "l2"
            attrs["eps"] = norms[0].attrs["eps"]
        tables = [o.inputs[1] for o in way if o.kind == "rope"]
        name = f"{source.value}.rope"
        values[name] = replace(values[source.value], name=name)
        weights = tuple(weight for norm in norms for weight in norm.weights) + op.weights
        if op.weights:
            attrs["centered"] = True
        ops.append(Op("rope_store", (Ref(source.value), *tables), name, weights, attrs))
        parts = f"{op.output}.parts"
        values[parts] = Value(parts, "T", heads * (dim + PART_TAIL))
        ops.append(Op("workspace", (), parts))
        attend = {**op.attrs, "kv_heads": kv_width // dim}
        ops.append(Op("attend", (Ref(name), Ref(parts)), op.output, attrs=attend))
    return graph.with_ops([op for op in ops if op.output not in absorbed], values)


def _way(producer: dict[str, Op], ref: Ref) -> list[Any]:
    """Where queries or keys come from, and the norms and rotations on their way to attention."""
    ops: list[Op] = []
    while producer[ref.value].kind in ("head_norm", "rope"):
        ops.insert(0, producer[ref.value])
        ref = ops[0].inputs[0]
    return [ref, *ops]


def fuse_residual(graph: Graph) -> Graph:
    """A matmul or norm that only an addition reads takes the other term as its residual input."""
    uses = graph.uses()
    producer = {op.output: op for op in graph.ops}
    absorbed: set[str] = set()
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind == "add":
            term, out = op.inputs
            matmul = producer[out.value]
            fits = matmul.kind in ("matmul", "rms_norm") and len(matmul.inputs) == 1
            fits |= matmul.kind == "experts" and len(matmul.inputs) == 2
            if fits and uses[out.value] == 1:
                absorbed.add(out.value)
                op = replace(matmul, inputs=(*matmul.inputs, term), output=op.output)
        ops.append(op)
    return graph.with_ops([op for op in ops if op.output not in absorbed], graph.values)


def quantize_activations(graph: Graph, dtype: str = "a12") -> Graph:
    """Matmuls on grouped weights read quantized activations, quantized right before.

    12 bits unless told: what 8 bits lose is far more than the bf16 cache does
    (``benchmarks/activations.py``).
    """
    values = dict(graph.values)
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind in ("matmul", "experts") and graph.weights[op.weights[0]].grouped:
            source = values[op.inputs[0].value]
            name = f"{source.name}.{dtype}"
            if name not in values:
                cols = graph.weights[op.weights[0]].cols
                values[name] = Value(name, source.rows, cols, dtype)
                ops.append(Op("quantize", (op.inputs[0],), name))
            op = replace(op, inputs=(Ref(name), *op.inputs[1:]))
        if op.kind == "experts" and graph.weights[op.weights[2]].grouped:
            op = op.with_attrs(between=dtype)  # what lies between their products
        ops.append(op)
    return graph.with_ops(ops, values)


def fuse_quantize(graph: Graph) -> Graph:
    """A norm or an activation that only a quantization reads writes int8 itself."""
    uses = graph.uses()
    producer = {op.output: op for op in graph.ops}
    absorbed: set[str] = set()
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind == "quantize":
            source = producer[op.inputs[0].value]
            fits = source.kind in ("rms_norm", "layer_norm", "activate")
            residual = source.kind == "rms_norm" and len(source.inputs) > 1
            if fits and not residual and uses[source.output] == 1:
                absorbed.add(source.output)
                op = replace(source, output=op.output)
        ops.append(op)
    return graph.with_ops([op for op in ops if op.output not in absorbed], graph.values)


def split_head(graph: Graph) -> Graph:
    """The last product becomes one from which the largest logits may be asked for alone.

    Its weights lie in two planes, and ``workspace`` holds what bounds need (``bounded.h``). Only
    where they are ``q8_0`` and nothing but the embedding reads them too, and the logits are the
    product itself, times a positive scale.
    """
    op = graph.ops[-1]
    weight = graph.weights[op.weights[0]] if op.weights else None
    others = {o.kind for o in graph.ops[:-1] if weight and weight.name in o.weights}
    if (
        weight is None
        or (op.kind, len(op.inputs), len(op.weights), weight.dtype) != ("matmul", 1, 1, "q8_0")
        or graph.values[op.output].rows != "R"
        or not graph.values[op.inputs[0].value].quantized
        or float(op.attrs.get("scale", 1)) <= 0
        or others - {"embed"}
    ):
        return graph
    plan = Value(f"{op.output}.plan", "R", bound_plan_floats(weight.rows, weight.cols))
    head = replace(op, kind="head", inputs=(*op.inputs, Ref(plan.name)))
    planes = replace(weight, dtype="q8_planes")
    graph = replace(graph, weights={**graph.weights, weight.name: planes})
    ops = [*graph.ops[:-1], Op("workspace", (), plan.name), head]
    return graph.with_ops(ops, {**graph.values, plan.name: plan})


def skip_inactive(graph: Graph) -> Graph:
    """Mark what need not be computed for a lone token whose activations are zero.

    ``sparse``: a matmul whose input is zero below a threshold, or behind relu; it reads no weights
    of the groups that are zero throughout. ``gates``: a gate and what it gates in one matmul, and
    relu behind it; panels that the gate closes are left out. Neither changes a result.
    """
    producer = {op.output: op for op in graph.ops}
    marked: dict[str, Op] = {}
    for op in graph.ops:
        source = producer[op.inputs[0].value] if op.inputs else op
        if op.kind != "matmul" or source.kind != "activate":
            continue
        relu = source.attrs["fn"] == "relu"
        if relu or "threshold" in source.attrs:
            marked[op.output] = op.with_attrs(sparse=True)
        gate = producer[source.inputs[0].value]
        gated = len(source.inputs) == 2 and source.inputs[1].value == gate.output
        if relu and gated and source.inputs[0].column == 0 and len(gate.weights) == 2:
            marked[gate.output] = gate.with_attrs(gates=True)
    return graph.with_ops([marked.get(op.output, op) for op in graph.ops], graph.values)


def split_threads(graph: Graph) -> Graph:
    """Give every op its grain: the most items (rows, panels, heads) a thread takes at once.

    Large enough that taking is free and neighbours share what they read; the executor cuts
    small steps finer, so that all threads have work.
    """
    ops = []
    for op in graph.ops:
        large = op.kind in ("matmul", "head", "expert_matmul", "attention")
        ops.append(op.with_attrs(grain=32 if large else 16))
    return graph.with_ops(ops, graph.values)


# Ops whose rows depend on the same rows of what the ops before them made.
_BY_ROW = frozenset(
    ("embed", "rope_table", "rms_norm", "layer_norm", "quantize", "activate", "add", "gather")
)


def chain_rows(graph: Graph) -> Graph:
    """Ops that go row by row, one after the other, become a chain: ``chained`` to the one before.

    Who has taken rows of the first runs them through the chain, while they are in its cache, and
    no thread waits for another in between: a norm after attention or MLP (`post_norms`) then costs
    a layer no barrier.
    """
    ops = list(graph.ops[:1])
    for before, op in pairwise(graph.ops):
        together = graph.values[before.output].rows == graph.values[op.output].rows
        by_row = before.kind in _BY_ROW and op.kind in _BY_ROW
        ops.append(op.with_attrs(chained=True) if together and by_row else op)
    return graph.with_ops(ops, graph.values)


def cpu_passes(activations: str = "int12") -> tuple[Pass, ...]:
    """What the native executor needs, in order.

    Parameters
    ----------
    activations : str
        What meets quantized weights, one of `pronk.graph.pack.ACTIVATIONS`.
    """
    return (
        fuse_siblings,
        fuse_rope,
        fuse_residual,
        partial(quantize_activations, dtype=ACTIVATIONS[activations]),
        fuse_quantize,
        skip_inactive,
        split_experts,
        split_head,
        split_threads,
        chain_rows,
    )


CPU_PASSES = cpu_passes()


def run_passes(graph: Graph, passes: tuple[Pass, ...]) -> Graph:
    """Apply passes in order; each result is checked."""
    for apply in passes:
        graph = apply(graph)
        graph.check()
    return graph
