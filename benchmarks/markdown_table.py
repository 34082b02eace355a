"""Tables in Markdown, and figures in them."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads well as it stands."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def against(value: float, goal: float | None, form: str) -> str:
    """A figure, and whether it reaches its goal: ``2.90 ≥ 2.3`` or ``1.90 < 2.3``."""
    text = form.format(value)
    if goal is None:
        return text
    wanted = form.format(goal)
    if "%" not in form:
        wanted = f"{goal:g}"
    return f"{text} {'≥' if value >= goal else '<'} {wanted}"
