"""Markdown tables of what rounding or skipping activations, and rounding the KV cache, costs."""

from __future__ import annotations

from typing import Any

from tables import markdown

Result = dict[str, Any]

_CACHES = {"int4_plain": "int4, not rotated"}
_RANGES = {
    "exact": "not rounded",
    "minmax": "int8, static: `minmax`",
    "percentile": "int8, static: `percentile`",
    "mse": "int8, static: `mse`",
    "entropy": "int8, static: `entropy`",
    "by token": "int8, a scale for each token as it comes",
    "by group": "12 bits, a scale for each 32 of a token: Pronk's kernels",
}


def kv_cache(result: Result) -> str:
    """The tables of a `kv_cache.py` result."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    by = {(row["model"], row["kv"]): row for row in result["rows"]}
    kinds = list(dict.fromkeys(row["kv"] for row in result["rows"]))
    head = ["cache", *(f"{model}: {what}" for model in models for what in ("KL", "top-1"))]
    rows = [
        [_CACHES.get(kv, kv),
         *(text for model in models for text in (f"{by[model, kv]['kl']:.5f}",
                                                 f"{by[model, kv]['top1_agreement']:.1%}"))]
        for kv in kinds
    ]  # fmt: skip
    pasts = list(dict.fromkeys(row["past"] for row in result["rates"]))
    at = {(row["kv"], row["past"]): row for row in result["rates"]}
    names = ("MB", "decode", f"prefill of {result['prompt']}")
    rates_head = [result["model"], *(f"{name} at {past:,}" for past in pasts for name in names)]
    rates = [
        [kv, *(text for past in pasts for text in (f"{at[kv, past]['bytes'] / 1e6:.0f}",
                                                   f"{at[kv, past]['decode']:,.0f}",
                                                   f"{at[kv, past]['prefill']:,.0f}"))]
        for kv in dict.fromkeys(row["kv"] for row in result["rates"])
    ]  # fmt: skip
    tokens = result["rows"][0]["tokens"]
    return "\n\n".join([
        f"KL and top-1 agreement on {tokens:,} tokens in windows of {result['window']:,}:",
        markdown(head, rows),
        "Megabytes of the cache, and tokens a second behind so many positions:",
        markdown(rates_head, rates),
    ])  # fmt: skip


def static_activations(result: Result) -> str:
    """The table of a `static_activations.py` result."""
    head = [f"{result['model']}, {result['tokens']:,} tokens", "perplexity", "KL", "top-1"]
    rows = [
        [_RANGES[row["ranges"]], f"{row['perplexity']:.2f}", f"{row['kl']:.5f}",
         f"{row['top1_agreement']:.1%}"]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(head, rows)


def sparse_mlp(result: Result) -> str:
    """The tables of a `sparse_mlp.py` result."""
    parts = []
    if result["models"]:
        head = ["model", "KL allowed", "KL, calibration", "KL, other text", "top-1", "zeros",
                "groups of 32 all zero", "decode, with / without"]  # fmt: skip
        rows = [
            [row["model"], f"{row['budget']:g}", f"{row['calibrated']:.4f}", f"{row['kl']:.4f}",
             f"{row['top1_agreement']:.1%}", f"{row['skipped']:.1%}",
             f"{row['skipped_groups']:.2%}", _ratio(row["ratio"])]
            for row in result["models"]
        ]  # fmt: skip
        parts.append(markdown(head, rows))
    if result["relu"]:
        head = ["gates open", "opening together", "zeros", "groups of 32 all zero",
                "decode, with / without"]  # fmt: skip
        rows = [
            [f"{row['open']:.0%}", str(row["together"]), f"{row['skipped']:.1%}",
             f"{row['skipped_groups']:.1%}", _ratio(row["ratio"])]
            for row in result["relu"]
        ]  # fmt: skip
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
