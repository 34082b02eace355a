"""One step of a loaded program: plain arrays in, logits out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pronk._native import Executor
from pronk.graph.cost import Step
from pronk.graph.lower import lower
from pronk.graph.program import Program

__all__ = ["OpTime", "Recording", "Runner"]


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
    """

    def __init__(self, program: Program, threads: int, isa: str = "") -> None:
        spec, limits = program.spec, program.limits
        self.program = program
        self.executor = Executor(
            threads=threads,
            isa=isa,
            weight_bytes=program.layout.weight_bytes,
            arena_bytes=program.layout.arena_bytes,
            max_tokens=limits.max_tokens,
            max_rows=limits.max_rows,
            max_sequences=limits.max_sequences,
            max_blocks=limits.max_blocks,
            num_blocks=limits.num_blocks,
            vocab=spec.vocab_size,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            kv_bf16=limits.kv_dtype == "bf16",
            kv_block_bytes=program.kv_block_bytes,
        )
        self._owners = lower(
            program.graph, program.layout, self.executor, program.kv_block_bytes // spec.num_layers
        )
        self._steps: list[Step] | None = None
        output = program.graph.values[program.graph.output]
        self._logits = (program.layout.value_offsets[output.name], output.row_bytes)
        self._tables = np.zeros((limits.max_sequences, limits.max_blocks), np.int32)

    def step(
        self,
        ids: list[int],
        positions: list[int],
        sequences: list[int],
        blocks: list[list[int]],
        rows: list[int],
    ) -> NDArray[np.float32]:
        """Run tokens of one or more sequences and return logits of some of them.

        Parameters
        ----------
        ids, positions, sequences : list of int, one per token
            Token id, position in its sequence, and index into ``blocks``.
        blocks : list of list of int
            KV blocks of each sequence, covering its positions.
        rows : list of int
            Tokens whose logits are wanted; may be empty.

        Returns
        -------
        ndarray, float32 [rows, vocab]

        Raises
        ------
        ValueError
            If an id, a position or a block is out of range.
        """
        for i, held in enumerate(blocks):
            self._tables[i, : len(held)] = held
        self.executor.run(
            np.array(ids, np.int32),
            np.array(positions, np.int32),
            np.array(sequences, np.int32),
            self._tables[: len(blocks)],
        )
        logits = np.empty((len(rows), self.program.spec.vocab_size), np.float32)
        at_once = self.program.limits.max_rows
        if self._steps is not None:
            heads = (min(at_once, len(rows) - start) for start in range(0, len(rows), at_once))
            self._steps.append(Step.of(positions, sequences, heads))
        for start in range(0, len(rows), at_once):
            part = logits[start : start + at_once]
            self.executor.head(np.array(rows[start : start + at_once], np.int32))
            self.executor.read(self._logits, part)
        return logits

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
