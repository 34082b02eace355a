"""One step of a loaded program: plain arrays in, logits out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pronk._native import MAGNITUDE_SHIFT, Executor, ExpertReadError
from pronk.engine.sampler import Keep
from pronk.errors import CheckpointError, RequestError
from pronk.graph.cost import Step
from pronk.graph.lower import lower
from pronk.graph.program import Program
from pronk.graph.reference import normed

__all__ = ["ExpertReads", "OpTime", "Recording", "Runner", "magnitudes"]


def magnitudes() -> NDArray[np.float32]:
    """The least magnitude of each bin that `Runner.activity` counts, float32."""
    return (np.arange(1 << (31 - MAGNITUDE_SHIFT), dtype=np.uint32) << MAGNITUDE_SHIFT).view(
        np.float32
    )


@dataclass(frozen=True, slots=True)
class ExpertReads:
    """Experts in memory, and those that were read from their file.

    Parameters
    ----------
    experts, slots : int
        Experts of all layers, and how many of them memory holds.
    memory : int
        Bytes of these.
    hits, misses : int
        Experts that steps went to and found in memory, or had to read. A step counts an expert
        once, however many of its tokens go there.
    read : int
        Bytes that were read.
    tokens : int
        Tokens that ran meanwhile.
    """

    experts: int
    slots: int
    memory: int
    hits: int
    misses: int
    read: int
    tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of the experts that steps went to which was in memory."""
        return self.hits / (self.hits + self.misses) if self.misses else 1.0

    @property
    def read_per_token(self) -> float:
        """Bytes read, by token."""
        return self.read / self.tokens if self.tokens else 0.0

    def since(self, earlier: ExpertReads) -> ExpertReads:
        """What has come to it since an earlier reading."""
        return replace(
            self, hits=self.hits - earlier.hits, misses=self.misses - earlier.misses,
            read=self.read - earlier.read, tokens=self.tokens - earlier.tokens)  # fmt: skip

    def to_dict(self) -> dict[str, float]:
        """Plain data under stable names."""
        return {**asdict(self), "hit_rate": self.hit_rate, "read_per_token": self.read_per_token}


@dataclass(frozen=True, slots=True)
class OpTime:
    """How often an op ran, its seconds, and of these the seconds one thread waited for others."""

    calls: int
    seconds: float
    wait: float


@dataclass(frozen=True, slots=True)
class Recording:
    """The steps that ran, and the times of each op of the graph over them all."""

    steps: tuple[Step, ...]
    times: tuple[OpTime, ...]


class Runner:
    """Owns the executor of a program: its weights, its KV pool, its threads.

    Parameters
    ----------
    program : Program
    threads : int
    isa : str
        Kernels to use; empty picks the CPU's best.

    Attributes
    ----------
    seconds : float
        What the last `run` and its calls of `head` took of the calling thread's core: what other
        processes took meanwhile is left out.
    expert_file : Path or None
        Packed weights that experts are read from, where they have slots.
    """

    def __init__(self, program: Program, threads: int, isa: str = "") -> None:
        spec, limits = program.spec, program.limits
        self.program = program
        self.seconds = 0.0
        self.expert_file: Path | None = None
        pools = program.kv_pools
        groups = [pool.group for pool in pools]
        self._process = os.getpid()
        self.executor = Executor(
            threads=threads,
            isa=isa,
            weight_bytes=program.layout.weight_bytes,
            arena_bytes=program.layout.arena_bytes,
            max_tokens=limits.max_tokens,
            max_rows=limits.max_rows,
            max_sequences=limits.max_sequences,
            max_blocks=limits.max_blocks,
            vocab=spec.vocab_size,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            kv_dtype=limits.kv_dtype,
            kv_groups=[
                (pool.block_bytes, pool.blocks, g.window, g.sinks, g.attention == "chunked")
                for pool, g in zip(pools, groups, strict=True)
            ],
        )
        layout = program.layout
        if layout.slots is not None:
            slots, sets = layout.slots, layout.experts
            self.executor.keep_experts(
                slots.offset, slots.nbytes, slots.count, len(sets), sets[0].experts
            )
        self._owners = lower(
            program.graph, program.layout, self.executor, groups, program.kv_layer_bytes
        )
        self._steps: list[Step] | None = None
        output = program.graph.values[program.graph.output]
        self._logits = (program.layout.value_offsets[output.name], output.row_bytes)
        self._tables = np.full((len(groups), limits.max_sequences, limits.max_blocks), -1, np.int32)

    def run(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        blocks: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        """Run tokens of one or more sequences; `head` gives logits of them.

        Parameters
        ----------
        ids, positions, sequences : sequence of int, one per token
            Token id, position in its sequence, and index into ``blocks``.
        blocks : sequence of sequence of sequence of int
            KV blocks of each sequence, for each KV group of the program: of its positions in
            their order, -1 where no token of the step sees any of them.

        Raises
        ------
        ValueError
            If an id, a position or a block is out of range.
        RequestError
            If this process was forked from the one that loaded the model.
        CheckpointError
            If an expert that is not in memory cannot be read; its file is removed.
        """
        if self._process != os.getpid() and self.executor.threads > 1:
            raise RequestError(
                "this process was forked after the model was loaded, and threads do not survive "
                "that: load the model here, run it with one thread, or spawn instead of fork"
            )
        tables = self._tables[:, : len(blocks)]
        for i, held in enumerate(blocks):
            for table, numbers in zip(tables, held, strict=True):
                table[i, : len(numbers)] = numbers
        start = time.thread_time()
        try:
            self.executor.run(
                np.array(ids, np.int32),
                np.array(positions, np.int32),
                np.array(sequences, np.int32),
                np.ascontiguousarray(tables),
            )
        except ExpertReadError as error:
            if self.expert_file:
                self.expert_file.unlink(missing_ok=True)
            raise CheckpointError(
                f"the packed weights of an expert cannot be read ({error}): start again, and they "
                "are packed anew"
            ) from None
        self.seconds = time.thread_time() - start
        if self._steps is not None:
            self._steps.append(Step.of(positions, sequences))

    def head(self, rows: Sequence[int], keep: Sequence[Keep | None] = ()) -> NDArray[np.float32]:
        """Logits of tokens of the last `run`.

        Parameters
        ----------
        rows : sequence of int
            At most ``max_rows`` places of tokens in the run.
        keep : sequence of Keep or None, one per row, optional
            Which logits count. Where all rows say so, and the program can, others may be minus
            infinity: then about half of the head's weights are read. None wants all.

        Returns
        -------
        ndarray, float32 [rows, vocab]
            Read-only, in the executor's own memory: the next call overwrites it.
        """
        start = time.thread_time()
        wanted = [k for k in keep if k is not None]
        before = self.executor.planes
        self.executor.head(np.array(rows, np.int32), wanted if len(wanted) == len(rows) else [])
        self.seconds += time.thread_time() - start
        if self._steps:
            last = self._steps[-1]
            calls, read, plane = self.executor.planes
            unread = (calls - before[0]) * plane - (read - before[1])
            self._steps[-1] = replace(
                last, heads=(*last.heads, len(rows)), unread=last.unread + max(unread, 0)
            )
        return self.executor.view(self._logits, len(rows), self.program.spec.vocab_size)

    def hidden(self, first: int, count: int) -> NDArray[np.float32]:
        """Last hidden states of some tokens of the last `run`, after the final norm.

        Parameters
        ----------
        first, count : int
            Where they begin in the run, and how many they are.

        Returns
        -------
        ndarray, float32 [count, hidden size]
            A copy, in float32 throughout: the head itself may meet them quantized.
        """
        program = self.program
        values, offsets = program.graph.values, program.layout.value_offsets
        ops = iter(program.graph.ops)
        gather = next(op for op in ops if op.kind == "gather")
        norm = next(ops)
        rows, (weight,) = gather.inputs[0].value, norm.weights
        width = values[gather.output].width
        size = values[rows].row_bytes
        x = self.executor.view((offsets[rows] + first * size, size), count, width)
        return normed(norm, x, self.executor.vector(program.layout.weight_offsets[weight], width))

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        blocks: Sequence[Sequence[Sequence[int]]],
        rows: Sequence[int],
    ) -> NDArray[np.float32]:
        """`run`, and a copy of the logits of any number of its tokens: float32 [rows, vocab]."""
        self.run(ids, positions, sequences, blocks)
        logits = np.empty((len(rows), self.program.spec.vocab_size), np.float32)
        at_once = self.program.limits.max_rows
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            logits[start : start + len(part)] = self.head(part)
        return logits

    def expert_counts(self) -> NDArray[np.uint64]:
        """How often each expert was chosen since loading or `reset_experts`.

        Returns
        -------
        ndarray, uint64 [layers that have experts, experts]
            Tokens of prompts count like others, and so do drafted ones that did not stand.
        """
        counts = self.executor.expert_counts
        return np.array(counts, np.uint64).reshape(len(counts), len(counts[0]) if counts else 0)

    def experts_per_token(self) -> float:
        """Mean number of experts that a token went to in a layer, over the same time."""
        counts, tokens = self.expert_counts(), self.executor.routed_tokens
        return float(counts.sum()) / (len(counts) * tokens) if tokens else 0.0

    def expert_reads(self) -> ExpertReads:
        """How often experts were in memory, over the same time."""
        layout, tokens = self.program.layout, self.executor.routed_tokens
        experts = sum(one.experts for one in layout.experts)
        count, nbytes = experts, layout.expert_bytes
        if layout.slots is not None:
            count, nbytes = layout.slots.count, layout.slots.count * layout.slots.nbytes
        return ExpertReads(experts, count, nbytes, *self.executor.expert_reads, tokens)

    def reset_experts(self) -> None:
        """Count from zero."""
        self.executor.reset_experts()

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Below which magnitude each MLP's activations are zero, instead of what its layer says."""
        self.executor.set_thresholds(list(thresholds))

    def watch(self, on: bool = True) -> None:
        """Count the activations of MLPs from now on, from zero; or no longer."""
        self.executor.watch(on)

    def activity(self) -> NDArray[np.uint64]:
        """What was counted since `watch`: uint64 [MLPs, magnitudes + 2].

        How many inputs of ``down`` had each magnitude (`magnitudes`), how many groups of 32 there
        were, and how many of these were zero throughout. Experts are not counted.
        """
        return self.executor.activity()

    def record(self, on: bool = True) -> None:
        """Keep the steps and the times of ops from now on, from nothing; or no longer."""
        self._steps = [] if on else None
        self.executor.profile(on)

    def recording(self) -> Recording:
        """What was kept since `record`; empty when nothing is."""
        sums = [[0, 0, 0] for _ in self.program.graph.ops]
        for owner, (calls, total, wait) in zip(self._owners, self.executor.times, strict=False):
            sums[owner][0] = max(sums[owner][0], calls)  # parts of one op run together
            sums[owner][1] += total
            sums[owner][2] += wait
        times = (OpTime(calls, total / 1e9, wait / 1e9) for calls, total, wait in sums)
        return Recording(tuple(self._steps or ()), tuple(times))
