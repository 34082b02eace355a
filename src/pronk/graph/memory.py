"""Where everything lies: weights in one region, values in one arena by their lifetimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pronk.graph.ir import Graph, Weight
from pronk.graph.moe import expert_rows
from pronk.graph.pack import PANEL, align, packed_bytes
from pronk.graph.slots import ExpertSet, Slots, expert_sets, least_memory, plan_slots

__all__ = ["Layout", "plan_layout", "weight_bytes"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes of weights and values, and the sizes of the two regions.

    Parameters
    ----------
    weight_offsets : mapping of str to int
        Where weights lie in a file of packed weights, those of experts last; and in their region
        too, but for experts that have slots there.
    file_bytes, weight_bytes : int
        Bytes of all weights, and of the region of those in memory.
    value_offsets : mapping of str to int
    arena_bytes : int
    experts : tuple of ExpertSet
    slots : Slots or None
        Where experts are in memory while they are hot; None: all are, always.
    least : int
        The smallest memory for experts that a step can do with, in bytes.
    """

    weight_offsets: Mapping[str, int]
    file_bytes: int
    weight_bytes: int
    value_offsets: Mapping[str, int]
    arena_bytes: int
    experts: tuple[ExpertSet, ...] = ()
    slots: Slots | None = None
    least: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(one.experts * one.nbytes for one in self.experts)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weights but those of experts, which begin here."""
        return self.file_bytes - self.expert_bytes


def weight_bytes(weight: Weight) -> int:
    """Bytes a weight takes in its region, a multiple of 64; vectors are padded to a panel."""
    if weight.rows == 1:
        return align(align(weight.cols, PANEL) * 4)
    return align(packed_bytes(weight.dtype, weight.rows, weight.cols))


def plan_layout(
    graph: Graph, max_tokens: int, max_rows: int, expert_memory: int | None = None
) -> Layout:
    """Assign every weight and value its offset.

    Values whose lifetimes do not overlap share bytes (first fit over the ops in order). The
    output of an op marked ``inplace`` is its first input's memory. Ops that are chained work on
    different rows at once, so their values live as if they were one op.

    Parameters
    ----------
    graph : Graph
    max_tokens, max_rows : int
        Most tokens, and most logit rows, of one step.
    expert_memory : int, optional
        Bytes of memory for experts (see `plan_slots`).

    Raises
    ------
    RequestError, BudgetError
        As `plan_slots` does.
    """
    experts = expert_sets(graph)
    of_experts = {name for one in experts for name in one.matrices}
    weight_offsets: dict[str, int] = {}
    end = dense = 0
    for weight in sorted(graph.weights.values(), key=lambda w: w.name in of_experts):
        weight_offsets[weight.name] = end
        end += weight_bytes(weight)
        dense = dense if weight.name in of_experts else end
    top_k = max((op.integer("top_k") for op in graph.ops if op.kind == "dispatch"), default=0)
    least = least_memory(experts, top_k, max_tokens)
    slots = plan_slots(experts, expert_memory, least, dense)
    in_memory = end if slots is None else dense + slots.count * slots.nbytes

    root: dict[str, str] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    i = -1
    for op in graph.ops:
        i += not op.attrs.get("chained")
        source = op.inputs[0].value if op.attrs.get("inplace") else None
        root[op.output] = root[source] if source else op.output
        first.setdefault(root[op.output], i)
        last[root[op.output]] = i
        for ref in op.inputs:
            last[root[ref.value]] = i
    # The output is read after the step; the head's input survives until the head has run.
    last[root[graph.output]] = len(graph.ops)
    head = next(i for i, op in enumerate(graph.ops) if graph.values[op.output].rows == "R")
    for ref in graph.ops[head].inputs:
        last[root[ref.value]] = len(graph.ops)

    rows = {"T": max_tokens, "R": max_rows, "X": expert_rows(graph, max_tokens)}
    offsets: dict[str, int] = {}
    live: list[tuple[int, int, str]] = []  # (offset, end, name)
    arena = 0
    for name in sorted(first, key=lambda n: first[n]):
        live = [entry for entry in live if last[entry[2]] >= first[name]]
        value = graph.values[name]
        size = value.bytes_of(rows[value.rows])
        offset = 0
        for start, stop, _ in sorted(live):
            if offset + size <= start:
                break
            offset = max(offset, stop)
        offsets[name] = offset
        live.append((offset, offset + size, name))
        arena = max(arena, offset + size)
    value_offsets = {name: offsets[root[name]] for name in root}
    return Layout(weight_offsets, end, in_memory, value_offsets, arena, experts, slots, least)
