"""From what was measured of several variants to one report: plain data, and nothing measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pronk.errors import RequestError
from pronk.evaluate.compare import Reading, Variant
from pronk.evaluate.paired import (
    RESAMPLES,
    Interval,
    Resampled,
    blocks_of,
    holm,
    mcnemar,
)
from pronk.evaluate.scores import Scores
from pronk.evaluate.tasks import Answers, Task

__all__ = ["ALPHA", "front", "make_report"]

ALPHA = 0.05
"""Differences whose adjusted p is not below it are not called differences."""


def make_report(
    variants: Sequence[Variant],
    reference: Variant,
    reading: Reading,
    scores: Mapping[str, Scores],
    tasks: Sequence[Task] = (),
    answers: Mapping[str, Mapping[str, Answers]] | None = None,
    rounds: Sequence[Mapping[str, Mapping[str, Any]]] = (),
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as plain data.

    Parameters
    ----------
    variants : sequence of Variant
        In the order of the report; the reference is one of them.
    reference : Variant
    reading : Reading
    scores : Mapping of str to Scores
        By the variants' names, as `score_all` gives them.
    tasks, answers
        What was asked, and by task and variant what was answered (`ask_all`).
    rounds : sequence of Mapping
        JSON of ``pronk bench`` by variant, a round each (`take_turns`).
    seed : int
        Of the resampling.
    about : Mapping
        Further fields: versions, machine.
    """
    names = [variant.name for variant in variants]
    # In a row, "growth" is the perplexity's beside the reference's, in pairs: a far narrower
    # interval than the perplexity's own, which is mostly that of the text.
    sizes = [len(window.targets) for window in reading.windows()]
    starts = blocks_of(sizes)
    count = len(variants)
    resampled = Resampled(
        np.stack([getattr(scores[n], f) for f in ("nll", "kl", "same") for n in names]),
        starts,
        seed,
    )
    rows: list[dict[str, Any]] = []
    place = names.index(reference.name)
    for i, variant in enumerate(variants):
        nll = resampled.mean(i)
        total = nll.value * (len(reading.ids) - 1)
        rows.append(
            {
                "name": variant.name,
                "path": variant.path,
                "sha256": variant.sha256,
                **variant.facts,
                "nll": nll.value,
                "perplexity": _map(nll, _exp).to_dict(),
                "growth": _map(resampled.difference(i, place), _growth).to_dict(),
                "word_perplexity": _exp(total / max(1, reading.words)),
                "bits_per_byte": total / math.log(2) / max(1, reading.bytes),
                "kl": resampled.mean(count + i).to_dict(),
                "top1_agreement": resampled.mean(2 * count + i).to_dict(),
                "tasks": {},
            }
        )
    tests: dict[str, list[dict[str, Any]]] = {
        "perplexity": _tests(
            names, range(count), lambda a, b: _map(resampled.difference(a, b), _growth)
        ),
        "kl": _tests(
            names,
            [i for i in range(count) if names[i] != reference.name],
            lambda a, b: resampled.difference(count + a, count + b),
        ),
    }
    for task in tasks:
        got = (answers or {})[task.name]
        tests[task.name] = _task(task, [got[n] for n in names], names, rows, seed)
    if rounds:
        for row in rows:
            row["speed"] = _speed([r[row["name"]] for r in rounds])
    return {
        "format": 1,
        **(about or {}),
        "reference": reference.name,
        "seed": seed,
        "resamples": RESAMPLES,
        "confidence": 0.95,
        "alpha": ALPHA,
        "protocol": {**reading.to_dict(), "blocks": len(starts)},
        "tasks": {
            t.name: {"questions": len(t.items), "sha256": t.sha256, "metric": t.metric}
            for t in tasks
        },
        "variants": rows,
        "tests": tests,
        "fronts": {
            key: front([(_size(row, key), row["perplexity"]["value"], row["name"]) for row in rows])
            for key in ("bytes", "decode")
            if all(_size(row, key) is not None for row in rows)
        },
    }


def _size(row: Mapping[str, Any], key: str) -> Any:
    """What a front is drawn against, less being better."""
    if key == "decode":
        return -row["speed"]["decode"] if "speed" in row else None
    return row.get(key)


def front(points: Sequence[tuple[float, float, str]]) -> list[str]:
    """The names of the points that no other point beats: the Pareto front, less being better.

    Parameters
    ----------
    points : sequence of (float, float, str)
        Cost, loss and name.
    """
    kept: list[str] = []
    best = math.inf
    for _, loss, name in sorted(points):
        if loss < best:
            kept.append(name)
            best = loss
    return kept


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _growth(value: float) -> float:
    """The relative growth of a perplexity by a difference of log-likelihoods."""
    return math.expm1(value) if value < 700 else math.inf


def _map(x: Interval, f: Callable[[float], float]) -> Interval:
    return Interval(f(x.value), f(x.low), f(x.high), x.p)


def _tests(
    names: Sequence[str], of: Sequence[int], compare: Callable[[int, int], Interval]
) -> list[dict[str, Any]]:
    """Every pair of variants: the difference b - a, its interval, p, and p adjusted."""
    pairs = [(a, b) for place, a in enumerate(of) for b in of[place + 1 :]]
    found = [compare(b, a) for a, b in pairs]
    adjusted = holm([one.p or 0.0 for one in found])
    return [
        {"a": names[a], "b": names[b], **one.to_dict(), "adjusted": p}
        for (a, b), one, p in zip(pairs, found, adjusted, strict=True)
    ]


def _task(
    task: Task, got: Sequence[Answers], names: Sequence[str], rows: list[dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    right = np.array([one.right_normalized for one in got])
    resampled = Resampled(right, seed=seed)
    for i, (row, one) in enumerate(zip(rows, got, strict=True)):
        row["tasks"][task.name] = {
            "accuracy": resampled.mean(i).to_dict(),
            "accuracy_raw": statistics.fmean(one.right),
            "perplexity": _exp(statistics.fmean(one.nll)),
            "cut": one.cut,
        }

    def compare(a: int, b: int) -> Interval:
        d = resampled.difference(a, b)
        return Interval(d.value, d.low, d.high, mcnemar(right[a], right[b]))

    return _tests(names, range(len(names)), compare)


def _speed(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, the extremes of the rate, and the largest peak of memory."""
    found: dict[str, Any] = {"rounds": len(runs)}
    try:
        for key in ("decode", "prefill", "ttft", "load_time"):
            found[key] = statistics.median(run[key] for run in runs)
        found["decode_low"] = min(run["decode"] for run in runs)
        found["decode_high"] = max(run["decode"] for run in runs)
        found["peak_memory"] = max(run["peak_memory"] for run in runs)
    except (KeyError, TypeError):
        raise RequestError("a measurement of speed lacks what pronk bench --json prints") from None
    return found
