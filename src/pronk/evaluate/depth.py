"""What a model costs at the depth of a long context, and what an attention policy changes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pronk.errors import RequestError
from pronk.evaluate.positions import PartsModel, scored
from pronk.evaluate.windows import log_normalizer
from pronk.units import format_bytes

__all__ = ["Quality", "compare", "fill", "format_depth", "summarize"]


@dataclass(frozen=True, slots=True)
class Quality:
    """Two models on the same tokens: the divergence, and both perplexities.

    Attributes
    ----------
    first, tokens : int
        Tokens read before the first one compared, and tokens compared.
    kl : float
        Mean KL(reference || model), in nats a token.
    top1_agreement : float
        Share of the tokens for which both think the same one most likely.
    reference_perplexity, perplexity : float
    """

    first: int
    tokens: int
    kl: float
    top1_agreement: float
    reference_perplexity: float
    perplexity: float

    def to_dict(self) -> dict[str, float | int]:
        """Plain data under stable names."""
        return {
            "first": self.first,
            "tokens": self.tokens,
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
            "reference_perplexity": self.reference_perplexity,
            "perplexity": self.perplexity,
        }


def fill(ids: Sequence[int], tokens: int) -> list[int]:
    """The first tokens of a text, which starts over (but for its first token) where it ends."""
    filled = list(ids[:tokens])
    while len(filled) < tokens:
        filled += ids[1 : 1 + tokens - len(filled)] if len(ids) > 1 else ids
    return filled


def compare(
    reference: PartsModel,
    model: PartsModel,
    ids: Sequence[int],
    first: int,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Compare two models on the tokens behind the first `first`, all before being read by both.

    Both take turns, so neither's logits are held for longer than a part.

    Raises
    ------
    RequestError
        If there is nothing to compare, or the vocabularies differ in size.
    """
    if not 1 <= first < len(ids):
        raise RequestError(f"the first token compared must be 1 to {len(ids) - 1}, not {first}")
    kl, same, nll, reference_nll = 0.0, 0, 0.0, 0.0
    targets = ids[first:]
    rows = zip(
        scored(reference.logit_parts(ids, first - 1), targets),
        scored(model.logit_parts(ids, first - 1), targets),
        strict=True,
    )
    for (at, p, wanted), (_, q, _) in rows:
        if p.shape != q.shape:
            raise RequestError(
                f"the reference has {p.shape[1]} tokens in its vocabulary and the model "
                f"{q.shape[1]}: only models of one vocabulary can be compared"
            )
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        p -= log_normalizer(p)[:, None]
        q -= log_normalizer(q)[:, None]
        places = np.arange(len(wanted))
        reference_nll -= float(p[places, wanted].sum())
        nll -= float(q[places, wanted].sum())
        # A token that the reference rules out (-inf) adds nothing: 0 log 0 = 0.
        possible = np.isfinite(p)
        np.subtract(p, q, out=q, where=possible)
        q[~possible] = 0
        kl += float((np.exp(p) * q).sum())
        if progress is not None:
            progress(at + len(wanted), len(targets))
    n = len(targets)
    return Quality(
        first, n, max(0.0, kl / n), same / n,
        float(np.exp(reference_nll / n)), float(np.exp(nll / n)),
    )  # fmt: skip


_LESS_IS_BETTER = ("kv", "peak_memory")
_RATES = ("prefill", "decode")


def summarize(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds in which variants took turns, and their ratios.

    Parameters
    ----------
    rounds : sequence of dict
        In each, the figures of every variant: ``kv``, ``peak_memory``, ``memory`` (the plan),
        ``prefill``, ``decode``, ``ttft``.

    Returns
    -------
    dict
        ``variants``: medians by variant. ``ratios``: where there are two, the second's figures
        over the first's, the median of the ratios within rounds.
    """
    names = list(rounds[0])
    variants = {}
    for name in names:
        measured = [one[name] for one in rounds]
        variants[name] = {
            "memory": measured[0]["memory"],
            "kv": measured[0]["kv"],
            **{
                key: statistics.median(one[key] for one in measured)
                for key in ("peak_memory", "ttft", "prefill", "decode")
            },
        }
    result: dict[str, Any] = {"rounds": len(rounds), "variants": variants}
    if len(names) == 2:
        base, other = names
        result["ratios"] = {
            key: statistics.median(one[other][key] / max(one[base][key], 1e-9) for one in rounds)
            for key in (*_LESS_IS_BETTER, *_RATES)
        }
    return result


def format_depth(depth: Mapping[str, Any]) -> list[str]:
    """The lines of a table, from what ``pronk bench --json`` calls ``depth``."""
    variants, ratios = depth["variants"], depth.get("ratios")
    shown = {"full": "full attention" if ratios else "", "policy": depth["attention"] or ""}
    width = max(10, *(len(shown[name]) for name in variants))
    lines = [
        f"at a context of {depth['context']}: {depth['prompt_tokens']} tokens read, "
        f"{depth['tokens']} written; "
        + (f"medians of {depth['rounds']} runs" if depth["rounds"] > 1 else "one run")
        + (" in turns, each in a process of its own" if ratios else ", in a process of its own"),
    ]

    def line(label: str, cells: Sequence[str], ratio: str = "") -> None:
        row = f"  {label:<22} " + " ".join(f"{cell:>{width}}" for cell in cells)
        lines.append(f"{row} {ratio:>8}".rstrip())

    if ratios:
        line("", [shown[name] for name in variants], "ratio")
    for label, key in (
        ("KV memory", "kv"),
        ("peak memory", "peak_memory"),
        ("prefill, tokens/s", "prefill"),
        ("decode, tokens/s", "decode"),
    ):
        cells = [
            format_bytes(int(one[key])) if key in _LESS_IS_BETTER else f"{one[key]:.1f}"
            for one in variants.values()
        ]
        line(label, cells, f"{ratios[key]:.2f}" if ratios else "")
    quality = depth.get("quality")
    if quality:
        pair = (quality["reference_perplexity"], quality["perplexity"])
        line("perplexity, last part", [f"{x:.3f}" for x in pair], f"{pair[1] / pair[0]:.3f}")
        lines.append(
            f"  over the last {quality['tokens']} tokens: KL from full attention "
            f"{quality['kl']:.4f} nats a token, top-1 agreement {quality['top1_agreement']:.2%}"
        )
    return lines
