"""A checkpoint's tensors into an executor, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.engine.runner import Runner
from pronk.graph.build import FREQUENCIES, rope_frequencies
from pronk.graph.ir import Weight
from pronk.graph.pack import PANEL

__all__ = ["Conversion", "load_weights"]

_CHUNK = 1 << 18  # bytes read at once: temporaries are bytes that the user pays for


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors that run in another format than they are stored in, and what it cost.

    ``error`` is the relative root-mean-square difference of the weights.
    """

    stored: str
    runs_as: str
    tensors: int
    error: float


class _Loss:
    """Squared error and squared norm per pair of formats."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], list[float]] = {}
        self.names: dict[tuple[str, str], set[str]] = {}

    def add(self, pair: tuple[str, str], name: str, difference: float, norm: float) -> None:
        sums = self.sums.setdefault(pair, [0.0, 0.0])
        sums[0] += difference
        sums[1] += norm
        self.names.setdefault(pair, set()).add(name)

    def conversions(self) -> list[Conversion]:
        return [
            Conversion(stored, runs, len(self.names[stored, runs]), (d / n) ** 0.5 if n else 0.0)
            for (stored, runs), (d, n) in self.sums.items()
        ]


def load_weights(
    checkpoint: Checkpoint, runner: Runner, progress: Callable[[int, int], None] | None = None
) -> list[Conversion]:
    """Pack every weight of a program from a checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    runner : Runner
    progress : callable, optional
        Called with (bytes done, bytes in all).

    Returns
    -------
    list of Conversion
        Empty when everything runs in the format it is stored in.
    """
    program = runner.program
    names = [n for n in program.graph.weights if n != FREQUENCIES]
    total = sum(checkpoint.tensors[n].nbytes for n in names)
    done = 0
    loss = _Loss()
    for name, weight in program.graph.weights.items():
        if weight.rows == 1:
            _load_vector(checkpoint, runner, weight)
        else:
            _load_matrix(checkpoint, runner, weight, loss)
        if progress and name != FREQUENCIES:
            done += checkpoint.tensors[name].nbytes
            progress(done, total)
    return loss.conversions()


def _load_vector(checkpoint: Checkpoint, runner: Runner, weight: Weight) -> None:
    spec = runner.program.spec
    if weight.name == FREQUENCIES:
        values = rope_frequencies(spec.rope, spec.head_dim)
    else:
        values = checkpoint.read_float(weight.name).reshape(-1)
    offset = runner.program.layout.weight_offsets[weight.name]
    runner.executor.write(offset, np.ascontiguousarray(values, np.float32))


def _load_matrix(checkpoint: Checkpoint, runner: Runner, weight: Weight, loss: _Loss) -> None:
    info = checkpoint.tensors[weight.name]
    offset = runner.program.layout.weight_offsets[weight.name]
    # Conversion goes through float32, so the same bytes make fewer rows.
    row = info.nbytes // weight.rows if info.dtype == weight.dtype else 4 * weight.cols
    step = max(1, _CHUNK // max(1, row) // PANEL) * PANEL
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        rows = checkpoint.read_rows(weight.name, start, stop)
        if info.dtype != weight.dtype:
            exact = dequantize(rows, info.dtype, weight.cols)
            rows = quantize(exact, weight.dtype)
            difference = dequantize(rows, weight.dtype, weight.cols) - exact
            loss.add((info.dtype, weight.dtype), weight.name, _square(difference), _square(exact))
        runner.executor.pack(weight.dtype, offset, weight.rows, weight.cols, start, rows)


def _square(x: NDArray[np.float32]) -> float:
    return float(np.vdot(x, x))
