"""Weights into an executor: from the packed cache, or packed and, if that pays, kept there."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from pronk import __version__
from pronk.aside import Aside
from pronk.checkpoint import packed_cache
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.packed_cache import Key
from pronk.engine.runner import Runner
from pronk.engine.weights import Conversion, load_weights
from pronk.graph.rope import model_frequencies

try:
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

__all__ = ["Weights", "identity", "provide_weights"]

WORTHWHILE = 0.1
"""Seconds that a later start must save for a copy on disk to be worth its bytes."""


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
    """
    key = Key(checkpoint.files, _program(checkpoint, runner))
    use_cache = use_cache and bool(key.files) and packed_cache.limit() > 0
    if use_cache:
        facts = packed_cache.restore(key, runner.executor, last, before_last)
        if facts is not None:
            size = sum(t.nbytes for t in checkpoint.tensors.values())
            if progress:
                progress(size, size)
            return Weights(tuple(Conversion(**c) for c in facts["conversions"]), cached=True)
    loaded = load_weights(checkpoint, runner, progress, last=last, before_last=before_last)
    if not use_cache:
        return Weights(loaded.conversions, note="it is turned off")
    if loaded.packing < WORTHWHILE:
        return Weights(loaded.conversions, note=f"it would save {loaded.packing * 1000:.0f} ms")
    facts = {"conversions": [asdict(c) for c in loaded.conversions]}
    # The checkpoint is closed before the writer has read what it needs.
    key = Key(tuple(os.dup(fd) for fd in key.files), key.program)
    return Weights(loaded.conversions, writer=Aside(lambda: _keep(key, runner, facts)))


def _keep(key: Key, runner: Runner, facts: dict[str, object]) -> str:
    try:
        # Below everything else: on Linux a thread has a niceness of its own.
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        return packed_cache.store(key, runner.executor, facts)
    finally:
        for fd in key.files:
            os.close(fd)


def identity(checkpoint: Checkpoint, runner: Runner) -> str:
    """Names a model and all that decides the bits of its KV cache."""
    content = packed_cache.content_hash(checkpoint.files)
    program = runner.program
    rest = [_program(checkpoint, runner), repr(program.spec), program.limits.kv_dtype, __version__]
    digest = blake2b(json.dumps([content, *rest]).encode(), digest_size=16)
    return digest.hexdigest()


def _program(checkpoint: Checkpoint, runner: Runner) -> str:
    """All that decides what lies where in the weight region, besides the checkpoint's bytes."""
    program = runner.program
    spec, offsets = program.spec, program.layout.weight_offsets
    weights = [[w.name, w.dtype, w.rows, w.cols, offsets[w.name]]
               for w in program.graph.weights.values()]  # fmt: skip
    # How a file's rows are read follows from what kind of file and model it is.
    kind = [checkpoint.format, spec.family, spec.head_dim]
    # These lie among the weights, and some follow from the context.
    computed = (model_frequencies(spec, name, program.limits.context) for name in offsets)
    ropes = [frequencies.tolist() for frequencies in computed if frequencies is not None]
    return json.dumps([runner.executor.isa, runner.executor.weight_bytes, kind, ropes, weights])
