"""A report as one HTML page that needs nothing else: no network, no script, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pronk.evaluate.report_text import (
    cells,
    columns,
    p_text,
    protocol_lines,
    seen_from,
    sentence,
    sentences,
)
from pronk.evaluate.svg import Point, bars, mark, scatter
from pronk.units import format_bytes

__all__ = ["page"]

Row = Mapping[str, Any]

_MOST_LAYERS = 40  # bars of sensitivity
_INTERVAL = ("value", "low", "high")
_GROWTH = "perplexity beside the reference's, %"

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d1f21;--soft:#666c72;
--line:#e2e4e6;--good:#1f7a4d;--bad:#b3331d;--goodbg:#e3f3ea;--badbg:#fbe6e1;
--c0:#c44e00;--c1:#2f6db3;--c2:#3f8f4f;--c3:#7a4fa3;--c4:#b08900;--c5:#5b6770;--c6:#c2185b;
--c7:#008b8b}
@media(prefers-color-scheme:dark){:root{--bg:#131517;--card:#1b1e21;--ink:#e7e9ea;--soft:#9aa2a9;
--line:#30353a;--good:#6fd3a0;--bad:#ff9c85;--goodbg:#163527;--badbg:#43201a;
--c0:#ff9650;--c1:#7db4f0;--c2:#7fce8d;--c3:#c19ae6;--c4:#e0bd4a;--c5:#a3afb8;--c6:#ff7aa8;
--c7:#4fd0d0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1360px;padding:28px 20px 60px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:34px 0 10px}
p,li{max-width:92ch}.soft{color:var(--soft);font-size:13.5px}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:16px}
.grid1{display:grid;gap:16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card h3{margin:0 0 6px;font-size:14.5px}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;width:100%}
th,td{padding:6px 7px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600;white-space:normal}th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}td.name{font-weight:600}
.tag{font-size:11px;color:var(--soft);border:1px solid var(--line);border-radius:99px;
padding:1px 7px;margin-left:8px;font-weight:400}
td.worse{background:var(--badbg);color:var(--bad)}
td.better{background:var(--goodbg);color:var(--good)}
td.tie{color:var(--soft)}td.self{color:var(--line);text-align:center}
ul.says{padding-left:18px;margin:0}ul.says li{margin:3px 0}
.worse b{color:var(--bad)}.better b{color:var(--good)}
svg{width:100%;max-width:680px;height:auto;display:block;font-size:12px;fill:var(--ink)}
svg.dot{display:inline-block;width:12px;height:12px;margin:0 8px -1px 0;fill:var(--c)}
svg text{fill:var(--soft)}svg .middle{text-anchor:middle}svg .end{text-anchor:end}
svg .name{fill:var(--ink);font-weight:600;font-size:11.5px;paint-order:stroke;stroke:var(--card);
stroke-width:3px}svg .small{font-size:11px}
svg .grid{stroke:var(--line);fill:none}
svg .front{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 4;fill:none}
svg .mark{fill:var(--c);stroke:var(--c)}svg .mark path{stroke-width:1.5;opacity:.75}
svg .mark .shape{stroke:var(--card);opacity:1}svg .mark rect{stroke:none}
code{font-size:12.5px;overflow-wrap:anywhere}details{margin-top:10px}
details summary{cursor:pointer;color:var(--soft)}
"""


def page(report: Row) -> str:
    """The whole page."""
    rows = report["variants"]
    p = report["protocol"]
    wide = "grid1" if len(rows) > 6 else "grid2"
    count = len(rows) - 1
    title = f"{count} variant{'s' * (count > 1)} beside {report['reference']}"
    lead = f"{p['text']}, {p['tokens']:,} tokens"
    if report.get("created"):
        lead += f" · {report['created'][:10]}"
    if report.get("machine"):
        lead += f" · {report['machine'].get('cpu', '')}"
    parts = [
        f"<h1>{escape(title)}</h1><p class=soft>{escape(lead)}</p>",
        _table(report),
        "<h2>Quality against what it costs</h2>",
        f'<div class="grid2">{"".join(_plots(report))}</div>',
        "<h2>Which is better</h2>",
        f'<div class="card"><ul class="says">{"".join(_says(report))}</ul></div>',
        f'<div class="{wide}" style="margin-top:16px">',
        *(_matrix(report, metric) for metric in ("perplexity", "kl") if report["tests"][metric]),
        "</div>",
    ]
    parts += [
        f"<details><summary>{escape(name)}, every pair</summary>{_matrix(report, name)}</details>"
        for name in report["tasks"]
    ]
    sensitive = [row for row in rows if _sensitivity(row)]
    if sensitive:
        cards = (
            _card(
                f"{row['name']}: what each tensor costs",
                bars(_sensitivity(row), "KL, nats") + _prediction(row),
            )
            for row in sensitive
        )
        parts += ["<h2>Sensitivity</h2>", f'<div class="grid2">{"".join(cards)}</div>']
    parts += [
        "<h2>How it was measured</h2>",
        *(f"<p>{escape(x)}</p>" for x in protocol_lines(report)),
    ]
    parts.append(_details(report))
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(parts)}\n"
    )


def _card(title: str, inner: str) -> str:
    return f'<div class="card wide"><h3>{escape(title)}</h3>{inner}</div>'


def _dot(i: int) -> str:
    shape, style = mark(i)
    return f'<svg class="dot" viewBox="-7 -7 14 14" style="{style}">{shape}/></svg>'


def _table(report: Row) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in columns(report))
    lines = []
    on_front = set(report["fronts"].get("bytes", ()))
    for i, row in enumerate(report["variants"]):
        first, *rest = cells(report, row)
        tag = '<span class="tag">front</span>' if first in on_front else ""
        lines.append(
            f"<tr><td class=name>{_dot(i)}{escape(first)}{tag}</td>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
            + "</tr>"
        )
    return f'<div class="card wide"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _plots(report: Row) -> list[str]:
    rows = [r for r in report["variants"] if math.isfinite(r["perplexity"]["value"])]
    places = {row["name"]: i for i, row in enumerate(report["variants"])}
    parts = []

    def draw(title: str, label: str, x: Any, front: Sequence[str] = (), y: str = "growth") -> None:
        points = []
        for row in rows:
            at = x(row)
            if at is None:
                continue
            value, low, high = (row[y][k] * (1 if y == "kl" else 100) for k in _INTERVAL)
            if y == "kl" and low <= 0:  # the reference itself
                continue
            place = places[row["name"]]
            points.append(Point(row["name"], at[0], value, place, at[1], (low, high), _tip(row)))
        if points:
            xs = [point.x for point in points]
            what = "KL from the reference, nats a token" if y == "kl" else _GROWTH
            svg = scatter(points, label, what, front, x_log=max(xs) > 3 * min(xs), y_log=y == "kl")
            parts.append(_card(title, svg))

    fronts = report["fronts"]

    def size(row: Row) -> Any:
        return (row["bytes"] / 1e6, None) if "bytes" in row else None

    draw("Perplexity and size", "weights, MB", size, fronts.get("bytes", ()))
    draw("Divergence and size", "weights, MB", size, y="kl")

    def rate(row: Row) -> Any:
        s = row.get("speed")
        return (s["decode"], (s["decode_low"], s["decode_high"])) if s else None

    draw("Perplexity and speed", "decode, tokens/s", rate, fronts.get("decode", ()))

    def peak(row: Row) -> Any:
        return (row["speed"]["peak_memory"] / 1e6, None) if "speed" in row else None

    draw("Perplexity and memory", "peak memory of the process, MB", peak)
    counts = [row.get("parameters", 0) for row in rows]
    if counts and max(counts) > 1.01 * min(counts):  # some are pruned

        def parameters(row: Row) -> Any:
            return (row["parameters"] / 1e6, None) if "parameters" in row else None

        draw("Perplexity and parameters", "weights, millions", parameters)
    return parts


def _tip(row: Row) -> str:
    text = f"{row['name']}: perplexity {row['perplexity']['value']:.3f}"
    if "bytes" in row:
        text += f", {format_bytes(row['bytes'])}, {row['bits']:.2f} bits a weight"
    if "speed" in row:
        text += f", {row['speed']['decode']:.1f} tokens/s"
    return text


def _says(report: Row) -> list[str]:
    lines = []
    for line in sentences(report):
        claim, colon, rest = line.partition(": ")
        kind = "worse" if " is worse " in claim else "better" if " is better " in claim else "tie"
        lines.append(f'<li class="{kind}"><b>{escape(claim)}</b>{escape(colon + rest)}</li>')
    return lines


def _matrix(report: Row, metric: str) -> str:
    """A table of a metric: each variant (row) beside each other (column)."""
    tests = report["tests"][metric]
    order = {row["name"]: i for i, row in enumerate(report["variants"])}
    names = [n for n in order if any(n in (t["a"], t["b"]) for t in tests)]
    pairs = {(t["a"], t["b"]): t for t in tests}
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [f"<tr><th>row less column</th>{heads}</tr>"]
    for name in names:
        line = f"<td class=name>{_dot(order[name])}{escape(name)}</td>"
        for other in names:
            if name == other:
                line += "<td class=self>·</td>"
                continue
            test = pairs.get((other, name)) or pairs[name, other]
            line += _cell(metric, seen_from(test, other, metric), report["alpha"])
        lines.append(f"<tr>{line}</tr>")
    title = {"perplexity": "Perplexity, relative", "kl": "KL from the reference, nats"}
    head = title.get(metric, f"{metric}, points of accuracy")
    return _card(head, f"<table>{''.join(lines)}</table>")


def _cell(metric: str, test: Row, alpha: float) -> str:
    value = test["value"]
    if metric == "perplexity":
        text = f"{value:+.2%}"
    elif metric == "kl":
        text = f"{value:+.5f}"
    else:
        text = f"{100 * value:+.1f}"
    worse = value > 0 if metric in ("perplexity", "kl") else value < 0
    kind = "tie" if test["adjusted"] >= alpha else "worse" if worse else "better"
    tip = f"{sentence(metric, test, alpha)} ({p_text(test['p'])} before adjusting)"
    return f'<td class="{kind}" title="{escape(tip)}">{text}</td>'


def _sensitivity(row: Row) -> list[tuple[str, float, int]]:
    """What a bundle says of its tensors, the worst first; nothing if it is of no known form.

    Either ``{tensor: loss}`` or ``{tensor: {format: loss}}``; of several formats the worst counts.
    """
    found: list[tuple[str, float]] = []
    data = row.get("sensitivity")
    for name, value in data.items() if isinstance(data, Mapping) else ():
        losses = list(value.values()) if isinstance(value, Mapping) else [value]
        sound = [x for x in losses if isinstance(x, int | float) and math.isfinite(x)]
        if sound:
            short = str(name).removeprefix("model.").removesuffix(".weight")
            found.append((short.removeprefix("layers."), float(max(sound))))
    found.sort(key=lambda one: -one[1])
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name, _ in found))
    return [(n, v, kinds.index(n.rpartition(".")[2])) for n, v in found[:_MOST_LAYERS]]


def _prediction(row: Row) -> str:
    """What a bundle says its formats were to cost, and what they did; nothing if it says none."""
    told = row.get("prediction")
    told = told if isinstance(told, Mapping) else {}
    known = [told.get(key) for key in ("kl", "measured_kl")]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in known):
        return ""
    text = "On calibration text, its formats were predicted to cost {:.4f} nats, and cost {:.4f}."
    return f"<p class=soft>{escape(text.format(*known))}</p>"


def _details(report: Row) -> str:
    rows = "".join(
        f"<tr><td>{escape(row['name'])}</td><td><code>{escape(row['sha256'][:32])}</code></td>"
        f"<td>{escape(', '.join(f'{k} {v:.0%}' for k, v in row.get('formats', {}).items()))}</td>"
        f"<td>{row['word_perplexity']:.3f}</td><td>{row['bits_per_byte']:.4f}</td></tr>"
        for row in report["variants"]
    )
    heads = ("variant", "sha256", "formats, by weights", "word perplexity", "bits a byte")
    facts = [
        f"{name}: " + ", ".join(f"{k} {v}" for k, v in report[name].items() if v)
        for name in ("versions", "machine", "engine")
        if report.get(name)
    ]
    return (
        f'<div class="card wide"><table><tr>{"".join(f"<th>{h}</th>" for h in heads)}</tr>{rows}'
        f"</table></div>{''.join(f'<p class=soft>{escape(fact)}</p>' for fact in facts)}"
    )
