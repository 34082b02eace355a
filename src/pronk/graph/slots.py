"""Experts in memory: all of them, or slots for the hot ones while the rest stay in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pronk.errors import BudgetError, RequestError
from pronk.graph.ir import Graph
from pronk.graph.pack import packed_bytes

__all__ = ["ExpertSet", "Slots", "expert_sets", "least_memory", "plan_slots", "sets_of_plans"]


@dataclass(frozen=True, slots=True)
class ExpertSet:
    """The experts that a layer chooses from.

    Parameters
    ----------
    experts : int
    matrices : tuple of str
        The weights that hold them, one expert after the other.
    sizes : tuple of int
        Bytes of one expert in each of these.
    """

    experts: int
    matrices: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Slots:
    """Memory for some of the experts, whichever layers they belong to.

    Parameters
    ----------
    offset : int
        Where the first slot begins in the weight region.
    count, nbytes : int
        How many there are, and the bytes of each: those of the largest expert.
    """

    offset: int
    count: int
    nbytes: int


def sets_of_plans(graph: Graph) -> dict[str, tuple[str, ...]]:
    """The matrices of experts that each table of a `dispatch` op sends rows to."""
    found: dict[str, tuple[str, ...]] = {}
    for op in graph.ops:
        if op.kind == "expert_matmul":
            plan = op.inputs[1].value
            found[plan] = (*found.get(plan, ()), *op.weights)
    return found


def expert_sets(graph: Graph) -> tuple[ExpertSet, ...]:
    """The sets of experts of a graph whose experts are taken apart; layers may share one."""
    experts = {op.output: op.integer("experts") for op in graph.ops if op.kind == "dispatch"}
    found: dict[tuple[str, ...], ExpertSet] = {}
    for plan, names in sets_of_plans(graph).items():
        count = experts[plan]
        sizes = (packed_bytes(w.dtype, w.rows // count, w.cols)
                 for w in (graph.weights[name] for name in names))  # fmt: skip
        found.setdefault(names, ExpertSet(count, names, tuple(sizes)))
    return tuple(found.values())


def least_memory(sets: Sequence[ExpertSet], top_k: int, tokens: int) -> int:
    """Bytes of the experts that one layer may go to in a step of so many tokens.

    These are in memory at once, in slots that hold any expert.
    """
    largest = max((one.nbytes for one in sets), default=0)
    return largest * max((min(one.experts, tokens * top_k) for one in sets), default=0)


def plan_slots(
    sets: Sequence[ExpertSet], memory: int | None, least: int, offset: int
) -> Slots | None:
    """Slots for as many experts as some bytes hold; None where they hold all.

    Parameters
    ----------
    sets : sequence of ExpertSet
    memory : int or None
        Bytes for experts; None: as many as it takes.
    least : int
        The bytes that it takes (`least_memory`).
    offset : int
        Where the slots begin.

    Raises
    ------
    RequestError
        If there are no experts.
    BudgetError
        If so many bytes do not hold what one step needs.
    """
    if memory is None:
        return None
    if not sets:
        raise RequestError("this model has no experts: memory for them cannot be limited")
    total = sum(one.experts * one.nbytes for one in sets)
    if memory >= total:
        return None
    largest = max(one.nbytes for one in sets)
    if memory < least:
        raise BudgetError(
            f"{memory} bytes hold {memory // largest} experts, and a step may go to "
            f"{least // largest} of a layer at once: give --expert-memory {least} or more "
            f"({total} holds all)"
        )
    return Slots(offset, memory // largest, largest)
