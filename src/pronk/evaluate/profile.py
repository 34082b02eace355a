"""Where the time of a prompt and of the tokens after it goes, op by op."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pronk.errors import RequestError
from pronk.evaluate.latency import check_sizes, turned
from pronk.graph.cost import Cost, Step, label, program_costs
from pronk.graph.program import Program
from pronk.spec import SamplingParams

__all__ = ["Phase", "Row", "profile"]


class _OpTime(Protocol):
    @property
    def calls(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def wait(self) -> float: ...


class _Recording(Protocol):
    @property
    def steps(self) -> tuple[Step, ...]: ...
    @property
    def times(self) -> Sequence[_OpTime]: ...


class _Model(Protocol):
    @property
    def program(self) -> Program: ...
    def generate(self, prompt: list[int], params: SamplingParams, /) -> Iterator[Any]: ...
    def record(self, on: bool = True) -> None: ...
    def recording(self) -> _Recording: ...


@dataclass(frozen=True, slots=True)
class Row:
    """The ops that do the same in every layer: how often they ran, their time, what they moved.

    ``wait`` is the part of ``seconds`` in which one thread had done its share and waited.
    """

    label: str
    calls: int
    seconds: float
    wait: float
    cost: Cost


@dataclass(frozen=True, slots=True)
class Phase:
    """A prompt's steps (``prefill``) or those of the tokens after it (``decode``).

    ``seconds`` is all of it; what is not in the rows went to Python: scheduling, sampling, text.
    """

    name: str
    tokens: int
    context: int
    steps: int
    seconds: float
    rows: tuple[Row, ...]

    @property
    def outside(self) -> float:
        """Seconds outside the ops."""
        return max(self.seconds - sum(row.seconds for row in self.rows), 0.0)

    @property
    def wait(self) -> float:
        """Seconds in barriers."""
        return sum(row.wait for row in self.rows)

    @property
    def cost(self) -> Cost:
        """What all ops cost."""
        return sum((row.cost for row in self.rows), Cost())

    def to_dict(self, bandwidth: float, peak: float) -> dict[str, Any]:
        """Plain data, with rates and fractions of the limits.

        Parameters
        ----------
        bandwidth, peak : float
            Bytes a second, and int8 operations (two a multiply-add) a second.
        """

        def figures(seconds: float, cost: Cost) -> dict[str, Any]:
            at_most = max(seconds, 1e-12)
            return {
                "seconds": seconds,
                "share": seconds / max(self.seconds, 1e-12),
                "weight_bytes": cost.weights,
                "kv_bytes": cost.kv,
                "activation_bytes": cost.activations,
                "bytes": cost.bytes,
                "multiply_adds": cost.macs,
                "bytes_per_second": cost.bytes / at_most,
                "ops_per_second": 2 * cost.macs / at_most,
                "fraction_of_bandwidth": cost.bytes / at_most / bandwidth,
                "fraction_of_peak": 2 * cost.macs / at_most / peak,
            }

        return {
            "tokens": self.tokens,
            "context": self.context,
            "steps": self.steps,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-12),
            **figures(self.seconds, self.cost),
            "wait": self.wait,
            "outside": self.outside,
            "ops": [
                {"op": r.label, "calls": r.calls, "wait": r.wait, **figures(r.seconds, r.cost)}
                for r in self.rows
            ],
        }


def profile(
    model: _Model,
    prompt: Sequence[int],
    tokens: int = 128,
    runs: int = 3,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Phase, Phase]:
    """Run a prompt and greedy tokens after it, several times, with the times of ops recorded.

    Returns
    -------
    prefill, decode : Phase
        Each from the run in which it took the median of the times (the shorter of two).

    Raises
    ------
    RequestError
        If a size is out of range, or the model stops before `tokens` tokens.
    """
    check_sizes(prompt, tokens, runs, warmup)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    measured: tuple[list[Phase], list[Phase]] = ([], [])
    try:
        for run in range(warmup + runs):
            if progress:
                progress(run, warmup + runs)
            pieces = model.generate(turned(prompt, run), params)
            for phases, name, count in zip(
                measured, ("prefill", "decode"), (1, tokens - 1), strict=True
            ):
                model.record()
                start = clock()
                made = sum(1 for _, _ in zip(range(count), pieces, strict=False))
                seconds = clock() - start
                if made < count:
                    raise RequestError("the model stopped too early: give a longer context")
                if run >= warmup:
                    size = len(prompt) if name == "prefill" else count
                    phases.append(_phase(model, name, size, len(prompt), seconds))
    finally:
        model.record(False)
    prefill, decode = (sorted(p, key=lambda phase: phase.seconds) for p in measured)
    return prefill[(runs - 1) // 2], decode[(runs - 1) // 2]


def _phase(model: _Model, name: str, tokens: int, context: int, seconds: float) -> Phase:
    program, recording = model.program, model.recording()
    graph = program.graph
    rows: dict[str, Row] = {}
    costs = program_costs(program, recording.steps)
    for op, spent, cost in zip(graph.ops, recording.times, costs, strict=True):
        if not spent.calls:
            continue
        key = label(graph, op)
        row = rows.get(key, Row(key, 0, 0.0, 0.0, Cost()))
        rows[key] = Row(
            key,
            row.calls + spent.calls,
            row.seconds + spent.seconds,
            row.wait + spent.wait,
            row.cost + cost,
        )
    by_time = sorted(rows.values(), key=lambda row: -row.seconds)
    return Phase(name, tokens, context, len(recording.steps), seconds, tuple(by_time))
