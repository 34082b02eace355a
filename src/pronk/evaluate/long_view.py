"""Long contexts for people: tables of perplexity and recall, curves and heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pronk.evaluate.profile_view import check_plot, write
from pronk.units import format_bytes

__all__ = ["draw", "format_long", "plot"]


def format_long(result: Mapping[str, Any]) -> list[str]:
    """The lines of the tables, from what ``pronk eval --long --json`` prints."""
    variants = result["variants"]
    tokens = sum(row["tokens"] for row in variants[-1]["positions"])
    lines = [f"{result['text']}: {tokens} tokens, read {result['context']} at a time"]
    lines += [f"  {one['name']}: KV cache {format_bytes(one['kv'])}" for one in variants]
    lines += ["", "perplexity by position", *_positions(variants)]
    for one in variants:
        if one.get("needles"):
            lines += ["", *_needles(one)]
    return lines


def _positions(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max(10, *(len(one["name"]) for one in variants))
    ratio = len(variants) == 2
    head = f"  {'tokens before':<16}" + "".join(f" {one['name']:>{width}}" for one in variants)
    lines = [head + ("    ratio" if ratio else "")]

    def line(label: str, losses: Sequence[float]) -> str:
        cells = "".join(f" {_power(loss):>{width}.3f}" for loss in losses)
        return f"  {label:<16}{cells}" + (f" {_power(losses[1] - losses[0]):8.3f}" if ratio else "")

    # The same text was read by all, so they have the same rows.
    for rows in zip(*(one["positions"] for one in variants), strict=True):
        lines.append(line(f"{rows[0]['start']} to {rows[0]['stop'] - 1}", [r["nll"] for r in rows]))
    lines.append(line("all", [_mean(one["positions"]) for one in variants]))
    return lines


def _mean(rows: Sequence[Mapping[str, Any]]) -> float:
    total: float = sum(row["nll"] * row["tokens"] for row in rows)
    return total / sum(int(row["tokens"]) for row in rows)


def _power(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _needles(one: Mapping[str, Any]) -> list[str]:
    cells = {(cell["length"], cell["depth"]): cell for cell in one["needles"]}
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    trials = next(iter(cells.values()))["trials"]
    lines = [
        f"hidden numbers, {one['name']}: said / more likely than 7 others / lead in nats; "
        f"{trials} a cell",
        f"  {'tokens':>8}" + "".join(f" {f'{depth:.0%} in':>19}" for depth in depths),
    ]
    for length in lengths:
        row = [cells[length, depth] for depth in depths]
        lines.append(f"  {length:>8}" + "".join(f" {_cell(cell):>19}" for cell in row))
    said, likely, lead = (
        sum(cell[key] for cell in cells.values()) / len(cells)
        for key in ("recall", "choice", "margin")
    )
    lines.append(f"  {'all':>8} {_cell({'recall': said, 'choice': likely, 'margin': lead}):>19}")
    return lines


def _cell(cell: Mapping[str, float]) -> str:
    return f"{cell['recall']:.0%} / {cell['choice']:.0%} / {cell['margin']:+.1f}"


def plot(path: Path, title: str, result: Mapping[str, Any]) -> None:
    """Draw perplexity against position, and heat maps of recall where they were measured.

    Raises
    ------
    RequestError
        If matplotlib is not installed, or the file cannot be of this kind.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [one for one in result["variants"] if one.get("needles")]
    rows = 1 + len(found)
    figure = Figure(figsize=(8, 3.6 + 2.4 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 if found else 1, squeeze=False)
    if found:  # the curves take both columns
        spec = grid[0][0].get_gridspec()
        for axes in grid[0]:
            axes.remove()
        curves: Any = figure.add_subplot(spec[0, :])
    else:
        curves = grid[0][0]
    figure.suptitle(title)
    draw(curves, result["variants"])
    for line, one in zip(grid[1:], found, strict=True):
        for axes, key, what in zip(
            line, ("recall", "choice"), ("said", "more likely than 7 others"), strict=True
        ):
            _heat(axes, one, key, f"{one['name']}: {what}")
    write(figure, path)


def draw(axes: Any, variants: Sequence[Mapping[str, Any]]) -> None:
    """Perplexity against position, a curve for each variant, on axes of matplotlib."""
    for one in variants:
        rows = one["positions"]
        axes.plot(
            [(row["start"] + row["stop"]) / 2 for row in rows],
            [row["perplexity"] for row in rows],
            marker="o", markersize=3, label=one["name"],
        )  # fmt: skip
    axes.set_xlabel("tokens before")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _heat(axes: Any, one: Mapping[str, Any], key: str, title: str) -> None:
    cells = {(cell["length"], cell["depth"]): cell[key] for cell in one["needles"]}
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    values = [[cells[length, depth] for length in lengths] for depth in depths]
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(
                x, y, f"{value:.0%}", ha="center", va="center",
                color="white" if value > 0.6 else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("hidden at")
    axes.set_title(title, fontsize=9)
