"""A spec compiled for a device: graph after its passes, layout, and the planned bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pronk.errors import CheckpointError, RequestError
from pronk.graph.build import build_decoder
from pronk.graph.ir import Graph
from pronk.graph.kv import KvGroup, KvPool, blocks_of, kv_groups
from pronk.graph.memory import Layout, plan_layout
from pronk.graph.pack import GROUP, GROUPED, kv_block_bytes, past_bytes, runtime_dtype
from pronk.graph.passes import Pass, cpu_passes, run_passes
from pronk.spec import Budget, MemoryPlan, ModelSpec

__all__ = [
    "DEFAULT_CONTEXT",
    "Limits",
    "Program",
    "choose_context",
    "compile_program",
    "kv_pools",
    "stored_dtypes",
]

DEFAULT_CONTEXT = 2048  # tokens, where neither the user nor a bundle says otherwise

_TOGETHER = {
    "self_attn": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "experts": ("gate_proj.weight", "up_proj.weight"),
}
_MOST_CHOICES, _MOST_EXPERTS = 64, 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold.

    Parameters
    ----------
    context : int
        Most tokens of one sequence.
    max_tokens, max_rows : int
        Most tokens in a step, and most logit rows computed at once.
    max_sequences : int
        Most sequences in a step.
    kv_tokens : int or None
        Tokens the KV pools hold over all sequences; None means one full context. Layers that
        see a part of a sequence hold that part of as many full sequences.
    kv_dtype : str
        Element type of the KV cache, one of `pronk.graph.pack.KV_DTYPES`.
    activations : str
        What meets quantized weights, one of `pronk.graph.pack.ACTIVATIONS`.
    expert_memory : int or None
        Bytes of memory for experts; those that have no room are read when they are chosen. None
        means that all are in memory.
    """

    context: int
    max_tokens: int = 128
    max_rows: int = 16
    max_sequences: int = 16
    kv_tokens: int | None = None
    kv_dtype: str = "bf16"
    activations: str = "int12"
    expert_memory: int | None = None

    @property
    def max_blocks(self) -> int:
        """Blocks of one full sequence."""
        return blocks_of(self.context)

    def blocks(self, group: KvGroup) -> int:
        """Blocks in the pool of a group of layers."""
        held = self.kv_tokens or self.context
        sequences = min(self.max_sequences, -(-held // self.context))
        bound = group.bound(min(held, self.context), self.max_tokens)
        if group.attention == "global":
            return blocks_of(held)
        return min(blocks_of(held), bound * sequences)


@dataclass(frozen=True, slots=True)
class Program:
    """What the executor loads; its sizes are the plan (weights, KV pool, arena)."""

    spec: ModelSpec
    limits: Limits
    graph: Graph
    layout: Layout

    @property
    def kv_layer_bytes(self) -> int:
        """Bytes of one layer's part of a KV block."""
        return kv_block_bytes(1, self.spec.num_kv_heads, self.spec.head_dim, self.limits.kv_dtype)

    @property
    def kv_pools(self) -> tuple[KvPool, ...]:
        """The KV pool of each group of layers."""
        return kv_pools(self.spec, self.limits)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pools."""
        return sum(pool.nbytes for pool in self.kv_pools)

    @property
    def past_bytes(self) -> int:
        """Bytes that each thread needs beside: a part of the overhead."""
        return past_bytes(self.spec.head_dim, self.limits.kv_dtype)

    def memory(self, overhead: int) -> MemoryPlan:
        """The plan, given the bytes that the process takes before weights."""
        layout = self.layout
        return MemoryPlan(layout.weight_bytes, self.kv_bytes, layout.arena_bytes, overhead)


def kv_pools(spec: ModelSpec, limits: Limits) -> tuple[KvPool, ...]:
    """The KV pool of each group of a model's layers."""
    layer = kv_block_bytes(1, spec.num_kv_heads, spec.head_dim, limits.kv_dtype)
    return tuple(
        KvPool(group, layer * len(group.layers), limits.blocks(group)) for group in kv_groups(spec)
    )


def choose_context(spec: ModelSpec, context: int | None, budget: Budget | None = None) -> int:
    """The context to run with: the user's, the one of the budget, or the default.

    Raises
    ------
    RequestError
        If it is out of the model's range.
    """
    longest = spec.context_length
    if context is None:
        return min(budget.context if budget else DEFAULT_CONTEXT, longest)
    if not 2 <= context <= longest:
        raise RequestError(f"the context must be in [2, {longest}] for this model, not {context}")
    return context


def stored_dtypes(tensors: Mapping[str, tuple[str, int]]) -> Callable[[str], str]:
    """Runtime format by name, from the stored (dtype, row length) of each tensor.

    The queries, keys and values of a layer lie in one matrix and so meet the same activations:
    where one of them is quantized in groups, a float one runs as ``q8_0``. So do the gates and
    the inputs of experts. A router runs as it is stored: it is small.
    """

    def dtype_of(name: str) -> str:
        runs = runtime_dtype(*tensors[name])
        at, _, rest = name.rpartition(".")[0].rpartition(".")
        together = _TOGETHER.get(at.rpartition(".")[2], ())
        if runs not in GROUPED and f"{rest}.weight" in together:
            siblings = (f"{at}.{other}" for other in together)
            if any(runtime_dtype(*tensors[s]) in GROUPED for s in siblings if s in tensors):
                return "q8_0"
        return runs

    return dtype_of


def compile_program(
    spec: ModelSpec,
    dtype_of: Callable[[str], str],
    limits: Limits,
    passes: tuple[Pass, ...] | None = None,
) -> Program:
    """Build the decoder of a spec, run the passes and lay it out.

    Pure: nothing is read or allocated, so that a plan can be made from a header alone.

    Parameters
    ----------
    spec : ModelSpec
    dtype_of : callable
        Runtime format of each matrix by canonical name.
    limits : Limits
    passes : tuple of Pass, optional
        A device adapter's; those of the CPU unless given.

    Raises
    ------
    CheckpointError
        If the model has sizes that the kernels cannot take.
    RequestError, BudgetError
        If the memory for experts is no use to the model, or too little.
    """
    widths = (spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
    if spec.vocab_size < 2:
        raise CheckpointError(f"a vocabulary of {spec.vocab_size} cannot run")
    heads = spec.num_kv_heads > 0 and spec.num_heads % spec.num_kv_heads == 0
    heads = heads and spec.head_dim % 16 == 0 and 0 < spec.head_dim <= 256
    if any(width % GROUP for width in widths) or not heads:
        raise CheckpointError(
            f"the model's sizes (hidden {widths[0]}, MLP {widths[1]}, {spec.num_heads} heads over "
            f"{spec.num_kv_heads} of {spec.head_dim}) cannot run: widths must be multiples of "
            f"{GROUP}, heads of 16 up to 256, and as many or a multiple of those of keys"
        )
    _check_experts(spec)
    graph = build_decoder(spec, dtype_of)
    graph = run_passes(graph, cpu_passes(limits.activations) if passes is None else passes)
    layout = plan_layout(graph, limits.max_tokens, limits.max_rows, limits.expert_memory)
    return Program(spec, limits, graph, layout)


def _check_experts(spec: ModelSpec) -> None:
    moe = spec.moe
    if moe is None:
        return
    if moe.intermediate_size % GROUP or moe.intermediate_size < 1 or moe.shared_size % GROUP:
        raise CheckpointError(
            f"the model's experts (of {moe.intermediate_size}, shared {moe.shared_size}) cannot "
            f"run: their widths must be multiples of {GROUP}"
        )
    choices = min(moe.experts, _MOST_CHOICES)
    if not 1 <= moe.top_k <= choices or not 2 <= moe.experts <= _MOST_EXPERTS:
        raise CheckpointError(
            f"a choice of {moe.top_k} of {moe.experts} experts cannot run: it must be one of at "
            f"most {_MOST_CHOICES}, of 2 to {_MOST_EXPERTS}"
        )
    if not 1 <= moe.least <= moe.top_k:
        raise CheckpointError(f"at least {moe.least} of {moe.top_k} experts cannot be chosen")
