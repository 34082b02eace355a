"""The pass that takes experts apart into ops that the native executor has."""

from __future__ import annotations

from dataclasses import replace

from pronk.graph.ir import Attr, Graph, Op, Ref, Value

__all__ = ["PLAN_WIDTH", "expert_rows", "split_experts"]

PLAN_WIDTH = 16  # 4-byte fields of a row of the table that sends tokens to experts


def expert_rows(graph: Graph, tokens: int) -> int:
    """Most rows of all experts together (rows "X"), in a step of so many tokens.

    Each of a token's experts gets a row, and those of one expert start at a multiple of 16.
    """
    most = 0
    for op in graph.ops:
        if op.kind == "dispatch":
            pairs = tokens * op.integer("top_k")
            most = max(most, pairs + 15 * min(pairs, op.integer("experts")))
    return most


def split_experts(graph: Graph) -> Graph:
    """Experts become products of gathered rows: the rows of an expert lie together.

    ``dispatch`` sorts the choices of all tokens by expert; ``expert_gather`` copies each token's
    row to the place of every choice; ``expert_matmul`` multiplies the rows of each expert with its
    part of a weight, and reads no other expert's; ``combine`` adds a token's results in the order
    of its choices, so that the sum does not depend on who else chose what.
    """
    values = dict(graph.values)
    ops: list[Op] = []

    def emit(op: Op, width: int, dtype: str = "f32") -> Ref:
        values[op.output] = Value(op.output, "X", width, dtype)
        ops.append(op)
        return Ref(op.output)

    for op in graph.ops:
        if op.kind != "experts":
            ops.append(op)
            if op.kind == "route":  # at once: natively the two are one
                sizes = {"experts": op.integer("experts"), "top_k": op.integer("top_k")}
                emit(Op("dispatch", (Ref(op.output),), f"{op.output}.plan", attrs=sizes),
                     PLAN_WIDTH)  # fmt: skip
            continue
        h, routes, *residual = op.inputs
        gate, up, down = (graph.weights[name] for name in op.weights)
        if gate.grouped != up.grouped:
            raise ValueError(f"{gate.name} and {up.name} want different activations")
        width, name = down.cols, op.output
        sizes = {"experts": op.integer("experts"), "top_k": op.integer("top_k")}
        scales = {"scales_input": bool(op.attrs["scales_input"])}
        plan = Ref(f"{routes.value}.plan")
        source = values[h.value]
        x = emit(Op("expert_gather", (h, plan), f"{name}.in", attrs=sizes), gate.cols, source.dtype)
        # The last input is where the row of a lone token is: it need not be gathered.
        both = Op("expert_matmul", (x, plan, h), f"{name}.gate+up", (gate.name, up.name),
                  {"cols": gate.cols, **sizes})  # fmt: skip
        y = emit(both, 2 * width)
        m = emit(
            Op("expert_activate", (y, Ref(y.value, width), routes, plan), f"{name}.act",
               attrs={"fn": op.attrs["fn"], **sizes, **scales}),
            width, str(op.attrs.get("between", "f32")),
        )  # fmt: skip
        y = emit(
            Op("expert_matmul", (m, plan), f"{name}.down", (down.name,), {"cols": width, **sizes}),
            down.rows // sizes["experts"],
        )
        attrs: dict[str, Attr] = {**sizes, **scales}
        if "scale" in op.attrs:
            attrs["scale"] = op.attrs["scale"]
        ops.append(replace(op, kind="combine", inputs=(y, routes, plan, *residual), weights=(),
                           attrs=attrs))  # fmt: skip
    return graph.with_ops(ops, values)
