"""A checkpoint's tensors into an executor: natively where they lie in a file as they will run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pronk._native import load_weights as load_native
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.loss import ErrorSum
from pronk.engine.runner import Runner
from pronk.errors import CheckpointError
from pronk.graph.ir import Weight
from pronk.graph.pack import PANEL, block_dtype
from pronk.graph.rope import model_frequencies

__all__ = ["Conversion", "Loaded", "load_weights"]

_CHUNK = 1 << 18  # bytes read at once: temporaries are bytes that the user pays for
_STRETCH = 1 << 26  # bytes loaded between two reports of progress

_Matrix = tuple[str, int, int, int, int, int, int]
_Part = list[tuple[int, _Matrix]]


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors that run in another format than they are stored in, and what it cost.

    ``error`` is the relative root-mean-square difference of the weights.
    """

    stored: str
    runs_as: str
    tensors: int
    error: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading took.

    Parameters
    ----------
    conversions : tuple of Conversion
        Empty when everything runs in the format it is stored in.
    packing : float
        Seconds that reading the same weights packed would have saved.
    """

    conversions: tuple[Conversion, ...]
    packing: float


class _Errors:
    """What conversions lose, by pair of formats."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], ErrorSum] = {}
        self._names: dict[tuple[str, str], set[str]] = {}

    def of(self, stored: str, runs_as: str, name: str) -> ErrorSum:
        self._names.setdefault((stored, runs_as), set()).add(name)
        return self._sums.setdefault((stored, runs_as), ErrorSum())

    def conversions(self) -> tuple[Conversion, ...]:
        return tuple(
            Conversion(*pair, len(self._names[pair]), total.relative_rms)
            for pair, total in self._sums.items()
        )


def load_weights(
    checkpoint: Checkpoint,
    runner: Runner,
    progress: Callable[[int, int], None] | None = None,
    *,
    last: int = 0,
    before_last: Callable[[], object] | None = None,
) -> Loaded:
    """Pack every weight of a program from a checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    runner : Runner
    progress : callable, optional
        Called with (bytes done, bytes in all).
    last : int
        Bytes that are loaded only after `before_last` has returned.
    before_last : callable, optional

    Raises
    ------
    CheckpointError
        If a file has become shorter since its header was read.
    """
    weights = runner.program.graph.weights
    tensors = checkpoint.tensors
    total = sum(tensors[name].nbytes for name in weights if name in tensors)
    done, packing = 0, 0.0
    errors = _Errors()
    here: _Part = []  # bytes in the file, and what the native loader takes

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    for name, weight in weights.items():
        matrix = _stored(checkpoint, runner, weight)
        if matrix is not None:
            here.append((tensors[name].nbytes, matrix))
        elif weight.rows == 1:
            _load_vector(checkpoint, runner, weight)
            report(tensors[name].nbytes if name in tensors else 0)
        else:
            packing += _load_matrix(checkpoint, runner, weight, errors)
            report(tensors[name].nbytes)
    first, rest = _split(here, last)
    for part in (first, rest):
        if part is rest and before_last:
            before_last()
        # In one call, unless somebody watches: between two of them the interpreter may be taken.
        for stretch in _stretches(part, _STRETCH if progress else total):
            failed, seconds = load_native(runner.executor, [matrix for _, matrix in stretch])
            if failed >= 0:
                raise CheckpointError(f"{checkpoint.path} ended while its tensors were read")
            packing += seconds / runner.executor.threads
            report(sum(nbytes for nbytes, _ in stretch))
    return Loaded(errors.conversions(), packing)


def _split(here: _Part, last: int) -> tuple[_Part, _Part]:
    """Cut before the matrices at the end that hold `last` bytes."""
    at, kept = len(here), 0
    while at and kept < last:
        at -= 1
        kept += here[at][0]
    return here[:at], here[at:]


def _stretches(part: _Part, most: int) -> Iterator[_Part]:
    """Runs of matrices of about `most` bytes."""
    held, run = 0, []
    for entry in part:
        run.append(entry)
        held += entry[0]
        if held >= most:
            yield run
            held, run = 0, []
    if run:
        yield run


def _stored(checkpoint: Checkpoint, runner: Runner, weight: Weight) -> _Matrix | None:
    """What the native loader takes; None if the rows must be converted or put together."""
    if weight.name not in checkpoint.tensors:
        return None
    info = checkpoint.tensors[weight.name]
    span = checkpoint.span(weight.name)
    dtype = "f32" if weight.rows == 1 else weight.dtype
    if span is None or info.dtype != block_dtype(dtype) or span.pairs % PANEL:
        return None
    offset = runner.program.layout.weight_offsets[weight.name]
    return dtype, offset, weight.rows, weight.cols, span.fd, span.offset, span.pairs


def _load_vector(checkpoint: Checkpoint, runner: Runner, weight: Weight) -> None:
    program = runner.program
    values = model_frequencies(program.spec, weight.name, program.limits.context)
    if values is None:
        values = checkpoint.read_float(weight.name).reshape(-1)
    offset = runner.program.layout.weight_offsets[weight.name]
    runner.executor.write(offset, np.ascontiguousarray(values, np.float32))


def _load_matrix(checkpoint: Checkpoint, runner: Runner, weight: Weight, errors: _Errors) -> float:
    """Pack a matrix through Python; gives the seconds spent on more than reading."""
    info = checkpoint.tensors[weight.name]
    dtype = block_dtype(weight.dtype)
    offset = runner.program.layout.weight_offsets[weight.name]
    # Conversion goes through float32, so the same bytes make fewer rows.
    row = info.nbytes // weight.rows if info.dtype == dtype else 4 * weight.cols
    step = max(1, _CHUNK // max(1, row) // PANEL) * PANEL
    spent = time.thread_time()
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        rows = checkpoint.read_rows(weight.name, start, stop)
        if info.dtype != dtype:
            exact = dequantize(rows, info.dtype, weight.cols)
            rows = quantize(exact, dtype)
            difference = dequantize(rows, dtype, weight.cols)
            difference -= exact
            errors.of(info.dtype, dtype, weight.name).add(difference, exact)
        runner.executor.pack(weight.dtype, offset, weight.rows, weight.cols, start, rows)
    return time.thread_time() - spent
