"""Markdown tables of what pruned and sparse models keep, beside dense ones in few bits."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import quality_tables
from markdown_table import markdown

Result = dict[str, Any]


def pruning(result: Result) -> str:
    """The tables of a `pruning.py` result."""
    parts = [quality_tables.pruning(result)]
    if result["zeros"]:
        head = ["2:4 zeros in all layers", "perplexity", "KL", "top-1 agreement",
                f"after {result['steps']} steps: perplexity", "KL", "top-1 agreement"]  # fmt: skip
        rows = [
            [one["method"], *_judged(one["pruned"]), *_judged(one["recovered"])]
            for one in result["zeros"]
        ]
        parts.append(markdown(head, rows))
    if result["compared"]:
        parts += _compared(result)
    return "\n\n".join(parts)


def _compared(result: Result) -> list[str]:
    """Every model on one text, as Pronk runs it, and on the first questions of tasks."""
    bits = {one["name"]: one["bits"] for one in result["packed"]}
    first = result["compared"][0]
    tasks = list(first["accuracy"])
    head = ["as Pronk runs it", "bits a weight", "perplexity", "KL", "top-1 agreement",
            *tasks, *(["kept"] if tasks else [])]  # fmt: skip
    rows = []
    for one in result["compared"]:
        row = [_named(one["name"]), f"{bits[one['name']]}" if one["name"] in bits else ""]
        row += _judged(one) + [f"{one['accuracy'][task]:.1%}" for task in tasks]
        if tasks:
            kept = fmean(one["accuracy"].values()) / fmean(first["accuracy"].values())
            row.append(f"{kept:.0%}")
        rows.append(row)
    said = f"All on {result['judged']:,} tokens of the text"
    if tasks:
        said += (f", and the first {result['questions']} questions of each task; "
                 "\"kept\" is the share of the mean accuracy")  # fmt: skip
    return [f"{said}:", markdown(head, rows), *_verdict(result, bits)]


def _verdict(result: Result, bits: dict[str, float]) -> list[str]:
    """Whether sparse int4 is worth a kernel: it is not where a smaller dense model is better."""
    of = {one["name"]: one for one in result["compared"] if one["name"] in bits}
    sparse = [name for name in of if "2-4" in name]
    dense = [name for name in of if "2-4" not in name]
    if not sparse or not dense:
        return []
    best = min(sparse, key=lambda name: of[name]["kl"])
    better = [n for n in dense if bits[n] <= bits[best] and of[n]["kl"] <= of[best]["kl"]]
    mine = (
        f"At best, sparse int4 ({_named(best)}) would take {bits[best]} bits a weight at a KL of "
        f"{of[best]['kl']:.3f}"
    )
    if not better:
        return [f"{mine}; no dense model of that size or less is as near."]
    other = min(better, key=lambda name: of[name]["kl"])
    return [
        f"{mine}. Dense {_named(other)} takes {bits[other]} at {of[other]['kl']:.3f}: it is both "
        "smaller and nearer, so sparse int4 has neither a format nor a kernel here."
    ]


def _named(name: str) -> str:
    return name.removeprefix("packed-").replace("2-4-", "2:4 int4, ")


def _judged(one: Result) -> list[str]:
    return [f"{one['perplexity']:.2f}", f"{one['kl']:.3f}", f"{one['top1_agreement']:.1%}"]
