"""A profile for people: a table, and bars of where the time goes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pronk.errors import RequestError

__all__ = ["SUFFIXES", "check_plot", "format_phase", "plot", "write"]

SUFFIXES = (".svg", ".png", ".html")
"""What `plot` writes."""

_NO_MATPLOTLIB = "a plot needs matplotlib: pip install 'pronk[plot]'"
_OTHERS = 0.01  # ops that take less than this share of the time are drawn as one


def format_phase(name: str, phase: Mapping[str, Any], limit: str) -> list[str]:
    """The lines of a table, from the data of `Phase.to_dict`.

    Parameters
    ----------
    name : {"prefill", "decode"}
    phase : dict
    limit : {"bandwidth", "peak"}
        Which fraction to show.
    """
    steps = phase["steps"]
    what = "of the bandwidth" if limit == "bandwidth" else "of the int8 peak"
    sizes = (
        f"{phase['tokens']} tokens"
        if name == "prefill"
        else f"{phase['tokens']} tokens after {phase['context']}"
    )
    lines = [
        f"{name}: {sizes} in {steps} steps, {phase['tokens_per_second']:.1f} tokens/s; for a step:",
        f"  {'op':<28} {'calls':>6} {'us':>9} {'share':>6} {'waits':>6} {'MB':>8} {'GB/s':>6} "
        f"{'Mmac':>9} {'Gop/s':>7}  {what}",
    ]

    def line(label: str, calls: str, row: Mapping[str, Any], wait: float) -> str:
        seconds = row["seconds"]
        mega_macs = row["multiply_adds"] / steps / 1e6
        figures = (
            f"  {label:<28} {calls:>6} {seconds / steps * 1e6:9.1f} {row['share']:6.1%} "
            f"{wait / max(seconds, 1e-12):6.1%} {row['bytes'] / steps / 1e6:8.3f} "
            f"{row['bytes_per_second'] / 1e9:6.1f} "
        )
        if limit == "peak" and not row["multiply_adds"]:
            return figures + f"{'-':>9} {'-':>7}"
        return (
            figures + f"{mega_macs:9.2f} {row['ops_per_second'] / 1e9:7.0f}  "
            f"{row[f'fraction_of_{limit}']:.1%}"
        )

    for row in phase["ops"]:
        lines.append(line(row["op"], f"{row['calls'] / steps:g}", row, row["wait"]))
    outside = phase["outside"]
    lines.append(
        f"  {'outside the ops':<28} {'':>6} {outside / steps * 1e6:9.1f} "
        f"{outside / max(phase['seconds'], 1e-12):6.1%}"
    )
    lines.append(line("all", "", phase, phase["wait"]))
    return lines


def check_plot(path: Path) -> None:
    """Raise RequestError unless `plot` could write this file."""
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"a plot is a file ending in {', '.join(SUFFIXES)}, not {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"the folder of the plot, {path.absolute().parent}, is not there")
    try:
        import matplotlib  # noqa: F401 (whether it is there)
    except ImportError:
        raise RequestError(_NO_MATPLOTLIB) from None


def plot(path: Path, title: str, phases: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a stacked bar of the time's shares for each phase (data of `Phase.to_dict`).

    Raises
    ------
    RequestError
        If matplotlib is not installed, or the file cannot be of this kind.
    """
    check_plot(path)
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = {name: _shares(phase) for name, phase in phases.items()}
    labels = list(dict.fromkeys(label for parts in shares.values() for label in parts))
    colours = dict(zip(labels, _colours(labels, colormaps["tab20"]), strict=True))
    figure = Figure(
        figsize=(10, 1.6 + 0.7 * len(shares) + 0.12 * len(labels)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()  # its stubs know no names on the axis
    drawn: dict[str, Any] = {}
    for name, parts in shares.items():
        left = 0.0
        for label, share in parts.items():
            bar = axes.barh(name, share, left=left, color=colours[label], edgecolor="white")
            drawn.setdefault(label, bar)
            if share > 0.04:
                axes.text(left + share / 2, name, f"{share:.0%}", ha="center", va="center")
            left += share
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the time")
    axes.set_title(title)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, frameon=False)
    write(figure, path)


def _shares(phase: Mapping[str, Any]) -> dict[str, float]:
    """Work of each op by its format-free name, then waiting, then what is outside the ops."""
    total = max(phase["seconds"], 1e-12)
    shares: dict[str, float] = {}
    for row in phase["ops"]:
        work = (row["seconds"] - row["wait"]) / total
        label = row["op"] if work >= _OTHERS else "other ops"
        shares[label] = shares.get(label, 0.0) + work
    others = shares.pop("other ops", 0.0)
    ends = {"other ops": others, "waiting in barriers": phase["wait"] / total,
            "outside the ops": phase["outside"] / total}  # fmt: skip
    return {**shares, **ends}


def _colours(labels: Sequence[str], palette: Any) -> list[Any]:
    greys = {"other ops": "0.85", "waiting in barriers": "0.65", "outside the ops": "0.4"}
    ops = iter(range(len(labels)))
    return [greys.get(label) or palette(next(ops) % 20) for label in labels]


def write(figure: Any, path: Path) -> None:
    """Write a figure as the kind of file that the path names, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix.lower() == ".html":
            image = StringIO()
            figure.savefig(image, format="svg")
            svg = image.getvalue()
            page = f"<!doctype html>\n<meta charset=utf-8>\n{svg[svg.index('<svg') :]}"
            beside.write_text(page, encoding="utf-8")
        else:
            figure.savefig(beside, format=path.suffix.lower()[1:])
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
