"""``pronk inspect``: what a model is and what it needs, from its header alone."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from pronk.commands import common
from pronk.units import format_bytes, parse_size

if TYPE_CHECKING:
    from pronk.graph.kv import KvPool
    from pronk.graph.program import Program

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    common.add_model(parser)
    parser.add_argument("--context", type=int, metavar="N", help="plan memory for so many tokens")
    common.add_kv(parser)
    common.add_attention(parser)
    common.add_expert_memory(parser)
    parser.add_argument("--graph", action="store_true", help="print the graph that would run")
    parser.add_argument("--tensors", action="store_true", help="print every tensor")
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.open import open_checkpoint
    from pronk.checkpoint.sources import resolve
    from pronk.commands.choice import choose
    from pronk.device.footprint import measure
    from pronk.graph.attention import adapted
    from pronk.graph.program import Limits, choose_context
    from pronk.model import choose_threads, compile_checkpoint

    path = resolve(args.model)
    attention = choose(path, args)
    with open_checkpoint(path) as checkpoint:
        spec = adapted(checkpoint.spec, attention, args.rope_scaling)
        context = choose_context(spec, args.context, checkpoint.budget)
        room = parse_size(args.expert_memory) if args.expert_memory else None
        limits = Limits(context, kv_dtype=args.kv, expert_memory=room)
        program = compile_checkpoint(checkpoint, limits, spec)
        tensors = list(checkpoint.tensors.values())
        kind = checkpoint.format
    # Threads are not known here: as many as there are cores.
    memory = program.memory(measure(path) + choose_threads(None) * program.past_bytes)
    stored = sum(t.nbytes for t in tensors)
    parameters = sum(t.rows * t.cols for t in tensors)
    runtime = Counter(w.dtype for w in program.graph.weights.values())
    if args.json:
        data = {
            "path": str(path),
            "format": kind,
            "spec": asdict(spec),
            "parameters": parameters,
            "stored_bytes": stored,
            "context": context,
            "memory": memory.to_dict(),
            "kv": [
                {
                    **asdict(pool.group),
                    "layers": list(pool.group.layers),
                    "blocks": pool.blocks,
                    "block_bytes": pool.block_bytes,
                    "bytes": pool.nbytes,
                }
                for pool in program.kv_pools
            ],
            "experts": _experts(program),
            "runtime_formats": dict(runtime),
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
                for t in tensors
            ],
        }
        if args.graph:
            data["graph"] = program.graph.format().splitlines()
        common.print_json(data)
        return
    formats = ", ".join(f"{n} {d}" for d, n in Counter(t.dtype for t in tensors).most_common())
    print(f"{spec.name or path.name}: {spec.family}, {parameters / 1e6:.1f} M parameters, {kind}")
    print(
        f"  {spec.num_layers} layers, hidden {spec.hidden_size}, MLP {spec.intermediate_size}, "
        f"{spec.num_heads} heads ({spec.num_kv_heads} KV) of {spec.head_dim}, vocabulary "
        f"{spec.vocab_size}{', tied' if spec.tie_embeddings else ''}"
    )
    print(
        f"  rope {spec.ropes[0].kind}, theta {spec.ropes[0].theta:g}, context {spec.context_length}"
    )
    print(f"  {len(tensors)} tensors ({formats}), {format_bytes(stored)} stored")
    print(f"memory at a context of {context}:")
    for part, size in memory.to_dict().items():
        print(f"  {part:<9} {format_bytes(size):>10}")
        if part == "weights" and program.layout.experts:
            print(f"  {'':<9} {_held(program)}")
        if part == "kv":
            for pool in program.kv_pools:
                print(f"  {'':<9} {format_bytes(pool.nbytes):>10}  {_kind(pool)}")
    if args.tensors:
        for t in tensors:
            print(f"  {t.name:<48} {t.dtype:<6} {list(t.shape)!s:<16} {format_bytes(t.nbytes)}")
    if args.graph:
        print(program.graph.format())


def _experts(program: Program) -> dict[str, int] | None:
    """Experts in memory, out of how many, and the bytes of both; None where there are none."""
    layout = program.layout
    if not layout.experts:
        return None
    count = held = sum(one.experts for one in layout.experts)
    memory = layout.expert_bytes
    if layout.slots is not None:
        held, memory = layout.slots.count, layout.slots.count * layout.slots.nbytes
    return {"experts": count, "in_memory": held, "bytes": layout.expert_bytes, "memory": memory,
            "least": layout.least}  # fmt: skip


def _held(program: Program) -> str:
    """`_experts` for people."""
    found = _experts(program) or {}
    return (
        f"{format_bytes(found['memory']):>10}  {found['in_memory']} of {found['experts']} experts "
        f"({format_bytes(found['bytes'])}; --expert-memory from {format_bytes(found['least'])} on)"
    )


def _kind(pool: KvPool) -> str:
    """What the layers of a pool see, for people."""
    group, count = pool.group, len(pool.group.layers)
    layers = f"{count} layer{'s' if count > 1 else ''}"
    if group.attention == "global":
        return f"{layers}, all positions"
    seen = "the last" if group.attention == "window" else "chunks of"
    sinks = f" and the first {group.sinks}" if group.sinks else ""
    return f"{layers}, {seen} {group.window} positions{sinks}"
