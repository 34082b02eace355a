"""Helpers to build runners over tiny checkpoints, for tests of the graph and the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from pronk import _native
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.open import open_checkpoint
from pronk.engine.blocks import KvBlocks
from pronk.engine.engine import Engine
from pronk.engine.request import Event
from pronk.engine.runner import Runner
from pronk.engine.service import Service, UnavailableError
from pronk.engine.weights import load_weights
from pronk.graph.build import build_decoder
from pronk.graph.ir import Graph
from pronk.graph.pack import block_dtype
from pronk.graph.passes import CPU_PASSES, run_passes
from pronk.graph.program import Limits, compile_program, stored_dtypes
from pronk.graph.reference import Reference
from pronk.graph.rope import computed_weight, model_frequencies
from pronk.model import compile_checkpoint
from pronk.spec import LayerSpec, ModelSpec


def isas() -> list[str]:
    """The vector instruction sets that this build has and this machine runs."""
    found = []
    for name in ("generic", "avx2", "avx512", "avx512_bf16", "amx", "neon"):
        try:
            found.append(_native.isa(name))
        except ValueError:
            continue
    return found


def make_runner(
    path: Path,
    *,
    threads: int = 2,
    isa: str = "",
    layers: tuple[LayerSpec, ...] | None = None,
    **limits: object,
) -> Runner:
    """A runner with the weights of a checkpoint, perhaps with other kinds of layers."""
    with open_checkpoint(path) as checkpoint:
        spec = replace(checkpoint.spec, layers=layers) if layers else checkpoint.spec
        program = compile_checkpoint(checkpoint, Limits(**{"context": 256, **limits}), spec)
        runner = Runner(program, threads, isa)
        load_weights(checkpoint, runner)
    return runner


def reference_weights(checkpoint: Checkpoint, graph: Graph) -> dict[str, np.ndarray]:
    """float32 weights of a graph for the NumPy interpreter."""
    weights = {}
    for name, weight in graph.weights.items():
        computed = computed_weight(checkpoint.spec, name, 256, checkpoint.read_float)
        if computed is not None:
            weights[name] = computed
        else:
            values = checkpoint.read_float(name)
            weights[name] = values.reshape(-1) if weight.rows == 1 else values
    return weights


def run_whole(runner: Runner, ids: list[int], chunk: int | None = None) -> np.ndarray:
    """Logits of every token of one sequence, its prompt cut into chunks."""
    kv = KvBlocks(runner.program.kv_pools, runner.program.limits.max_tokens)
    holding = kv.hold()
    chunk = chunk or runner.program.limits.max_tokens
    parts = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        n = len(part)
        positions = list(range(start, start + n))
        kv.move(holding, start, start + n)
        parts.append(runner.step(part, positions, [0] * n, [holding.blocks], list(range(n))))
    return np.concatenate(parts)


class Held:
    """The KV blocks of some sequences that share a runner."""

    def __init__(self, runner: Runner, sequences: int) -> None:
        self.kv = KvBlocks(runner.program.kv_pools, runner.program.limits.max_tokens)
        self.of = [self.kv.hold() for _ in range(sequences)]

    def tables(self, positions: list[int], sequences: list[int]) -> list[list[list[int]]]:
        """What `Runner.step` wants, for a step that runs these tokens."""
        for i, holding in enumerate(self.of):
            own = [p for p, s in zip(positions, sequences, strict=True) if s == i]
            if own:
                self.kv.move(holding, own[0], own[-1] + 1)
        return [holding.blocks for holding in self.of]


def random_weights(
    graph: Graph, spec: ModelSpec, context: int = 256, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights of a graph that no checkpoint holds: as float32, and rows as they are packed."""
    rng = np.random.default_rng(seed)
    exact, rows = {}, {}
    for name, weight in graph.weights.items():
        if weight.rows == 1:
            computed = model_frequencies(spec, name, context)
            exact[name] = 1 + 0.1 * rng.standard_normal(weight.cols).astype(np.float32)
            if computed is not None:
                exact[name] = computed.astype(np.float32)
            continue
        shape = (weight.rows, weight.cols)
        values = rng.standard_normal(shape).astype(np.float32) / np.sqrt(weight.cols)
        dtype = block_dtype(weight.dtype)
        rows[name] = quantize(values.astype(np.float32), dtype)
        exact[name] = dequantize(rows[name], dtype, weight.cols)
    return exact, rows


def fill_runner(
    runner: Runner, exact: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]
) -> Runner:
    """Write the weights of `random_weights` into a runner."""
    for name, weight in runner.program.graph.weights.items():
        offset = runner.program.layout.weight_offsets[name]
        if weight.rows == 1:
            runner.executor.write(offset, exact[name])
        else:
            runner.executor.pack(weight.dtype, offset, weight.rows, weight.cols, 0, rows[name])
    return runner


def random_runner(
    spec: ModelSpec, *, threads: int = 2, isa: str = "", **limits: object
) -> tuple[Runner, dict[str, np.ndarray]]:
    """A runner of a spec that has no checkpoint, with random float32 weights; and these."""
    program = compile_program(spec, lambda name: "f32", Limits(**{"context": 256, **limits}))
    runner = Runner(program, threads, isa)
    exact, rows = random_weights(program.graph, spec, program.limits.context)
    return fill_runner(runner, exact, rows), exact


def engine_step(engine: str, path: Path):
    """``step(ids, positions, sequences, rows)`` of an engine with a checkpoint's weights."""
    if engine == "native":
        runner = make_runner(path, kv_dtype="f32", kv_tokens=512)
        held = Held(runner, 2)

        def native(ids, positions, sequences, rows):
            tables = held.tables(positions, sequences)
            return runner.step(ids, positions, sequences, tables, rows)

        return native
    with open_checkpoint(path) as checkpoint:
        stored = {name: (info.dtype, info.cols) for name, info in checkpoint.tensors.items()}
        graph = build_decoder(checkpoint.spec, stored_dtypes(stored))
        if engine == "passes":
            graph = run_passes(graph, CPU_PASSES)
        return Reference(graph, reference_weights(checkpoint, graph)).step


@contextmanager
def halted(service: Service, after: int = 0) -> Iterator[None]:
    """An engine that takes no step in the block, or so many; what it is told to, it does."""
    gate, left = threading.Event(), [after]

    def halt(engine: Engine) -> None:
        step = engine.step

        def held() -> list[Event]:
            left[0] -= 1
            if left[0] >= 0 or gate.is_set():
                return step()
            time.sleep(0.001)
            return []

        engine.step = held

    service.call(halt).result(240)
    try:
        yield
    finally:
        gate.set()
        with suppress(UnavailableError):  # closed in the block
            service.call(lambda engine: vars(engine).pop("step"))
