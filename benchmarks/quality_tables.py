"""From the JSON of a run that measured quality to tables in Markdown: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markdown_table import against, markdown

from pronk.evaluate.report_text import p_text, seen_from

Result = dict[str, Any]


def activations(result: Result) -> str:
    """The table of an `activations.py` result."""
    head = [f"{result['model']}, {result['tokens']:,} tokens", "top-1 agreement",
            "KL divergence", "prefill of 512", "decode"]  # fmt: skip
    rows = [
        [r["variant"], f"{r['top1_agreement']:.2%}", f"{r['kl']:.6f}", f"{r['prefill']:,.0f}",
         f"{r['decode']:,.0f}"]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(head, rows)


def long_context(result: Result) -> str:
    """The tables of a `long_context.py` result."""
    parts = [_depths(result), "Perplexity by the tokens read before:"]
    parts.append(_positions(result["variants"]))
    parts.append("Hidden numbers: said, and more likely than seven others; by where they stand.")
    parts.append(_hidden(result["variants"]))
    if result["scaling"]:
        longer = result["scaling"]["context"]
        parts += [f"Perplexity up to {longer:,} tokens:", _positions(result["scaling"]["variants"])]
    return "\n\n".join(parts)


def _depths(result: Result) -> str:
    first, goals = result["depths"][0], result["goals"]
    head = [f"{result['model']}, {first['context']:,} tokens", "KV, MB", "saved", "peak memory, MB",
            "prefill", "ratio", f"decode after {first['prompt_tokens']:,}", "ratio", "perplexity",
            "KL", "top-1 agreement"]  # fmt: skip

    def sizes(one: Result) -> tuple[str, str]:
        return f"{one['kv'] / 1e6:.1f}", f"{one['peak_memory'] / 1e6:.0f}"

    full, quality = first["variants"]["full"], first["quality"]
    kv, peak = sizes(full)
    rows = [["full attention", kv, "", peak, f"{full['prefill']:,.0f}", "",
             f"{full['decode']:,.1f}", "", f"{quality['reference_perplexity']:.2f}", "",
             ""]]  # fmt: skip
    for depth in result["depths"]:
        one, ratios, quality = depth["variants"]["policy"], depth["ratios"], depth["quality"]
        kv, peak = sizes(one)
        rows.append([
            f"`{depth['attention']}`", kv,
            against(1 - ratios["kv"], goals["kv_saved"], "{:.0%}"), peak,
            f"{one['prefill']:,.0f}", f"{ratios['prefill']:.2f}",
            f"{one['decode']:,.1f}", against(ratios["decode"], goals["decode"], "{:.2f}"),
            f"{quality['perplexity']:.2f}", f"{quality['kl']:.4f}",
            f"{quality['top1_agreement']:.1%}",
        ])  # fmt: skip
    return markdown(head, rows)


def _positions(variants: Sequence[Result]) -> str:
    plain, *others = variants
    head = ["tokens before", plain["name"]]
    for one in others:
        head += [f"`{one['name']}`", "ratio"]
    rows = []
    for same in zip(*(one["positions"] for one in variants), strict=True):
        first, *rest = (row["perplexity"] for row in same)
        row = [f"{same[0]['start']:,} to {same[0]['stop'] - 1:,}", f"{first:.2f}"]
        for value in rest:
            row += [f"{value:.2f}", f"{value / first:.3f}"]
        rows.append(row)
    return markdown(head, rows)


def _hidden(variants: Sequence[Result]) -> str:
    depths = sorted({cell["depth"] for cell in variants[0]["needles"]})
    head = ["attention", "tokens", *(f"at {depth:.0%}" for depth in depths)]
    rows = []
    for i, one in enumerate(variants):
        for length in sorted({cell["length"] for cell in one["needles"]}):
            cells = {c["depth"]: c for c in one["needles"] if c["length"] == length}
            found = [f"{cells[d]['recall']:.0%}, {cells[d]['choice']:.0%}" for d in depths]
            rows.append([f"`{one['name']}`" if i else one["name"], f"{length:,}", *found])
    return markdown(head, rows)


def compression(result: Result) -> str:
    """The tables of a `compression.py` result: the largest first, of equal ones the worst."""
    order = sorted(result["rows"], key=lambda row: (-row["bytes"], -row["kl"]["value"]))
    tasks = list(result["tasks"])
    head = [result["model"], "made by", "MB", "bytes a weight", "perplexity", "beside float32",
            "KL, nats", "same top-1", *tasks, "decode"]  # fmt: skip
    timed = any("seconds" in row for row in order)
    rows = []
    for row in order:
        first = row["by"] == "reference"
        speed = row.get("speed")
        rows.append([
            row["name"] + "*" * bool(row.get("dequantized")), "" if first else row["by"],
            f"{row['bytes'] / 1e6:.1f}", f"{row['bits'] / 8:.3f}",
            f"{row['perplexity']['value']:.2f}",
            "" if first else _range(row["growth"], "{:+.2f}", 100) + " %",
            "" if first else _range(row["kl"], "{:.5f}", 1),
            "" if first else f"{row['top1_agreement']['value']:.2%}",
            *(f"{row['tasks'][name]:.1%}" for name in tasks),
            f"{speed['decode']:.0f}" if speed else "-",
            *([f"{row['seconds'] / 60:.1f} min" if "seconds" in row else ""] if timed else []),
        ])  # fmt: skip
    head += ["made in"] if timed else []
    parts = [markdown(head, rows), *_goals(result), *_smaller(result), *_beside(result)]
    return "\n\n".join([*parts, *_how(result)])


GOALS: tuple[tuple[str, float, dict[str, float | str]], ...] = (
    ("int8", 1.07, {"kl": 0.001, "growth": 0.002}),
    ("int4", 0.57, {"growth": 0.03, "saved": 0.4}),
    ("int4", 0.53, {"saved": 0.5}),
    ("int3", 0.44, {"beats": "Q3_K_M"}),
    ("auto", 0.50, {"beats": "Q2_K"}),
)
"""What the best recipe of a kind is to reach: bytes a weight at most, and how near to float32."""


def _goals(result: Result) -> list[str]:
    """The recipe of each kind that diverges least, and which of its goals it reaches."""
    ours = [row for row in result["rows"] if row["by"] == "pronk compress"]
    stored = [row for row in ours if not row["name"].endswith("activations")]
    named = {row["name"]: row for row in result["rows"]}
    lines = []
    for kind, most, goals in GOALS:
        rows = [row for row in stored if row["name"].startswith(kind)]
        rows = [row for row in rows if row["bits"] <= 8 * most] or rows
        if not rows:
            continue
        best = min(rows, key=lambda row: float(row["kl"]["value"]))
        kl, growth = best["kl"]["value"], best["growth"]["value"]
        found = [
            _reached(f"{best['bits'] / 8:.3f}", f"≤ {most} bytes a weight", best["bits"], 8 * most)
        ]
        if "kl" in goals:
            found.append(_reached(f"{kl:.5f}", f"KL ≤ {goals['kl']}", kl, goals["kl"]))
        if "growth" in goals:
            limit = goals["growth"]
            found.append(_reached(f"{growth:+.2%}", f"perplexity ≤ {limit:+.1%}", growth, limit))
        plain = named.get(_nearest(kind, best["name"]))
        if "saved" in goals and plain is not None:
            share = kl / plain["kl"]["value"] - 1
            text = f"KL beside round-to-nearest ≤ {-goals['saved']:+.0%}"
            found.append(_reached(f"{share:+.0%}", text, share, -goals["saved"]))
        others = [named.get(str(goals.get("beats")))]
        if kind == "auto":  # the best of what has one format throughout, and is no larger
            even = [row for row in stored if not row["name"].startswith("auto")]
            even = [row for row in even if row["bits"] <= best["bits"]]
            others += sorted(even, key=lambda row: float(row["kl"]["value"]))[:1]
        for other in filter(None, others):
            theirs = other["kl"]["value"]
            found.append(_reached(f"KL {kl:.3f}", f"< {other['name']}'s {theirs:.3f}", kl, theirs))
        lines += [[best["name"], *one] for one in found]
    if not lines:
        return []
    return ["What was aimed at, by the recipe of each kind that diverges least:",
            markdown(["recipe", "measured", "goal", "reached"], lines)]  # fmt: skip


def _nearest(kind: str, name: str) -> str:
    """The row of round-to-nearest in the groups of another recipe."""
    words = name.split()
    at = words.index("group-size") if "group-size" in words else len(words)
    return " ".join([f"{kind}-rtn", *words[at : at + 2]])


def _reached(measured: str, goal: str, value: float, limit: Any) -> list[str]:
    return [measured, goal, "yes" if value <= float(limit) else "no"]


def _range(interval: Result, form: str, factor: float) -> str:
    value, low, high = (form.format(interval[k] * factor) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _smaller(result: Result) -> list[str]:
    """Each of llama.cpp's files, and the smallest variant of ours that diverges less."""
    rows = []
    for other in result["rows"]:
        if other["by"] != "llama.cpp":
            continue
        kl = other["kl"]["value"]
        ours = [row for row in result["rows"] if row["by"] == "pronk compress"]
        ours = [row for row in ours if row["kl"]["value"] < kl]
        if not ours:
            rows.append([other["name"], f"{kl:.5f}", "none", "", ""])
            continue
        row = min(ours, key=lambda row: float(row["bytes"]))
        size = f"{row['bytes'] / other['bytes'] - 1:+.1%}"
        rows.append([other["name"], f"{kl:.5f}", row["name"], f"{row['kl']['value']:.5f}", size])
    if not rows:
        return []
    head = ["llama.cpp's", "KL, nats", "smallest of ours", "KL, nats", "bytes"]
    return ["The smallest of ours that diverges less than a file of llama.cpp's:",
            markdown(head, rows)]  # fmt: skip


def _beside(result: Result) -> list[str]:
    """Each variant of ours beside the smallest of llama.cpp's files that is no smaller."""
    theirs = [row for row in result["rows"] if row["by"] == "llama.cpp"]
    rows = []
    for row in result["rows"]:
        if row["by"] in ("llama.cpp", "reference"):
            continue
        larger = [one for one in theirs if one["bytes"] >= row["bytes"]]
        if not larger:
            continue
        other = min(larger, key=lambda one: float(one["bytes"]))
        names = {row["name"], other["name"]}
        test = next(t for t in result["tests"]["perplexity"] if {t["a"], t["b"]} == names)
        test = seen_from(test, other["name"], "perplexity")
        shown = test["adjusted"] < result["alpha"]
        word = ("worse" if test["value"] > 0 else "better") if shown else "no difference is shown"
        size = f"{row['bytes'] / other['bytes'] - 1:+.1%}"
        growth = _range(test, "{:+.2f}", 100) + " %"
        rows.append([row["name"], other["name"], size, growth, p_text(test["adjusted"]), word])
    if not rows:
        return []
    head = ["variant", "beside llama.cpp's", "bytes", "perplexity", "paired test", "so it is"]
    return ["The smallest file of llama.cpp's that is no smaller:", markdown(head, rows)]


def _how(result: Result) -> list[str]:
    p = result["protocol"]
    lines = [
        f"{p['text']}: {p['tokens']:,} tokens, windows of {p['window']:,}, {p['stride']:,} further "
        f"each time. Intervals are 95 %, of {result['resamples']:,} bootstrap resamples of "
        f"{p['blocks']} blocks; those beside float32 and the tests are paired, and p is adjusted "
        "for the number of pairs (Holm)."
    ]
    if result["tasks"]:
        asked = ", ".join(f"{name} {t['questions']}" for name, t in result["tasks"].items())
        lines.append(f"Questions: {asked}.")
    if any(row.get("dequantized") for row in result["rows"]):
        lines.append(
            "\\* has tensors of types that Pronk does not run as they are stored: its dequantized "
            "values were run in float32, and its speed was not measured."
        )
    for check in result["check"] or ():
        text = (
            f"Perplexity of {check['name']} on {check['tokens']:,} of these tokens in llama.cpp "
            f"itself: {check['llama_cpp']:.4g}, in Pronk {check['pronk']:.4g} "
            f"({check['apart']:+.2%})"
        )
        if "dequantized" in check:
            text += "; with its values dequantized, and float32 activations, in Pronk "
            text += f"{check['dequantized']:.4g}"
        lines.append(text + ".")
    return lines


def pruning(result: Result) -> str:
    """The tables of what `pruning.py` pruned and rounded."""
    claims = "; ".join(f"{what}: {claim}" for what, claim in result["claims"].items())
    parts = [f"Claims that such methods are measured against: {claims}."]
    if result["rows"]:
        before = result["rows"][0]["pruned"]["teacher_perplexity"]
        head = [result["model"], "layers", "neurons", "channels", "perplexity", "KL",
                "top-1 agreement", f"after {result['steps']} steps: perplexity", "KL",
                "top-1 agreement"]  # fmt: skip
        rows = [["as it is", "", "", "", f"{before:.2f}", "", "", "", "", ""]]
        for one in result["rows"]:
            sizes = [f"{one['shape'][key]:,}" for key in ("layers", "mlp", "hidden")]
            cells = _judged(one["pruned"]) + _judged(one["recovered"])
            rows.append([f"-{one['removed']:.1%}", *sizes, *cells])
        parts.append(markdown(head, rows))
    for one in result["grids"]:
        stages = one["measured"]
        head = [f"{one['format']}, {result['grid_steps']} steps", "perplexity", "KL",
                "top-1 agreement"]  # fmt: skip
        rows = [[name, *_judged(stages[name])] for name in ("rounded", "clipped", "trained")]
        nearest, trained = stages["rounded"]["perplexity"], stages["trained"]["perplexity"]
        before = stages["trained"]["teacher_perplexity"]
        closed = (nearest - trained) / (nearest - before)
        parts.append(markdown(head, rows))
        parts.append(
            f"In float: {before:.2f}. Training closes {against(closed, 0.5, '{:.0%}')} of the "
            f"perplexity that rounding to nearest loses; with the best clipping alone, "
            f"{(nearest - stages['clipped']['perplexity']) / (nearest - before):.0%} is closed."
        )
    return "\n\n".join(parts)


def _judged(one: Result) -> list[str]:
    return [f"{one['perplexity']:.2f}", f"{one['kl']:.3f}", f"{one['top1_agreement']:.1%}"]
