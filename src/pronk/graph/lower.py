"""Graph + layout -> a loaded native executor: the CPU backend."""

from __future__ import annotations

from collections.abc import Callable

from pronk._native import Executor
from pronk.graph.ir import Graph, Op, Ref
from pronk.graph.memory import Layout

__all__ = ["lower"]

_NONE = (-1, 0)


class _Lowering:
    """One method an op kind: names to offsets."""

    def __init__(self, graph: Graph, layout: Layout, executor: Executor, layer_bytes: int) -> None:
        self.graph, self.layout, self.executor = graph, layout, executor
        self.layer_bytes = layer_bytes

    def slot(self, ref: Ref) -> tuple[int, int]:
        value = self.graph.values[ref.value]
        return self.layout.value_offsets[ref.value] + ref.column * 4, value.row_bytes

    def weight(self, name: str) -> int:
        return self.layout.weight_offsets[name]

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

    def _quantized(self, op: Op) -> bool:
        return self.graph.values[op.output].quantized

    def _part(self, name: str, column: int, bias: int = -1) -> tuple[str, int, int, int, int]:
        weight = self.graph.weights[name]
        return weight.dtype, self.weight(name), weight.rows, column, bias

    def _embed(self, op: Op, out: tuple[int, int], grain: int) -> None:
        cols = self.graph.weights[op.weights[0]].cols
        self.executor.embed(self._part(op.weights[0], 0), cols, _scale(op), out, grain)

    def _rope_table(self, op: Op, out: tuple[int, int], grain: int) -> None:
        head_dim = 2 * self.graph.weights[op.weights[0]].cols
        self.executor.rope_table(self.weight(op.weights[0]), head_dim, out, grain)

    def _rms_norm(self, op: Op, out: tuple[int, int], grain: int) -> None:
        self.executor.rms_norm(
            self.slot(op.inputs[0]), self.weight(op.weights[0]), float(op.attrs["eps"]),
            self.graph.values[op.output].width, self._second(op), out, self._quantized(op),
            self._is_head(op), grain)  # fmt: skip

    def _layer_norm(self, op: Op, out: tuple[int, int], grain: int) -> None:
        self.executor.layer_norm(
            self.slot(op.inputs[0]), self.weight(op.weights[0]), float(op.attrs["eps"]),
            self.graph.values[op.output].width, out, self._quantized(op), self._is_head(op),
            grain)  # fmt: skip

    def _quantize(self, op: Op, out: tuple[int, int], grain: int) -> None:
        width = self.graph.values[op.output].width
        self.executor.quantize(
            self.slot(op.inputs[0]), width, out, self._quantized(op), self._is_head(op), grain
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
            self.graph.values[op.inputs[0].value].quantized, _scale(op), self._second(op), out,
            self._is_head(op), grain)  # fmt: skip

    def _rope_store(self, op: Op, out: tuple[int, int], grain: int) -> None:
        qkv, table = (self.slot(ref) for ref in op.inputs)
        layer = op.integer("layer") * self.layer_bytes
        self.executor.rope_store(qkv, table, op.integer("heads"), layer, grain)

    def _attend(self, op: Op, out: tuple[int, int], grain: int) -> None:
        layer = op.integer("layer") * self.layer_bytes
        qkv, parts = (self.slot(ref) for ref in op.inputs)
        self.executor.attention(
            qkv, parts, op.integer("heads"), layer, float(op.attrs["scale"]), out, grain
        )

    def _workspace(self, op: Op, out: tuple[int, int], grain: int) -> None:
        """Memory that the next op uses: nothing to run."""

    def _activate(self, op: Op, out: tuple[int, int], grain: int) -> None:
        self.executor.activate(
            str(op.attrs["fn"]), self.slot(op.inputs[0]), self._second(op),
            self.graph.values[op.output].width, out, self._quantized(op), grain)  # fmt: skip

    def _softcap(self, op: Op, out: tuple[int, int], grain: int) -> None:
        width = self.graph.values[op.output].width
        cap = float(op.attrs["cap"])
        self.executor.softcap(self.slot(op.inputs[0]), cap, width, out, grain)

    def _add(self, op: Op, out: tuple[int, int], grain: int) -> None:
        a, b = (self.slot(ref) for ref in op.inputs)
        self.executor.add(a, b, self.graph.values[op.output].width, out, grain)

    def _gather(self, op: Op, out: tuple[int, int], grain: int) -> None:
        width = self.graph.values[op.output].width
        self.executor.gather(self.slot(op.inputs[0]), width, out, grain)


def _scale(op: Op) -> float:
    return float(op.attrs.get("scale", 1))


def lower(graph: Graph, layout: Layout, executor: Executor, layer_bytes: int) -> tuple[int, ...]:
    """Add every op of a graph to an executor whose regions follow the layout.

    Parameters
    ----------
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
    lowering = _Lowering(graph, layout, executor, layer_bytes)
    owners: list[int] = []
    for index, op in enumerate(graph.ops):
        lowering.add(op)
        owners += [index] * (executor.op_count - len(owners))
    return tuple(owners)
