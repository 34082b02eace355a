"""A `FitReport` for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pronk.checkpoint.kinds import KINDS
from pronk.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pronk.compress.fit import FitReport
    from pronk.device.plan import Candidate

__all__ = ["print_report", "variants_table"]


def variants_table(
    considered: Iterable[Candidate], budget: int, chosen: Candidate | None = None
) -> Table:
    """The variants with their memory plans, best first; the one chosen is marked."""
    from rich.table import Table

    table = Table(
        title=f"variants for {format_bytes(budget)} (sizes in MB)",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for name in ("", *KINDS):
        table.add_column(name.replace("_", "/"))
    for name in ("weights", "KV", "arena", "overhead", "total", "error %"):
        table.add_column(name, justify="right")
    for one in considered:
        mine = chosen is not None and one.variant == chosen.variant
        sizes = (one.plan.weights, one.plan.kv, one.plan.arena, one.plan.overhead, one.plan.total)
        table.add_row(
            "*" if mine else "",
            *(one.variant.formats[kind] for kind in KINDS),
            *(f"{size / 1e6:.1f}" for size in sizes),
            f"{100 * one.variant.predicted_error**0.5:.2f}",
            style="bold" if mine else "dim" if one.plan.total > budget else None,
        )
    return table


def print_report(report: FitReport, console: Console | None = None) -> None:
    """Print the variants, the one chosen, its plan and what was measured."""
    if console is None:
        from rich.console import Console

        console = Console()
    console.print(variants_table(report.considered, report.budget, report.chosen))
    for candidate, peak in report.rejected:
        console.print(
            f"rejected: {candidate.variant} took {format_bytes(peak)} when measured",
            markup=False,
        )
    total = report.chosen.plan.total
    lines = [
        f"{report.directory}: {report.chosen.variant}",
        f"planned {format_bytes(total)} of {format_bytes(report.budget)} "
        f"at a context of {report.context} tokens",
        *_measured(report.measurements),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _measured(measurements: Any) -> list[str]:
    bench, text = measurements.get("bench", {}), measurements.get("eval", {})
    parts = [f"peak {format_bytes(bench['peak_memory'])}"] if "peak_memory" in bench else []
    for key, label, unit in (
        ("ttft", "first token", "s"),
        ("prefill", "prefill", "tokens/s"),
        ("decode", "decode", "tokens/s"),
        ("load_time", "load", "s"),
    ):
        if isinstance(bench.get(key), int | float):
            parts.append(f"{label} {bench[key]:.3g} {unit}")
    if isinstance(text.get("perplexity"), int | float):
        parts.append(f"perplexity {text['perplexity']:.2f}")
    return ["measured " + ", ".join(parts)] if parts else []
