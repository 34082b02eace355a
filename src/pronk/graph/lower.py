"""Graph + layout -> a loaded native executor: the CPU backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pronk._native import Executor
from pronk.graph.ir import Graph, Op, Ref
from pronk.graph.kv import KvGroup, place
from pronk.graph.memory import Layout
from pronk.graph.reference import alibi_slopes
from pronk.graph.slots import sets_of_plans

__all__ = ["lower"]

_NONE = (-1, 0)


class _Lowering:
    """One method an op kind: names to offsets."""

    def __init__(
        self,
        graph: Graph,
        layout: Layout,
        executor: Executor,
        groups: Sequence[KvGroup],
        layer_bytes: int,
    ) -> None:
        self.graph, self.layout, self.executor = graph, layout, executor
        self.groups, self.layer_bytes = groups, layer_bytes
        self.routing: Op | None = None
        sets = {one.matrices: i for i, one in enumerate(layout.experts)}
        self.sets = {plan: sets[names] for plan, names in sets_of_plans(graph).items()}

    def slot(self, ref: Ref) -> tuple[int, int]:
        value = self.graph.values[ref.value]
        return self.layout.value_offsets[ref.value] + ref.column * 4, value.row_bytes

    def weight(self, name: str) -> int:
        return self.layout.weight_offsets[name]

    def kv(self, op: Op) -> tuple[int, int]:
        """The KV group of an op's layer, and where the layer lies in a block of it."""
        group, index = place(self.groups, op.integer("layer"))
        return group, index * self.layer_bytes

    def add(self, op: Op) -> None:
        value = self.graph.values[op.output]
        lower: Callable[[Op, tuple[int, int], int], None] | None
        lower = getattr(self, f"_{op.kind}", None)
        if lower is None:
            raise ValueError(f"the native executor has no op {op.kind!r}: a pass is missing")
        lower(op, self.slot(Ref(value.name)), int(op.attrs.get("grain", 1)))
        if op.attrs.get("chained"):
            self.executor.chain()

    def _second(self, op: Op) -> tuple[int, int]:
        return self.slot(op.inputs[1]) if len(op.inputs) > 1 else _NONE

    def _is_head(self, op: Op) -> bool:
        return self.graph.values[op.output].rows == "R"

    def _precision(self, op: Op) -> str:
        return self.graph.values[op.output].dtype

    def _part(self, name: str, column: int, bias: int = -1) -> tuple[str, int, int, int, int]:
        weight = self.graph.weights[name]
        return weight.dtype, self.weight(name), weight.rows, column, bias

    def _embed(self, op: Op, out: tuple[int, int], grain: int) -> None:
        cols = self.graph.weights[op.weights[0]].cols
        self.executor.embed(self._part(op.weights[0], 0), cols, _scale(op), out, grain)

    def _rope_table(self, op: Op, out: tuple[int, int], grain: int) -> None:
        head_dim = 2 * self.graph.weights[op.weights[0]].cols
        scale = float(op.attrs.get("scale", 1))
        self.executor.rope_table(self.weight(op.weights[0]), head_dim, scale, out, grain)

    def _rms_norm(self, op: Op, out: tuple[int, int], grain: int) -> None:
        self.executor.rms_norm(
            self.slot(op.inputs[0]), self.weight(op.weights[0]), float(op.attrs["eps"]),
            self.graph.values[op.output].width, self._second(op), out, self._precision(op),
            self._is_head(op), grain)  # fmt: skip

    def _layer_norm(self, op: Op, out: tuple[int, int], grain: int) -> None:
        self.executor.layer_norm(
            self.slot(op.inputs[0]), self.weight(op.weights[0]), float(op.attrs["eps"]),
            self.graph.values[op.output].width, out, self._precision(op), self._is_head(op),
            grain)  # fmt: skip

    def _quantize(self, op: Op, out: tuple[int, int], grain: int) -> None:
        width = self.graph.values[op.output].width
        self.executor.quantize(
            self.slot(op.inputs[0]), width, out, self._precision(op), self._is_head(op), grain
        )

    def _matmul(self, op: Op, out: tuple[int, int], grain: int) -> None:
        parts: list[tuple[str, int, int, int, int]] = []
        column = 0
        for name in op.weights:
            weight = self.graph.weights[name]
            if weight.rows == 1:  # the bias of the part before it
                parts[-1] = (*parts[-1][:4], self.weight(name))
            else:
                parts.append(self._part(name, column))
                column += weight.rows
        self.executor.matmul(
            self.slot(op.inputs[0]), parts, op.integer("cols"),
            self.graph.values[op.inputs[0].value].dtype, _scale(op), self._second(op), out,
            self._is_head(op), grain, bool(op.attrs.get("gates")),
            bool(op.attrs.get("sparse")))  # fmt: skip

    def _head(self, op: Op, out: tuple[int, int], grain: int) -> None:
        x, plan = (self.slot(ref) for ref in op.inputs)
        self.executor.bounded_matmul(
            x, plan, self._part(op.weights[0], 0), op.integer("cols"),
            self.graph.values[op.inputs[0].value].dtype, _scale(op), out, grain)  # fmt: skip

    def _rope_store(self, op: Op, out: tuple[int, int], grain: int) -> None:
        qkv, *table = (self.slot(ref) for ref in op.inputs)
        weights = [self.weight(name) for name in op.weights]
        center = weights.pop() if op.attrs.get("centered") else -1
        q, k = weights or _NONE
        self.executor.rope_store(
            qkv, table[0] if table else _NONE, op.integer("heads"), *self.kv(op),
            str(op.attrs.get("qk_norm", "")), (q, k), float(op.attrs.get("eps", 0)), center,
            grain)  # fmt: skip

    def _attend(self, op: Op, out: tuple[int, int], grain: int) -> None:
        heads = op.integer("heads")
        qkv, parts = (self.slot(ref) for ref in op.inputs)
        attrs = op.attrs
        alibi = float(attrs.get("alibi", 0))
        self.executor.attention(
            qkv, parts, heads, *self.kv(op), float(attrs["scale"]), out, grain,
            softcap=float(attrs.get("softcap", 0)),
            slopes=alibi_slopes(heads, alibi).tolist() if alibi else [],
            growth=float(attrs.get("growth", 0)),
            growth_span=int(attrs.get("growth_span", 1)))  # fmt: skip

    def _workspace(self, op: Op, out: tuple[int, int], grain: int) -> None:
        """Memory that the next op uses: nothing to run."""

    def _activate(self, op: Op, out: tuple[int, int], grain: int) -> None:
        self.executor.activate(
            str(op.attrs["fn"]), self.slot(op.inputs[0]), self._second(op),
            self.graph.values[op.output].width, out, self._precision(op), grain,
            float(op.attrs.get("threshold", 0)))  # fmt: skip

    def _softcap(self, op: Op, out: tuple[int, int], grain: int) -> None:
        width = self.graph.values[op.output].width
        cap = float(op.attrs["cap"])
        self.executor.softcap(self.slot(op.inputs[0]), cap, width, out, grain)

    def _add(self, op: Op, out: tuple[int, int], grain: int) -> None:
        a, b = (self.slot(ref) for ref in op.inputs)
        self.executor.add(a, b, self.graph.values[op.output].width, out, grain)

    def _sizes(self, op: Op) -> tuple[int, int]:
        return op.integer("experts"), op.integer("top_k")

    def _route(self, op: Op, out: tuple[int, int], grain: int) -> None:
        """The native op fills the table of the next one too: it has to be lowered with it."""
        self.routing = op

    def _dispatch(self, op: Op, out: tuple[int, int], grain: int) -> None:
        route = self.routing
        if route is None or op.inputs[0].value != route.output:
            raise ValueError("experts are not chosen right before they are dispatched")
        self.executor.route(
            self.slot(route.inputs[0]), self._sizes(op), route.attrs["score"] == "softmax",
            bool(route.attrs["normalize"]), float(route.attrs["threshold"]),
            route.integer("least"), self.sets[op.output], self.slot(op.inputs[0]), out,
            grain)  # fmt: skip

    def _expert_gather(self, op: Op, out: tuple[int, int], grain: int) -> None:
        x, plan = (self.slot(ref) for ref in op.inputs)
        self.executor.expert_gather(
            x, plan, self._sizes(op), self.graph.values[op.output].width, self._precision(op), out,
            grain)  # fmt: skip

    def _expert_matmul(self, op: Op, out: tuple[int, int], grain: int) -> None:
        x, plan, *lone = (self.slot(ref) for ref in op.inputs)
        parts: list[tuple[str, int, int, int, int]] = []
        column = 0
        slots, held = self.layout.slots, self.layout.experts[self.sets[op.inputs[1].value]]
        for name in op.weights:
            part = self._part(name, column)
            if slots is not None:  # in the first slot
                at = sum(held.sizes[: held.matrices.index(name)])
                part = (part[0], slots.offset + at, *part[2:])
            parts.append(part)
            column += self.graph.weights[name].rows // op.integer("experts")
        self.executor.expert_matmul(
            x, lone[0] if lone else _NONE, plan, self._sizes(op), parts, op.integer("cols"),
            self.graph.values[op.inputs[0].value].dtype, out, grain)  # fmt: skip

    def _expert_activate(self, op: Op, out: tuple[int, int], grain: int) -> None:
        gate, up, routes, plan = (self.slot(ref) for ref in op.inputs)
        self.executor.expert_activate(
            str(op.attrs["fn"]), gate, up, routes, plan, self._sizes(op),
            self.graph.values[op.output].width, bool(op.attrs["scales_input"]), out,
            self._precision(op), grain)  # fmt: skip

    def _combine(self, op: Op, out: tuple[int, int], grain: int) -> None:
        y, routes, plan, *residual = (self.slot(ref) for ref in op.inputs)
        self.executor.combine(
            y, residual[0] if residual else _NONE, routes, plan, self._sizes(op),
            self.graph.values[op.output].width, bool(op.attrs["scales_input"]),
            float(op.attrs.get("scale", 1)), out, grain)  # fmt: skip

    def _gather(self, op: Op, out: tuple[int, int], grain: int) -> None:
        width = self.graph.values[op.output].width
        self.executor.gather(self.slot(op.inputs[0]), width, out, grain)


def _scale(op: Op) -> float:
    return float(op.attrs.get("scale", 1))


def lower(
    graph: Graph,
    layout: Layout,
    executor: Executor,
    groups: Sequence[KvGroup],
    layer_bytes: int,
) -> tuple[int, ...]:
    """Add every op of a graph to an executor whose regions follow the layout.

    Parameters
    ----------
    groups : sequence of KvGroup
        As the executor has them.
    layer_bytes : int
        Bytes of one layer's part of a KV block.

    Returns
    -------
    tuple of int
        For each op of the executor, the index of the graph's op that it is, or is a part of.

    Raises
    ------
    ValueError
        If the graph holds an op that only the interpreter has.
    """
    lowering = _Lowering(graph, layout, executor, groups, layer_bytes)
    owners: list[int] = []
    for index, op in enumerate(graph.ops):
        lowering.add(op)
        owners += [index] * (executor.op_count - len(owners))
    return tuple(owners)
