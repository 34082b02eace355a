"""Plots of results as SVG; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "pronk": "#c44e00",
    "llama_cpp": "#2f6db3",
    "llama_cpp_q4_0": "#8fb8e0",
    "openvino": "#7a4fa3",
}
_PALETTE = ("#c44e00", "#2f6db3", "#3f8f4f", "#7a4fa3", "#b08900", "#5b6770", "#c2185b", "#008b8b")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pronk",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
}

Result = dict[str, Any]


def draw(result: Result, path: Path) -> None:
    """Draw a result; the same result gives the same file."""
    makers: dict[str, Callable[[Result], Figure]] = {
        "peers": peers,
        "kernels": kernels,
        "scaling": scaling,
        "long_context": long_context,
        "compression": compression,
        "pruning": pruning,
        "soak": soak,
    }
    with mpl.rc_context(_STYLE):
        figure = makers[result["benchmark"]](result)
        part = path.with_suffix(".part")
        figure.savefig(part, format="svg", metadata={"Date": None})
    lines = part.read_text().splitlines()
    part.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    part.replace(path)


def peers(result: Result) -> Figure:
    """Pronk's rate over each peer's, a bar each, with the goals as marks."""
    tasks = list(result["tasks"].values())
    found = [tables.summary(task, result["limits"]) for task in tasks]
    others = [n for n in tables.NAMES if any(n in f["ratios"] for f in found)]
    figure = Figure(figsize=(7.5, 0.6 * len(tasks) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(others))
    for j, name in enumerate(others):
        for i, (task, one) in enumerate(zip(tasks, found, strict=True)):
            if name not in one["ratios"]:
                continue
            y = i + (j - (len(others) - 1) / 2) * height
            axes.barh(y, one["ratios"][name], height * 0.9, color=COLORS[name])
            goal = task["goals"].get(name)
            if goal:
                axes.plot([goal, goal], [y - height / 2, y + height / 2], color="black", lw=1.5)
        axes.barh(0, 0, color=COLORS[name], label=f"÷ {tables.NAMES[name]}")
    axes.plot([], [], color="black", lw=1.5, label="goal")
    axes.axvline(1, color="#888888", lw=0.8)
    axes.set_yticks(range(len(tasks)), [_title(task, tasks) for task in tasks])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Pronk's tokens a second over the peer's")
    axes.legend(loc="lower right")
    return figure


def _title(task: Result, tasks: list[Result]) -> str:
    first = tasks[0]["model"]
    return task["title"] if task["model"] == first else f"{task['title']}\n{task['model'][:24]}"


def kernels(result: Result) -> Figure:
    """The roofline: operations a second over operations a byte, a mark a measurement."""
    limits, peak = result["limits"], result["limits"][result["peak"]]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [r for r in result["rows"] if r["ops"] and r["seconds"]]
    names = list(dict.fromkeys((r["kernel"], r["model"]) for r in rows))
    for color, (kernel, model) in zip(_PALETTE, names, strict=False):
        mine = [r for r in rows if (r["kernel"], r["model"]) == (kernel, model)]
        axes.scatter(
            [r["ops"] / r["bytes"] for r in mine], [r["ops"] / r["seconds"] / 1e9 for r in mine],
            s=14, color=color, marker="o" if kernel == "matmul" else "^",
            label=f"{kernel}, {model}",
        )  # fmt: skip
    low = min(r["ops"] / r["bytes"] for r in rows) / 1.5
    high = max(max(r["ops"] / r["bytes"] for r in rows) * 1.5, peak / limits["bandwidth"] * 2)
    knee = peak / limits["bandwidth"]
    axes.plot([low, knee, high], [low * limits["bandwidth"] / 1e9, peak / 1e9, peak / 1e9],
              color="black", lw=1, label="limit")  # fmt: skip
    if result["peak"] == "int8_tiles":
        vectors = limits["int8"]
        start = vectors / limits["bandwidth"]
        axes.plot([start, high], [vectors / 1e9] * 2, color="black", lw=1, ls=":",
                  label="limit of vectors")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of weights (or cache)")
    axes.set_ylabel("Giga-operations a second")
    axes.legend(fontsize=8)
    return figure


def scaling(result: Result) -> Figure:
    """Rates against context, batch and instruction set."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    grid = figure.subplots(2, 2)
    rows = result["rows"]

    def line(axes: Axes, against: str, kind: str, label: str, factor: float = 1) -> None:
        mine = [r for r in rows if (r["against"], r["kind"]) == (against, kind)]
        axes.plot([r["x"] for r in mine], [r["value"] * factor for r in mine], marker="o", ms=4,
                  color=_PALETTE[kind == "prefill"], label=label)  # fmt: skip
        axes.set_ylim(bottom=0)

    line(grid[0][0], "context", "decode", "decode")
    grid[0][0].set_xlabel("tokens before")
    grid[0][0].set_ylabel("decode, tokens/s")
    line(grid[0][1], "context", "prefill", "prefill")
    grid[0][1].set_xlabel("tokens before")
    grid[0][1].set_ylabel(f"prefill of {result['prompt']}, tokens/s")
    line(grid[1][0], "batch", "decode", "decode")
    grid[1][0].set_xlabel("sequences decoding together")
    grid[1][0].set_ylabel("tokens/s, all together")
    for i, kind in enumerate(("decode", "prefill")):
        mine = [r for r in rows if (r["against"], r["kind"]) == ("isa", kind)]
        best = max((r["value"] for r in mine), default=1)
        labels = [f"{r['x']}, {r['threads']} thr." for r in mine]
        places = [y + 0.4 * i for y in range(len(mine))]
        grid[1][1].barh(places, [r["value"] / best for r in mine], 0.38, color=_PALETTE[i],
                        label=kind)  # fmt: skip
        grid[1][1].set_yticks([y + 0.2 for y in range(len(mine))], labels)
    grid[1][1].invert_yaxis()
    grid[1][1].grid(axis="y", visible=False)
    grid[1][1].set_xlabel("rate, of the best")
    grid[1][1].legend(loc="lower right", frameon=True)
    return figure


def long_context(result: Result) -> Figure:
    """Perplexity by position, hidden numbers found by length, memory and speed of policies."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(2, 2)
    _curves(grid[0][0], result["variants"])
    axes = grid[0][1]
    for color, one in zip(_PALETTE, result["variants"], strict=False):
        lengths = sorted({cell["length"] for cell in one["needles"]})
        for key, style in (("recall", "-"), ("choice", ":")):
            by_length = [[c[key] for c in one["needles"] if c["length"] == n] for n in lengths]
            axes.plot(lengths, [sum(v) / len(v) for v in by_length], style, color=color,
                      marker="o", ms=4)  # fmt: skip
    axes.plot([], [], "-", color="black", label="said")
    axes.plot([], [], ":", color="black", label="more likely than 7 others")
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("tokens")
    axes.set_ylabel("hidden numbers found")
    axes.legend(fontsize=8)
    axes = grid[1][0]
    bars = [("full attention", 1.0, 1.0)]
    bars += [(d["attention"], d["ratios"]["kv"], d["ratios"]["decode"]) for d in result["depths"]]
    for i, (label, place) in enumerate((("KV memory", -0.2), ("decode rate", 0.2))):
        axes.barh([y + place for y in range(len(bars))], [bar[1 + i] for bar in bars], 0.38,
                  color=_PALETTE[1 - i], label=label)  # fmt: skip
    axes.set_yticks(range(len(bars)), [bar[0].replace(",", ",\n") for bar in bars])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"of full attention, at {result['context']:,} tokens")
    axes.legend(fontsize=8, frameon=True)
    if result["scaling"]:
        _curves(grid[1][1], result["scaling"]["variants"])
    else:
        grid[1][1].set_axis_off()
    return figure


def compression(result: Result) -> Figure:
    """Perplexity and divergence against size, by who made a variant."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    # The reference is four times as large as the next: its place is the line at zero.
    rows = [row for row in result["rows"] if row["by"] != "reference"]
    makers = list(dict.fromkeys(row["by"] for row in rows))
    for axes, key, factor in ((left, "growth", 100), (right, "kl", 1)):
        for color, maker in zip(_PALETTE, makers, strict=False):
            mine = [row for row in rows if row["by"] == maker]
            x = [row["bytes"] / 1e6 for row in mine]
            y, low, high = (
                [row[key][k] * factor for row in mine] for k in ("value", "low", "high")
            )
            errors = [[a - b for a, b in zip(y, low, strict=True)],
                      [a - b for a, b in zip(high, y, strict=True)]]  # fmt: skip
            axes.errorbar(x, y, errors, fmt="o", ms=5, lw=1, color=color, label=maker)
            for row, at, up in zip(mine, x, y, strict=True):
                axes.annotate(row["name"], (at, up), (5, 4), textcoords="offset points",
                              fontsize=7)  # fmt: skip
        axes.set_xlabel("weights, MB")
    left.axhline(0, color="#888888", lw=0.8)
    left.set_yscale("symlog", linthresh=1)
    left.set_ylabel("perplexity beside float32, %")
    left.legend(fontsize=8)
    right.set_yscale("log")
    right.set_ylabel("KL from float32, nats a token")
    return figure


def pruning(result: Result) -> Figure:
    """Perplexity and agreement against parameters, as pruned and as recovered."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = result["rows"]
    removed = [0, *(100 * one["removed"] for one in rows)]
    before = rows[0]["pruned"]["teacher_perplexity"]
    for color, stage, label in (
        (_PALETTE[1], "pruned", "pruned"),
        (_PALETTE[0], "recovered", f"and distilled, {result['steps']} steps"),
    ):
        left.plot(removed, [before, *(one[stage]["perplexity"] for one in rows)], marker="o",
                  ms=4, color=color, label=label)  # fmt: skip
        agreed = [100, *(100 * one[stage]["top1_agreement"] for one in rows)]
        right.plot(removed, agreed, marker="o", ms=4, color=color, label=label)
    left.set_yscale("log")
    left.set_ylabel("perplexity")
    right.set_ylabel("same favourite token as before, %")
    right.set_ylim(0, 102)
    for axes in (left, right):
        axes.set_xlabel("parameters removed, %")
        axes.legend(fontsize=8)
    return figure


def soak(result: Result) -> Figure:
    """Memory, KV blocks and requests of a server over the time of a soak."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    memory, blocks, requests = figure.subplots(3, 1, sharex=True)
    rows = result["samples"]
    minutes = [row["time"] / 60 for row in rows]
    memory.plot(minutes, [row["rss"] / 1e6 for row in rows], color=_PALETTE[0])
    warm = result["warm"] * minutes[-1]
    memory.axvline(warm, color="#888888", lw=0.8, ls=":")
    middle = sum(row["rss"] for row in rows if row["time"] / 60 >= warm) / sum(
        m >= warm for m in minutes
    )
    half = result["growth"] * (minutes[-1] - warm) / 2
    memory.plot([warm, minutes[-1]], [(middle - half) / 1e6, (middle + half) / 1e6], color="black",
                lw=1, label=f"{result['growth'] / 1e6:+.2f} MB a minute")  # fmt: skip
    memory.set_ylabel("resident, MB")
    memory.set_ylim(0)
    states = ("held", "cached", "free")
    blocks.stackplot(minutes, [[row[state] for row in rows] for state in states], labels=states,
                     colors=(_PALETTE[0], "#f0c9a8", "#eeeeee"))  # fmt: skip
    blocks.set_ylabel("KV blocks")
    for color, state in zip(_PALETTE, ("running", "waiting"), strict=False):
        requests.plot(minutes, [row[state] for row in rows], color=color, lw=1, label=state)
    requests.set_ylabel("requests")
    requests.set_xlabel("minutes")
    for axes in (memory, blocks, requests):
        axes.legend(fontsize=8, loc="upper right")
    return figure


def _curves(axes: Axes, variants: list[Result]) -> None:
    for color, one in zip(_PALETTE, variants, strict=False):
        rows = one["positions"]
        axes.plot([(r["start"] + r["stop"]) / 2 for r in rows], [r["perplexity"] for r in rows],
                  marker="o", ms=3, color=color, label=one["name"])  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("tokens before")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=8)
