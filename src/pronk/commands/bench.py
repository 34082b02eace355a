"""``pronk bench``: speed, memory, and how near both come to the machine's limits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pronk.commands import common
from pronk.device.memory import peak_memory
from pronk.errors import RequestError
from pronk.units import format_bytes

if TYPE_CHECKING:
    from pronk.graph.ir import Weight
    from pronk.model import Model

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    common.add_model(parser)
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens to generate")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="medians over so many")
    parser.add_argument("--experts", action="store_true", help="show the load of each expert")
    parser.add_argument("--profile", action="store_true", help="show where the time goes, op by op")
    common.add_plot(parser, "with --profile: draw its shares")
    common.add_context(parser)
    parser.add_argument(
        "--depth", action=argparse.BooleanOptionalAction, default=True,
        help="with --context: also fill it, and measure there (default: on)",
    )  # fmt: skip
    common.add_runtime(parser)
    common.add_experts(parser)
    common.add_speculation(parser, default=False)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.evaluate.corpus import default_corpus, encode

    if args.prompt_tokens < 1:
        raise RequestError(f"--prompt-tokens must be at least 1, not {args.prompt_tokens}")
    if args.plot is not None:
        from pronk.evaluate.profile_view import check_plot

        if not args.profile:
            raise RequestError("--plot draws a profile: give --profile too")
        check_plot(args.plot)
    model, load_time = common.open_model(args.model, args, args.context)
    if args.experts and model.spec.moe is None:
        raise RequestError("--experts shows the load of experts: this model has none")
    room = model.context - args.tokens
    if room < 1:
        raise RequestError(
            f"{args.tokens} tokens do not fit the context of {model.context}: give --tokens less"
        )
    prompt = encode(default_corpus(), model.tokenizer, min(args.prompt_tokens, room))
    if args.profile:
        _profile(args, model, prompt)
    else:
        _measure(args, model, prompt, load_time)


def _measure(args: argparse.Namespace, model: Model, prompt: list[int], load_time: float) -> None:
    from pronk.device.limits import measure_limits
    from pronk.evaluate.experts import expert_load, expert_traffic, format_load
    from pronk.evaluate.latency import latency, turned
    from pronk.evaluate.sparsity import format_sparse

    figures = latency(model, prompt, args.tokens, args.runs)
    peak = peak_memory()  # before the limits are measured: those need memory of their own
    memory, threads, spec = model.memory, model.threads, model.spec
    parameters = _prompt_parameters(model)
    streamed = _bytes_per_token(model)
    path = str(model.path)
    traffic = None
    if args.experts:  # on a prompt of its own, as those before
        own = turned(prompt, args.runs + 1)
        traffic = expert_traffic(model, own, args.tokens)
    load = expert_load(model.expert_counts(), model.experts_per_token())
    drafted, accepted = model.speculation.drafted, model.speculation.accepted
    sparse = None
    if args.sparse_mlp is not None:
        from pronk.commands.sparse import measure as measure_sparse

        sparse = measure_sparse(args, path, model, prompt)
    model.close()
    limits = measure_limits(threads)
    operations = figures.prefill * 2 * parameters
    fractions = {isa: operations / top for isa, top in limits.int8_peaks.items()}
    result: dict[str, Any] = {
        "model": path,
        "isa": limits.isa,
        "threads": limits.threads,
        "load_time": load_time,
        **figures.to_dict(),
        "drafted": drafted,
        "accepted": accepted,
        "peak_memory": peak,
        "memory": memory.to_dict(),
        "bytes_per_token": streamed,
        "bandwidth": limits.bandwidth,
        "int8_peaks": limits.int8_peaks,
        "fraction_of_bandwidth": figures.decode * streamed / limits.bandwidth,
        "fraction_of_int8_peaks": fractions,
    }
    if args.context is not None and args.depth:
        from pronk.commands.depth import measure

        result["depth"] = measure(args, path)
    if sparse is not None:
        result["sparse"] = sparse
    if traffic is not None:
        result["experts"] = load.to_dict() | {"traffic": traffic.to_dict()}
    if args.json:
        common.print_json(result)
        return
    print(f"{spec.name or path}: {limits.threads} threads, {limits.isa}")
    print(f"  load         {load_time:8.2f} s")
    print(f"  first token  {figures.ttft * 1000:8.1f} ms after {figures.prompt_tokens} tokens")
    print(
        f"  prefill      {figures.prefill:8.1f} tokens/s, int8: "
        + ", ".join(
            f"{fraction:.0%} of {limits.int8_peaks[isa] / 1e12:.2f} Tera-op/s ({isa})"
            for isa, fraction in fractions.items()
        )
    )
    print(
        f"  decode       {figures.decode:8.1f} tokens/s, "
        f"{result['fraction_of_bandwidth']:.0%} of {limits.bandwidth / 1e9:.1f} GB/s"
    )
    if drafted:
        print(f"  drafts       {accepted / drafted:8.0%} of {drafted} tokens held, over all runs")
    print(f"  peak memory  {format_bytes(peak):>8}")
    if "depth" in result:
        from pronk.evaluate.depth import format_depth

        print(*format_depth(result["depth"]), sep="\n")
    if sparse is not None:
        print(*format_sparse(sparse), sep="\n")
    if traffic is not None:
        print(*format_load(load), traffic.format(), sep="\n")


def _profile(args: argparse.Namespace, model: Model, prompt: list[int]) -> None:
    from pronk.commands.progress import Progress
    from pronk.device.limits import measure_limits
    from pronk.evaluate.profile import profile
    from pronk.evaluate.profile_view import format_phase, plot

    name, path, threads = model.spec.name, str(model.path), model.threads
    with Progress("measuring") as progress:
        before = measure_limits(threads, progress=progress)
        phases = profile(model, prompt, args.tokens, args.runs, progress=progress)
        model.close()
        limits = measure_limits(threads, progress=progress).or_better(before)
    result: dict[str, Any] = {
        "model": path,
        "isa": limits.isa,
        "threads": threads,
        "bandwidth": limits.bandwidth,
        "int8_peaks": limits.int8_peaks,
        **{p.name: p.to_dict(limits.bandwidth, limits.int8_peak) for p in phases},
    }
    title = f"{name or path}: {threads} threads, {limits.isa}"
    if args.plot is not None:
        plot(args.plot, title, {phase.name: result[phase.name] for phase in phases})
    if args.json:
        common.print_json(result)
        return
    print(
        f"{title}; {limits.bandwidth / 1e9:.1f} GB/s, "
        f"{limits.int8_peak / 1e12:.2f} Tera-op/s int8 ({limits.isa})"
    )
    for phase, limit in zip(phases, ("peak", "bandwidth"), strict=True):
        print()
        print(*format_phase(phase.name, result[phase.name], limit), sep="\n")


def _matrices(model: Model) -> list[tuple[Weight, bool, float]]:
    """Matrices that a token is multiplied with, whether every prompt token is, and which share.

    The head is applied to the last token of a prompt only; an embedding of its own is looked up;
    of experts, a token meets those it chooses.
    """
    graph = model.program.graph
    return [
        (graph.weights[name], graph.values[op.output].rows != "R",
         op.integer("top_k") / op.integer("experts") if op.kind == "expert_matmul" else 1.0)
        for op in graph.ops
        if op.kind in ("matmul", "expert_matmul")
        for name in op.weights
        if graph.weights[name].rows > 1
    ]  # fmt: skip


def _prompt_parameters(model: Model) -> int:
    return round(sum(w.rows * w.cols * part for w, prompt, part in _matrices(model) if prompt))


def _bytes_per_token(model: Model) -> int:
    """Bytes of weights that a decode step reads; the cache is left out, being short here."""
    from pronk.graph.memory import weight_bytes

    return round(sum(weight_bytes(w) * part for w, _, part in _matrices(model)))
