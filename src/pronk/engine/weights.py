"""A checkpoint's tensors into an executor: natively where they lie in a file as they will run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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
from pronk.graph.program import Program
from pronk.graph.rope import computed_weight

__all__ = ["Conversion", "Loaded", "Loader", "Place", "load_weights", "places"]

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


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a weight, and where they go in the weight region, as a matrix of their own."""

    weight: Weight
    first: int
    rows: int
    offset: int


def places(program: Program) -> list[Place]:
    """Where all weights go, but those of experts that have slots."""
    layout = program.layout
    sets = layout.experts if layout.slots is not None else ()
    elsewhere = {name for one in sets for name in one.matrices}
    return [
        Place(weight, 0, weight.rows, layout.weight_offsets[name])
        for name, weight in program.graph.weights.items()
        if name not in elsewhere
    ]


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
    """Pack every weight of a program from a checkpoint, but experts that have slots.

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
    loader = Loader(checkpoint, runner, progress)
    loader.load(places(runner.program), last, before_last)
    return loader.loaded


class Loader:
    """Packs weights of a checkpoint, in one go or a few at a time.

    Parameters
    ----------
    checkpoint : Checkpoint
    runner : Runner
    progress : callable, optional
        Called with (bytes done, bytes of all weights).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: Runner,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._checkpoint, self._runner, self._progress = checkpoint, runner, progress
        tensors, weights = checkpoint.tensors, runner.program.graph.weights
        self._total = sum(tensors[name].nbytes for name in weights if name in tensors)
        self._done, self._packing = 0, 0.0
        self._errors = _Errors()

    @property
    def loaded(self) -> Loaded:
        """What it took so far."""
        return Loaded(self._errors.conversions(), self._packing)

    def _report(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self._total)

    def load(
        self,
        wanted: Sequence[Place],
        last: int = 0,
        before_last: Callable[[], object] | None = None,
    ) -> None:
        """Pack some weights; `last` and `before_last` as `load_weights` takes them.

        Raises
        ------
        CheckpointError
            If a file has become shorter since its header was read.
        """
        checkpoint, runner = self._checkpoint, self._runner
        here: _Part = []  # bytes in the file, and what the native loader takes
        for place in wanted:
            matrix = _stored(checkpoint, place)
            if matrix is not None:
                here.append((_nbytes(checkpoint, place), matrix))
                continue
            if place.weight.rows == 1:
                _load_vector(checkpoint, runner, place)
            else:
                self._packing += _load_matrix(checkpoint, runner, place, self._errors)
            self._report(_nbytes(checkpoint, place))
        first, rest = _split(here, last)
        for part in (first, rest):
            if part is rest and before_last:
                before_last()
            # In one call, unless somebody watches: between two the interpreter may be taken.
            for stretch in _stretches(part, _STRETCH if self._progress else self._total):
                failed, seconds = load_native(runner.executor, [matrix for _, matrix in stretch])
                if failed >= 0:
                    raise CheckpointError(f"{checkpoint.path} ended while its tensors were read")
                self._packing += seconds / runner.executor.threads
                self._report(sum(nbytes for nbytes, _ in stretch))


def _nbytes(checkpoint: Checkpoint, place: Place) -> int:
    """Bytes of a place's rows in the file."""
    info = checkpoint.tensors.get(place.weight.name)
    return 0 if info is None else info.nbytes * place.rows // place.weight.rows


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


def _stored(checkpoint: Checkpoint, place: Place) -> _Matrix | None:
    """What the native loader takes; None if the rows must be converted or put together."""
    weight = place.weight
    if weight.name not in checkpoint.tensors:
        return None
    info = checkpoint.tensors[weight.name]
    span = checkpoint.span(weight.name)
    dtype = "f32" if weight.rows == 1 else weight.dtype
    if span is None or info.dtype != block_dtype(dtype) or span.pairs % PANEL:
        return None
    at = span.offset + info.nbytes * place.first // weight.rows
    return dtype, place.offset, place.rows, weight.cols, span.fd, at, span.pairs


def _load_vector(checkpoint: Checkpoint, runner: Runner, place: Place) -> None:
    program, name = runner.program, place.weight.name
    values = computed_weight(program.spec, name, program.limits.context, checkpoint.read_float)
    if values is None:
        values = checkpoint.read_float(name).reshape(-1)
    runner.executor.write(place.offset, np.ascontiguousarray(values, np.float32))


def _load_matrix(checkpoint: Checkpoint, runner: Runner, place: Place, errors: _Errors) -> float:
    """Pack a matrix through Python; gives the seconds spent on more than reading."""
    weight = place.weight
    info = checkpoint.tensors[weight.name]
    dtype = block_dtype(weight.dtype)
    # Conversion goes through float32, so the same bytes make fewer rows.
    row = info.nbytes // weight.rows if info.dtype == dtype else 4 * weight.cols
    step = max(1, _CHUNK // max(1, row) // PANEL) * PANEL
    spent = time.thread_time()
    for start in range(0, place.rows, step):
        stop = min(start + step, place.rows)
        rows = checkpoint.read_rows(weight.name, place.first + start, place.first + stop)
        if info.dtype != dtype:
            exact = dequantize(rows, info.dtype, weight.cols)
            rows = quantize(exact, dtype)
            difference = dequantize(rows, dtype, weight.cols)
            difference -= exact
            errors.of(info.dtype, dtype, weight.name).add(difference, exact)
        runner.executor.pack(weight.dtype, place.offset, place.rows, weight.cols, start, rows)
    return time.thread_time() - spent
