"""Weights into an executor: from the packed cache, or packed and, if that pays, kept there."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pronk import __version__, _native
from pronk.aside import Aside
from pronk.checkpoint import packed_cache
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.packed_cache import Key
from pronk.engine.runner import Runner
from pronk.engine.weights import Conversion, Loaded, Loader, Place, load_weights, places
from pronk.errors import RequestError
from pronk.graph.memory import Layout
from pronk.graph.rope import model_frequencies

try:
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

__all__ = ["Weights", "identity", "provide_weights", "read_packed", "write_packed"]

WORTHWHILE = 0.1
"""Seconds that a later start must save for a copy on disk to be worth its bytes."""

_Kept = tuple[int, int, int]  # offset in memory, place in the file, bytes

_SUM_BYTES = 1 << 20  # of weights that are no experts, which have sums of their own


@dataclass(frozen=True, slots=True)
class Weights:
    """How an executor got its weights.

    Parameters
    ----------
    conversions : tuple of Conversion
    cached : bool
        Whether they were read packed.
    writer : Aside or None
        What keeps them for the next start, beside the caller's work; it gives the reason if
        it could not, or "".
    note : str
        Why nothing is read or kept.
    """

    conversions: tuple[Conversion, ...]
    cached: bool = False
    writer: Aside[str] | None = None
    note: str = ""

    def wait(self) -> str:
        """Have the writer end; gives what became of the packed cache, for people."""
        why = self.writer.result() if self.writer else self.note
        if self.cached:
            return "read from the packed cache"
        return f"not kept packed: {why}" if why else "kept packed for the next start"


def provide_weights(
    checkpoint: Checkpoint,
    runner: Runner,
    progress: Callable[[int, int], None] | None = None,
    *,
    use_cache: bool = True,
    last: int = 0,
    before_last: Callable[[], object] | None = None,
) -> Weights:
    """Fill the executor of a program with the weights of a checkpoint.

    Experts that have slots stay in the file of packed weights, which is made if it is not there.

    Parameters
    ----------
    checkpoint, runner, progress, last, before_last
        As `load_weights` takes them.
    use_cache : bool
        Whether packed weights may be read from disk and kept there.

    Raises
    ------
    CheckpointError
        If a file has become shorter since its header was read.
    RequestError
        If experts have slots, and packed weights cannot be kept on disk.
    """
    key = Key(checkpoint.files, _program(checkpoint, runner))
    layout = runner.program.layout
    use_cache = use_cache and bool(key.files) and packed_cache.limit() > 0
    if layout.slots is not None:
        return _provide_slots(checkpoint, runner, key, progress, use_cache, before_last)
    if use_cache:

        def read(fd: int, path: Path, sums: list[int]) -> bool:
            return read_packed(runner, fd, sums, last, before_last)

        facts = packed_cache.restore(key, layout.file_bytes, read)
        if facts is not None:
            return _restored(checkpoint, facts, progress)
    loaded = load_weights(checkpoint, runner, progress, last=last, before_last=before_last)
    if not use_cache:
        return Weights(loaded.conversions, note="it is turned off")
    if loaded.packing < WORTHWHILE:
        return Weights(loaded.conversions, note=f"it would save {loaded.packing * 1000:.0f} ms")

    def write(fd: int) -> tuple[list[int], dict[str, Any]]:
        return write_packed(runner, fd), _facts(loaded)

    # The checkpoint is closed before the writer has read what it needs.
    key = Key(tuple(os.dup(fd) for fd in key.files), key.program)
    return Weights(loaded.conversions, writer=Aside(lambda: _keep(key, layout.file_bytes, write)))


def _provide_slots(
    checkpoint: Checkpoint,
    runner: Runner,
    key: Key,
    progress: Callable[[int, int], None] | None,
    use_cache: bool,
    before_last: Callable[[], object] | None,
) -> Weights:
    """Weights of a program whose experts are read from a file when they are chosen."""
    if not use_cache:
        raise RequestError(
            f"experts without room in memory are read from packed weights on disk, which are "
            f"turned off: leave out --no-packed-cache, unset {packed_cache.ENVIRONMENT}, or give "
            "room to all experts"
        )
    if before_last:  # what it gives back makes room for the weights
        before_last()
    layout = runner.program.layout

    def read(fd: int, path: Path, sums: list[int]) -> bool:
        runner.expert_file = path
        return read_packed(runner, fd, sums)

    def write(fd: int) -> tuple[list[int], dict[str, Any]]:
        dense, experts = _parts(layout)
        loader = Loader(checkpoint, runner, progress)
        loader.load(places(runner.program))
        sums = _native.save_weights(runner.executor, fd, dense)
        for wanted, kept in _batches(runner, experts):
            loader.load(wanted)
            sums += _native.save_weights(runner.executor, fd, kept)
        return sums, _facts(loader.loaded)

    facts = packed_cache.restore(key, layout.file_bytes, read)
    if facts is not None:
        return _restored(checkpoint, facts, progress)
    why = packed_cache.store(key, layout.file_bytes, write, wait=True)
    facts = None if why else packed_cache.restore(key, layout.file_bytes, read)
    if facts is None:
        raise RequestError(
            f"experts without room in memory are read from packed weights on disk, which cannot "
            f"be kept: {why or 'they are gone again'}; make room for them (see pronk list), set "
            f"{packed_cache.ENVIRONMENT} to a larger size, or give room to all experts"
        )
    return Weights(_conversions(facts))


def write_packed(runner: Runner, fd: int) -> list[int]:
    """Write all weights, packed, to a file; gives the sums of its parts."""
    return _native.save_weights(runner.executor, fd, list(chain(*_parts(runner.program.layout))))


def read_packed(
    runner: Runner,
    fd: int,
    sums: Sequence[int],
    last: int = 0,
    before_last: Callable[[], object] | None = None,
) -> bool:
    """Read what `write_packed` wrote; False, and no weights, if it is something else.

    Experts that have slots are read later, as they are chosen.

    Parameters
    ----------
    runner : Runner
    fd : int
    sums : sequence of int
        What `write_packed` gave.
    last, before_last
        As `load_weights` takes them.
    """
    executor, layout = runner.executor, runner.program.layout
    parts, experts = _parts(layout)
    if layout.slots is None:
        parts += experts
    if len(sums) < len(parts):
        return False
    cut = _cut(parts, layout.weight_bytes - max(last, 0))
    if not _native.restore_weights(executor, fd, parts[:cut], sums[:cut]):
        return False
    if before_last:
        before_last()
    if not _native.restore_weights(executor, fd, parts[cut:], sums[cut : len(parts)]):
        return False
    if layout.slots is not None:
        executor.open_experts(fd, [part[1:] for part in experts], sums[len(parts) :])
    return True


def _batches(runner: Runner, experts: list[_Kept]) -> Iterator[tuple[list[Place], list[_Kept]]]:
    """Experts, as many as have slots at a time: where their rows go, and where these are kept."""
    layout, weights = runner.program.layout, runner.program.graph.weights
    slots = layout.slots
    assert slots is not None
    of_expert = iter(experts)
    wanted: list[Place] = []
    kept: list[_Kept] = []
    held = 0
    for one in layout.experts:
        for expert in range(one.experts):
            offset = slots.offset + held * slots.nbytes
            for name, nbytes in zip(one.matrices, one.sizes, strict=True):
                rows = weights[name].rows // one.experts
                wanted.append(Place(weights[name], expert * rows, rows, offset))
                kept.append((offset, *next(of_expert)[1:]))
                offset += nbytes
            held += 1
            if held == slots.count:
                yield wanted, kept
                wanted, kept, held = [], [], 0
    if held:
        yield wanted, kept


def _parts(layout: Layout) -> tuple[list[_Kept], list[_Kept]]:
    """Parts of weights that have a sum each, where all of them lie in memory as in the file.

    The first are of all weights but experts, then come each expert of each set, matrix by matrix.
    """
    dense = (
        (at, min(_SUM_BYTES, layout.dense_bytes - at))
        for at in range(0, layout.dense_bytes, _SUM_BYTES)
    )
    experts = (
        (layout.weight_offsets[name] + expert * nbytes, nbytes)
        for one in layout.experts
        for expert in range(one.experts)
        for name, nbytes in zip(one.matrices, one.sizes, strict=True)
    )
    first, rest = ([(at, at, nbytes) for at, nbytes in parts] for parts in (dense, experts))
    return first, rest


def _cut(parts: list[_Kept], first: int) -> int:
    """How many parts hold the first so many bytes, or a little less."""
    held = 0
    for i, (_, _, nbytes) in enumerate(parts):
        held += nbytes
        if held > first:
            return i
    return len(parts)


def _facts(loaded: Loaded) -> dict[str, Any]:
    return {"conversions": [asdict(c) for c in loaded.conversions]}


def _conversions(facts: dict[str, Any]) -> tuple[Conversion, ...]:
    return tuple(Conversion(**c) for c in facts["conversions"])


def _restored(
    checkpoint: Checkpoint, facts: dict[str, Any], progress: Callable[[int, int], None] | None
) -> Weights:
    size = sum(t.nbytes for t in checkpoint.tensors.values())
    if progress:
        progress(size, size)
    return Weights(_conversions(facts), cached=True)


def _keep(key: Key, size: int, write: Callable[[int], tuple[list[int], dict[str, Any]]]) -> str:
    try:
        # Below everything else: on Linux a thread has a niceness of its own; elsewhere it has none.
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        return packed_cache.store(key, size, write)
    finally:
        for fd in key.files:
            os.close(fd)


def identity(checkpoint: Checkpoint, runner: Runner) -> str:
    """Names a model and all that decides the bits of its KV cache."""
    content = packed_cache.content_hash(checkpoint.files)
    program = runner.program
    rest = [
        _program(checkpoint, runner),
        repr(program.spec),
        program.limits.kv_dtype,
        program.limits.activations,
        __version__,
    ]
    digest = blake2b(json.dumps([content, *rest]).encode(), digest_size=16)
    return digest.hexdigest()


def _program(checkpoint: Checkpoint, runner: Runner) -> str:
    """All that decides what lies where in a file of weights, besides the checkpoint's bytes."""
    program = runner.program
    spec, offsets = program.spec, program.layout.weight_offsets
    weights = [[w.name, w.dtype, w.rows, w.cols, offsets[w.name]]
               for w in program.graph.weights.values()]  # fmt: skip
    # How a file's rows are read follows from what kind of file and model it is.
    kind = [checkpoint.format, spec.family, spec.head_dim]
    # These lie among the weights, and some follow from the context.
    computed = (model_frequencies(spec, name, program.limits.context) for name in offsets)
    ropes = [frequencies.tolist() for frequencies in computed if frequencies is not None]
    return json.dumps([runner.executor.isa, program.layout.file_bytes, kind, ropes, weights])
