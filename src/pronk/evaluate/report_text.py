"""A report in words: sentences with their tests, and tables, for terminals and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pronk.units import format_bytes

__all__ = [
    "cells",
    "columns",
    "format_report",
    "markdown",
    "p_text",
    "protocol_lines",
    "seen_from",
    "sentence",
    "sentences",
]

Row = Mapping[str, Any]


def p_text(p: float) -> str:
    """``p < 0.001``, or as it is."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def sentence(metric: str, test: Row, alpha: float) -> str:
    """What a test says of its variant b against its a.

    Parameters
    ----------
    metric : str
        ``perplexity``, ``kl``, or the name of a task.
    test : Mapping
        An entry of the report's ``tests``.
    alpha : float
        Above it, no difference is claimed.
    """
    if metric == "kl":
        figures, what = (f"{test[k]:+.5f}" for k in ("value", "low", "high")), "nats of KL"
    elif metric == "perplexity":
        figures, what = (f"{test[k]:+.2%}" for k in ("value", "low", "high")), "perplexity"
    else:
        figures = (f"{100 * test[k]:+.1f}" for k in ("value", "low", "high"))
        what = f"points on {metric}"
    value, low, high = figures
    more = test["value"] > 0
    worse = more if metric in ("perplexity", "kl") else not more
    if test["value"] == 0 and test["low"] == test["high"] == 0:
        return f"{test['b']} equals {test['a']} ({what})"
    if test["adjusted"] < alpha:
        claim = f"{test['b']} is {'worse' if worse else 'better'} than {test['a']}"
    else:
        claim = f"no difference is shown between {test['b']} and {test['a']}"
    return f"{claim}: {value} {what} [{low}, {high}], {p_text(test['adjusted'])}"


def sentences(report: Row) -> list[str]:
    """Each variant beside the reference, then each beside the next better one in perplexity."""
    tests, alpha = report["tests"], report["alpha"]
    reference = report["reference"]
    lines = []
    for metric in tests:
        mine = [t for t in tests[metric] if reference in (t["a"], t["b"])]
        mine = [seen_from(test, reference, metric) for test in mine]
        # Questions are few, and most variants answer them alike: those take one sentence.
        ties = [t["b"] for t in mine if t["adjusted"] >= alpha and metric in report["tasks"]]
        lines += [sentence(metric, test, alpha) for test in mine if test["b"] not in ties]
        if ties:
            lines.append(f"on {metric}, no difference from {reference} is shown: {', '.join(ties)}")
    ranked = sorted(
        (row for row in report["variants"] if row["name"] != reference),
        key=lambda row: row["perplexity"]["value"],
    )
    for a, b in pairwise(ranked):
        names = {a["name"], b["name"]}
        (test,) = (t for t in tests["perplexity"] if {t["a"], t["b"]} == names)
        lines.append(sentence("perplexity", seen_from(test, a["name"], "perplexity"), alpha))
    return lines


def seen_from(test: Row, first: str, metric: str) -> Row:
    """A test as a comparison with one of its two variants."""
    if test["a"] == first:
        return test

    def turn(x: float) -> float:
        return 1 / (1 + x) - 1 if metric == "perplexity" else 0.0 - x  # no negative zero

    return {
        **test,
        "a": first,
        "b": test["a"],
        "value": turn(test["value"]),
        "low": turn(test["high"]),
        "high": turn(test["low"]),
    }


def columns(report: Row) -> list[str]:
    """The heads of the table."""
    rows = report["variants"]
    heads = ["variant", "MB", "bits", "perplexity", "vs reference", "KL, nats", "same top-1"]
    heads += list(report["tasks"])
    if "speed" in rows[0]:
        heads += ["decode, tokens/s", "prefill, tokens/s", "peak memory"]
    return heads


def cells(report: Row, row: Row) -> list[str]:
    """A variant's row of the table; half the width of the interval stands behind a figure."""
    mine = row["name"] == report["reference"]
    out = [
        row["name"],
        f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
        f"{row['bits']:.2f}" if "bits" in row else "",
        _about(row["perplexity"], "{:.3f}"),
        "reference" if mine else _about(row["growth"], "{:+.2f}", 100) + " %",
        "" if mine else _about(row["kl"], "{:.5f}"),
        "" if mine else f"{row['top1_agreement']['value']:.2%}",
    ]
    out += [
        _about(row["tasks"][name]["accuracy"], "{:.1f}", 100) + " %" for name in report["tasks"]
    ]
    if "speed" in row:
        speed = row["speed"]
        out += [f"{speed['decode']:.1f}", f"{speed['prefill']:.0f}"]
        out.append(format_bytes(speed["peak_memory"]))
    return out


def _about(interval: Row, form: str, factor: float = 1) -> str:
    half = (interval["high"] - interval["low"]) / 2
    return f"{form.format(interval['value'] * factor)} ± {form.format(half * factor).lstrip('+')}"


def protocol_lines(report: Row) -> list[str]:
    """How the figures were come by."""
    p = report["protocol"]
    begin = "every window begins with the model's first token; " if p["bos"] else ""
    lines = [
        f"Text: {p['text']}, {p['tokens']:,} tokens scored ({p['words']:,} words, {p['bytes']:,} "
        f"bytes), windows of {p['window']:,} tokens, {p['stride']:,} further each time, every "
        f"token scored once, after at least {p['window'] - p['stride']:,} others but at the start; "
        f"{begin}perplexity is exp of the mean negative log-likelihood a token.",
        f"Intervals are {report['confidence']:.0%}, from {report['resamples']:,} bootstrap "
        f"resamples (seed {report['seed']}) of {p['blocks']} blocks of neighbouring tokens, the "
        "same for every variant, or of questions. Differences of perplexity and KL are tested with "
        "the paired bootstrap, answers with McNemar's exact test; p is adjusted for the number of "
        "pairs (Holm).",
        "KL is KL(reference || variant) a token; same top-1 is how often both find the same token "
        "the likeliest.",
    ]
    for name, task in report["tasks"].items():
        lines.append(f"Task {name}: {task['questions']} questions, {task['metric']}.")
    return lines


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], bar: str) -> list[str]:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return bar.join([row[0].ljust(widths[0]), *rest])

    return [line(row) for row in (heads, *rows)]


def format_report(report: Row) -> list[str]:
    """The lines for a terminal."""
    rows = [cells(report, row) for row in report["variants"]]
    return [
        *_table(columns(report), rows, "  "),
        "",
        *sentences(report),
        "",
        *protocol_lines(report),
    ]


def markdown(report: Row) -> str:
    """The report as Markdown."""
    heads = columns(report)
    rows = [cells(report, row) for row in report["variants"]]
    rule = ["---", *("---:" for _ in heads[1:])]
    lines = [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]
    parts = [
        "# Comparison",
        "\n".join(lines),
        "\n".join(f"- {line}" for line in sentences(report)),
        "\n\n".join(protocol_lines(report)),
        "\n".join(f"- {row['name']}: `{row['sha256'][:16]}`, {row['path']}"
                  for row in report["variants"]),
    ]  # fmt: skip
    if report.get("versions"):
        parts.append(", ".join(f"{k} {v}" for k, v in report["versions"].items() if v))
    if report.get("machine"):
        parts.append(", ".join(f"{k}: {v}" for k, v in report["machine"].items()))
    return "\n\n".join(parts) + "\n"
