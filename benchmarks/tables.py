"""From the JSON of a run to medians and Markdown tables: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import quality_tables as quality
from markdown_table import against, markdown

SLOW = 0.8
"""A round does not count when a probe beside it fell below this share of the best one."""

NAMES = {
    "pronk": "Pronk",
    "pronk_int8": "Pronk, int8 activations",
    "llama_cpp": "llama.cpp",
    "llama_cpp_q4_0": "llama.cpp, Q4_0",
    "openvino": "OpenVINO",
}
_HEADROOM = 70_000_000  # bytes over weights and KV that a process may take

Result = dict[str, Any]


def share(probes: Sequence[dict[str, float]], best: dict[str, float]) -> float:
    """The smallest share of the best that any figure of some probes reaches."""
    return min(found[name] / value for found in probes for name, value in best.items())


def good_rounds(task: Result, best: dict[str, float]) -> list[Result]:
    """The rounds of a task outside slow spells; all of them if there are no others."""
    rounds: list[Result] = task["rounds"]
    return [r for r in rounds if share(r["probes"], best) >= SLOW] or rounds


def summary(task: Result, limits: dict[str, float], mine: str = "pronk") -> Result:
    """Medians, spreads, ratios of ours to each peer, and fractions of the limits.

    The spread is half the distance of the extremes, relative to the median.
    """
    rounds = [r["values"] for r in good_rounds(task, limits)]
    medians, spreads, ratios = {}, {}, {}
    for name in rounds[0]:
        values = [r[name] for r in rounds]
        medians[name] = statistics.median(values)
        spreads[name] = (max(values) - min(values)) / 2 / medians[name]
        if not name.startswith("pronk"):
            ratios[name] = statistics.median(r[mine] / r[name] for r in rounds)
    kinds = [k for k in limits if k.startswith(task["limit"])]
    fractions = {k: medians[mine] * task["cost"] / limits[k] for k in kinds}
    return {"medians": medians, "spreads": spreads, "ratios": ratios, "fractions": fractions,
            "rounds": len(rounds), "repeated": len(task["rounds"]) - len(rounds)}  # fmt: skip


def peers(result: Result) -> str:
    """The tables of a `peers.py` result."""
    used = [n for n in NAMES if any(n in r["values"] for t in result["tasks"].values()
                                    for r in t["rounds"])]  # fmt: skip
    others = [n for n in used if not n.startswith("pronk")]
    parts = []
    for model in dict.fromkeys(t["model"] for t in result["tasks"].values()):
        tasks = [t for t in result["tasks"].values() if t["model"] == model]
        here = [n for n in others if any(n in r["values"] for t in tasks for r in t["rounds"])]
        head = ["tokens/s", "Pronk", *(NAMES[n] for n in here), *(f"÷ {NAMES[n]}" for n in here),
                "of the limit", "spread"]  # fmt: skip
        rows = [
            _row(task, summary(task, result["limits"], mine), mine, here)
            for task in tasks
            for mine in ("pronk", "pronk_int8")
            if mine in task["rounds"][0]["values"]
        ]
        if model == result["starts"]["model"]:
            rows += _starts(result["starts"], here)
        parts.append(f"{model}\n\n{markdown(head, rows)}")
    return "\n\n".join([*parts, *_notes(result)])


def _row(task: Result, found: Result, mine: str, others: Sequence[str]) -> list[str]:
    goals = task["goals"]
    medians, ratios = found["medians"], found["ratios"]
    fractions = [
        against(value, goals.get("limit") if kind == task["limit"] else None, "{:.0%}")
        + (" (tiles)" if kind.endswith("tiles") else "")
        for kind, value in found["fractions"].items()
    ]
    return [
        task["title"] + ("" if mine == "pronk" else ", int8"),
        f"{medians[mine]:,.0f}",
        *(f"{medians[n]:,.0f}" if n in medians else "-" for n in others),
        *(against(ratios[n], goals.get(n), "{:.2f}") if n in ratios else "-" for n in others),
        ", ".join(fractions),
        f"±{max(found['spreads'].values()):.0%}",
    ]


def start_figures(starts: Result) -> Result:
    """Medians of the load times and peak memories, by engine."""
    found: Result = {}
    for name in starts["rounds"][0]:
        rows = [r[name] for r in starts["rounds"] if name in r]
        peaks = [r["peak_memory"] for r in rows if "peak_memory" in r]
        found[name] = {
            "load_time": statistics.median(r["load_time"] for r in rows),
            "import_time": statistics.median(r["import_time"] for r in rows),
            "peak_memory": peaks[0] if peaks else None,
        }
        plan = next((r["planned"] for r in rows if r.get("planned")), None)
        if plan:
            found[name]["allowed"] = plan["weights"] + plan["kv"] + _HEADROOM
    return found


def _starts(starts: Result, others: Sequence[str]) -> list[list[str]]:
    figures = start_figures(starts)
    rows = []
    for title, key, form, unit in (
        ("load to the first step, s", "load_time", "{:.2f}", 1.0),
        ("peak memory, MB", "peak_memory", "{:.0f}", 1e6),
    ):
        values = {n: f[key] / unit for n, f in figures.items() if f[key]}
        mine = values["pronk"]
        limit = "-"
        if key == "peak_memory":
            allowed = figures["pronk"]["allowed"] / unit
            limit = f"{'≤' if mine <= allowed else '>'} {allowed:.0f} planned"
        rows.append([
            title,
            form.format(mine),
            *(form.format(values[n]) if n in values else "-" for n in others),
            # Less is better: the ratio is turned round, so that above 1 is Pronk's.
            *(f"{values[n] / mine:.2f}" if n in values else "-" for n in others),
            limit,
            "",
        ])  # fmt: skip
    return rows


def _limits(limits: dict[str, float]) -> str:
    text = f"Limits: {limits['bandwidth'] / 1e9:.1f} GB/s, int8 in vectors "
    text += f"{limits['int8'] / 1e12:.2f} Tera-op/s"
    if "int8_tiles" in limits:
        text += f", in tiles {limits['int8_tiles'] / 1e12:.2f}"
    return text + "."


def _notes(result: Result) -> list[str]:
    limits = result["limits"]
    notes = [_limits(limits)]
    repeated = sum(summary(t, limits)["repeated"] for t in result["tasks"].values())
    if repeated:
        notes.append(f"{repeated} rounds fell into slow spells and do not count.")
    for name, what in result["failures"].items():
        notes.append(f"{NAMES[name]}: " + "; ".join(f"{k}: {v}" for k, v in what.items()) + ".")
    return notes


def kernels(result: Result) -> str:
    """The tables of a `kernels.py` result: a row a kernel, a column a token count."""
    limits, peak = result["limits"], result["limits"][result["peak"]]
    parts = []
    for model in dict.fromkeys(r["model"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["model"] == model]
        counts = sorted({r["tokens"] for r in rows})
        cells: dict[tuple[str, str], dict[int, str]] = {}
        for r in rows:
            cells.setdefault((r["what"], r["format"]), {})[r["tokens"]] = _rate(r, limits, peak)
        head = [model, "format", *(f"{n} token{'s' * (n > 1)}" for n in counts)]
        body = [[*key, *(row.get(n, "") for n in counts)] for key, row in cells.items()]
        parts.append(markdown(head, body))
    return "\n\n".join([*parts, _limits(limits)])


def machine(about: Result) -> str:
    """A paragraph on the machine of a run."""
    return (
        f"{about['cpu']} ({about['architecture']}; {', '.join(about['flags'])}), "
        f"{about['cores']} cores, {about['threads']} threads, {about['memory'] / 2**30:.0f} GiB, "
        f"{about['kernel']}, Python {about['python']}, kernels for {', '.join(about['isas'])}, "
        f"{about['date']}"
    )


def _rate(row: Result, limits: dict[str, float], peak: float) -> str:
    """Bytes a second where memory is the limit, else operations; and the fraction of it."""
    if not row["seconds"]:
        return "too short"
    speed, ops = row["bytes"] / row["seconds"], row["ops"] / row["seconds"]
    of_memory, of_peak = speed / limits["bandwidth"], ops / peak
    if row["tokens"] > 1 and row["kernel"] == "attention":  # in floats: int8 is not its limit
        return f"{ops / 1e9:,.0f} Gop/s"
    if of_peak > of_memory:
        return f"{ops / 1e9:,.0f} Gop/s, {of_peak:.0%}"
    return f"{speed / 1e9:,.1f} GB/s" + (f", {of_memory:.0%}" if ops else "")


def scaling(result: Result) -> str:
    """The tables of a `scaling.py` result: one for each axis, in tokens a second."""
    parts = []
    titles = {"isa": "kernels, threads", "threads": "threads", "context": "tokens before",
              "batch": "sequences together"}  # fmt: skip
    for axis, title in titles.items():
        rows = [r for r in result["rows"] if r["against"] == axis]
        kinds = list(dict.fromkeys(r["kind"] for r in rows))
        lines: dict[str, dict[str, str]] = {}
        for r in rows:
            x = f"{r['x']}, {r['threads']}" if axis == "isa" else f"{r['x']:,}"
            lines.setdefault(x, {})[r["kind"]] = f"{r['value']:,.0f} ±{r['spread']:.0%}"
        prompt = f"prefill of {result['prompt']}"
        head = [title, *(prompt if k == "prefill" else k for k in kinds)]
        parts.append(
            markdown(head, [[x, *(v.get(k, "") for k in kinds)] for x, v in lines.items()])
        )
    return "\n\n".join([*parts, _limits(result["limits"])])


def fitting(result: Result) -> str:
    """The table of a `fitting.py` result."""
    head = ["budget, MB", "head", "attention", "gate, up", "down", "planned, MB", "measured, MB",
            "perplexity", "prefill", "decode"]  # fmt: skip
    rows = []
    refused = [f"{r['memory']}: {r['refused']}" for r in result["rows"] if "refused" in r]
    for r in result["rows"]:
        if "refused" in r:
            continue
        formats = [r["formats"][kind] for kind in ("head", "attention", "gate_up", "down")]
        sizes = [f"{r[key] / 1e6:.1f}" for key in ("planned", "peak")]
        rows.append([f"{r['budget'] / 1e6:.0f}", *formats, *sizes, f"{r['perplexity']:.2f}",
                     f"{r['prefill']:,.0f}", f"{r['decode']:,.0f}"])  # fmt: skip
    return "\n\n".join([markdown(head, rows), *refused])


def speculation(result: Result) -> str:
    """The table of a `speculation.py` result."""
    head = [result["model"], "prompt", "tokens", "without", "with", "ratio", "accepted"]
    rows = [
        [name, f"{r['prompt_tokens']}", f"{r['tokens']}", f"{r['without']:.1f}", f"{r['with']:.1f}",
         f"{r['ratio']:.2f}", f"{r['accepted']} of {r['drafted']}"]
        for name, r in result["tasks"].items()
    ]  # fmt: skip
    return markdown(head, rows)


def batching(result: Result) -> str:
    """The table of a `batching.py` result."""
    what = {
        "prefix": "first token of 2,000 + 24 tokens: new, and with the 2,000 known",
        "short": "first token: of 8,000 tokens, and of 24 that came behind them",
        "tpot": "between tokens (p90), 8 requests beside long prompts: as it comes, with a target",
    }
    rows = [
        [what[name], f"{1000 * r['before']:.1f} ms", f"{1000 * r['after']:.1f} ms",
         f"{r['ratio']:.1f}"]
        for name, r in result["tasks"].items()
    ]  # fmt: skip
    return markdown([result["model"], "first", "second", "ratio"], rows)


def moe(result: Result) -> str:
    """The table of a `moe.py` result."""
    head = [f"random weights, {result['format']}", "parameters, M", "weights, MB",
            "read a token, MB", "decode"]  # fmt: skip
    rows = []
    for name, model in result["models"].items():
        values = [r["values"][name] for r in good_rounds(result, result["limits"])]
        sizes = [f"{model[key] / 1e6:,.0f}" for key in ("parameters", "weights", "read")]
        rows.append([name, *sizes, f"{statistics.median(values):.1f}"])
    text = f"The mixture decodes at {result['ratio']:.0%} of the dense model's speed."
    return "\n\n".join([markdown(head, rows), text, _limits(result["limits"])])


def serve(result: Result) -> str:
    """The tables of a `serve.py` result."""
    closed = _loads(result["runs"], "clients", str)
    lost = ", ".join(f"{share:.0%} at {count}" for count, share in result["overhead"].items())
    parts = [
        closed,
        f"HTTP, JSON and text cost (clients): {lost}; the goal is under 10%.",
        *_beside_peer(result["runs"]),
    ]
    if result.get("open"):
        parts.append("Requests that come by themselves, at a share of what a side carried:")
        parts.append(_loads(result["open"], "load", lambda share: f"{share:.0%}"))
    if result.get("grpc"):
        rate, ttft = (
            ", ".join(f"{ratio:.2f} at {count}" for count, ratio in result["grpc"][key].items())
            for key in ("rate", "ttft")
        )
        parts.append(
            f"gRPC over HTTP (clients), tokens a second: {rate}; median time to the first token: "
            f"{ttft}."
        )
        rows = [[side, *(f"{1000 * trip[p]:.1f}" for p in ("p50", "p90", "p99"))]
                for side, trip in result["round_trip"].items()]  # fmt: skip
        parts.append(markdown(["a round trip, ms", "p50", "p90", "p99"], rows))
    if result.get("prefix"):
        found = result["prefix"]
        cold, warm = (1000 * statistics.median(found[key]) for key in ("cold", "warm"))
        parts.append(
            f"The first token of a prompt of {found['tokens']:,} tokens comes after {cold:,.0f} "
            f"ms, and of another with the same beginning after {warm:,.0f} ms: "
            f"{against(found['ratio'], 10, '{:.1f}')} times sooner."
        )
    return "\n\n".join(parts)


def _beside_peer(runs: Sequence[Result]) -> list[str]:
    """Pronk over the other server, where both were run; the goals are those at 16 clients."""
    by = {(run["side"], run["round"], run["clients"]): run for run in runs}
    pairs = [(run["clients"], by["pronk", turn, count], run)
             for (side, turn, count), run in by.items() if side == "llama_cpp.server"]  # fmt: skip
    if not pairs:
        return []
    lines = []
    for words, ratio in (
        ("times the tokens a second", lambda a, b: a["tokens_per_second"] / b["tokens_per_second"]),
        ("times sooner the 90th percentile of first tokens",
         lambda a, b: b["ttft"]["p90"] / a["ttft"]["p90"]),
    ):  # fmt: skip
        shown = ", ".join(
            f"{against(ratio(ours, theirs), 4 if count == 16 else None, '{:.1f}')} at {count}"
            for count, ours, theirs in pairs
        )
        lines.append(f"{words} ({shown})")
    return [f"Beside `llama_cpp.server` (clients): {' and '.join(lines)}."]


def _loads(runs: list[Result], key: str, shown: Callable[[Any], str]) -> str:
    """Rates and latencies of sides under loads, the median over rounds."""
    head = [key, "side", "tokens/s", "TTFT p50, p90, p99, ms", "TPOT p50, p90, p99, ms"]
    rows = []
    order = dict.fromkeys((run[key], run["side"]) for run in runs)
    for load, side in sorted(order, key=lambda pair: pair[0]):
        mine = [r for r in runs if (r[key], r["side"]) == (load, side)]
        rate = statistics.median(run["tokens_per_second"] for run in mine)
        spans = []
        for name in ("ttft", "tpot"):
            middle = [
                statistics.median(run[name][p] for run in mine) for p in mine[0].get(name, ())
            ]
            spans.append(", ".join(f"{1000 * value:,.0f}" for value in middle))
        rows.append([shown(load), side, f"{rate:.0f}", *spans])
    return markdown(head, rows)


def overload(result: Result) -> str:
    """The table of an `overload.py` result."""
    head = ["load", "`--target-ttft`", "taken", "refused", "tokens/s", "TTFT p50, p99, s",
            "e2e p50, p99, s", "refusal p50, p99, ms"]  # fmt: skip
    rows = []
    for run in result["runs"]:
        spans = [", ".join(f"{run[key][p]:.2f}" for p in ("p50", "p99")) for key in ("ttft", "e2e")]
        soon = ", ".join(f"{1000 * run['refusal'][p]:.0f}" for p in ("p50", "p99")
                         if run["refusal"])  # fmt: skip
        refused = ", ".join(f"{n:,} ({status})" for status, n in run["refused"].items())
        rows.append([
            f"{run['load']:.1f} x", f"{run['target']:.2f} s" if run["target"] else "",
            f"{run['requests']:,}", refused or "0", f"{run['tokens_per_second']:.0f}", *spans, soon,
        ])  # fmt: skip
    near, held = result["runs"][0], result["runs"][-1]
    words = ", ".join(
        f"{held[key]['p99'] / near[key]['p99']:.2f} ({name})"
        for key, name in (("ttft", "to the first token"), ("e2e", "of whole answers"))
    )
    return "\n\n".join([
        markdown(head, rows),
        f"The server carries {result['carried']:.2f} requests a second. With the target, the 99th "
        f"percentile of what is taken at {held['load']:.0f} times that, over the same near "
        f"saturation: {words}.",
    ])  # fmt: skip


def soak(result: Result) -> str:
    """The tables of a `soak.py` result."""
    outcomes = sorted({o for kinds in result["counts"].values() for o in kinds})
    rows = [
        [kind, *(f"{found.get(o, 0):,}" for o in outcomes)]
        for kind, found in result["counts"].items()
    ]
    first, last = result["samples"][0], result["samples"][-1]
    total = sum(n for found in result["counts"].values() for n in found.values())
    after = result["after"]
    words = (
        f"{total:,} requests in {result['seconds'] / 60:.0f} minutes, "
        f"{last['generated']:,.0f} tokens; the longest took {result['longest']:.1f} s of at most "
        f"{result['bound']:.0f}. Memory was {first['rss'] / 1e6:.0f} MB at first and "
        f"{last['rss'] / 1e6:.0f} MB at last; after the first {result['warm']:.0%} of the time it "
        f"changed by {result['growth'] / 1e6:+.2f} MB a minute (allowed: "
        f"{result['bound_growth'] / 1e6:.2f}). When all was over, {after['held']:.0f} KV blocks "
        f"were held, {after['cached']:.0f} kept as prefixes and {after['free']:.0f} free, and "
        f"{after['files']:.0f} files were open ({first['files']:.0f} before). "
        f"Sequences were preempted {last['preempted']:.0f} times. The audit log's "
        f"{result['audit']['lines']:,} lines in {result['audit']['files']} files hold."
    )
    return "\n\n".join([markdown(["", *outcomes], rows), words])


def experts(result: Result) -> str:
    """The tables of an `experts.py` result."""
    sizes, rounds = result["sizes"], good_rounds(result, result["limits"])
    names = list(result["memory"])

    def middle(key: str, name: str) -> float:
        return statistics.median(r[key][name] for r in rounds)

    head = [f"{sizes['experts']} experts x {sizes['layers']} layers, {sizes['chosen']} a token, "
            f"{result['format']}", "in memory, MB", "found there", "read a token, MB", "decode",
            "ratio", "with a cold file", f"prompt of {sizes['prompt']}", "ratio"]  # fmt: skip
    rows = []
    for name in names:
        ratios = [
            statistics.median(r[key][name] / r[key][names[0]] for r in rounds)
            for key in ("values", "prompts")
        ]
        rows.append([
            f"{float(name):.0%} of the experts", f"{result['memory'][name] / 1e6:.0f}",
            f"{middle('hit_rates', name):.1%}", f"{middle('read', name) / 1e6:.1f}",
            f"{middle('values', name):.1f}", f"{ratios[0]:.2f}", f"{result['cold'][name]:.1f}",
            f"{middle('prompts', name):,.0f}", f"{ratios[1]:.2f}",
        ])  # fmt: skip
    load = (
        f"An expert takes {sizes['expert'] / 1e6:.2f} MB, and a token goes to "
        f"{sizes['layers'] * sizes['chosen']} of {sizes['layers'] * sizes['experts']}. The busiest "
        f"of a layer is chosen {result['busiest']:.1f} times as often as the mean; the entropy of "
        f"the choices is {result['entropy']:.2f} of {math.log2(sizes['experts']):.0f} bits."
    )
    few = [["`--dynamic-experts`", "experts a token", "decode", "ratio", "KL", "top-1 agreement"]]
    for one in result["fewer"]:
        few.append([
            f"`{one['how']}`" if one["how"] else "all", f"{one['experts']:.2f}",
            f"{one['decode']:.1f}", f"{one['ratio']:.2f}", f"{one['kl']:.4f}",
            f"{one['top1_agreement']:.1%}",
        ])  # fmt: skip
    return "\n\n".join(
        [markdown(head, rows), load, _limits(result["limits"]), markdown(few[0], few[1:])]
    )


def show(result: Result) -> str:
    """The tables of any result."""
    makers = {
        "peers": peers,
        "kernels": kernels,
        "scaling": scaling,
        "activations": quality.activations,
        "fitting": fitting,
        "speculation": speculation,
        "moe": moe,
        "long_context": quality.long_context,
        "serve": serve,
        "soak": soak,
        "overload": overload,
        "experts": experts,
        "compression": quality.compression,
        "batching": batching,
    }
    return makers[result["benchmark"]](result)
