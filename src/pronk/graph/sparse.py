"""Sparse activation, as the user asks for it: which of an MLP's activations count as zero."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pronk.errors import RequestError
from pronk.spec import ModelSpec

__all__ = ["SparseMlp", "apply_sparse", "has_mlp", "parse_sparse", "sparse_mlps"]

_MOST_THRESHOLD = 1e30
_MOST_BYTES = 1 << 20
_HOW = "kl=0.01, keep=0.6, threshold=0.05, or a .json file of thresholds"


@dataclass(frozen=True, slots=True)
class SparseMlp:
    """What is asked for: thresholds, or what they are to be calibrated to.

    Parameters
    ----------
    thresholds : tuple of float
        One for each MLP that `sparse_mlps` names, or one for all; empty: to be calibrated.
    kl : float
        Most divergence from the model as it is, in nats a token; 0: not the aim.
    keep : float
        Share of activations that stay; 0: not the aim.
    """

    thresholds: tuple[float, ...] = ()
    kl: float = 0.0
    keep: float = 0.0


def parse_sparse(text: str) -> SparseMlp:
    """What ``--sparse-mlp`` says: ``kl=X``, ``keep=X``, ``threshold=X`` or a file's name.

    Raises
    ------
    RequestError
        If it says none of these, or the file does not hold thresholds.
    """
    name, equals, value = text.partition("=")
    if not equals or text.endswith(".json"):
        return SparseMlp(_read(text))
    try:
        number = float(value[:40])
    except ValueError:
        number = math.nan
    if name == "kl" and 0 < number <= 10:
        return SparseMlp(kl=number)
    if name == "keep" and 0 < number <= 1:
        return SparseMlp(keep=number)
    if name == "threshold" and 0 < number <= _MOST_THRESHOLD:
        return SparseMlp((number,))
    ranges = {"kl": "above 0 and at most 10 nats", "keep": "above 0 and at most 1",
              "threshold": f"above 0 and at most {_MOST_THRESHOLD:g}"}  # fmt: skip
    if name in ranges:
        raise RequestError(f"{name} of --sparse-mlp must be {ranges[name]}, not {value[:40]!r}")
    raise RequestError(f"--sparse-mlp takes {_HOW}, not {text[:40]!r}")


def _read(text: str) -> tuple[float, ...]:
    if not text.endswith(".json"):
        raise RequestError(f"--sparse-mlp takes {_HOW}, not {text[:40]!r}")
    try:
        with Path(text).open("rb") as stream:
            raw = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{text} cannot be read: {error.strerror or error}") from None
    try:
        data: Any = json.loads(raw) if len(raw) <= _MOST_BYTES else None
    except (ValueError, RecursionError):
        data = None
    found = data.get("thresholds") if isinstance(data, dict) else None
    if not isinstance(found, list) or not found:
        raise RequestError(f"{text} has no thresholds: it must be what calibrating wrote")
    for value in found:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= _MOST_THRESHOLD:
            raise RequestError(
                f"{text} has the threshold {str(value)[:40]}: each must be 0 to {_MOST_THRESHOLD:g}"
            )
    return tuple(map(float, found))


def sparse_mlps(spec: ModelSpec) -> tuple[int, ...]:
    """The layers whose MLP can be sparse: all but those of experts."""
    return tuple(i for i, layer in enumerate(spec.layers) if layer.mlp != "moe")


def has_mlp(spec: ModelSpec) -> None:
    """Raise RequestError where a model has no MLP that can be sparse."""
    if not sparse_mlps(spec):
        raise RequestError(
            f"{spec.name or spec.family} has experts in every layer: --sparse-mlp is for MLPs "
            "that every token goes through"
        )


def apply_sparse(spec: ModelSpec, asked: str | SparseMlp | Sequence[float]) -> ModelSpec:
    """A model whose MLPs' activations are zero below a threshold.

    Parameters
    ----------
    spec : ModelSpec
    asked : str, SparseMlp or sequence of float
        What `parse_sparse` takes, what it gives, or thresholds.

    Raises
    ------
    RequestError
        If the model has no such MLP, the thresholds are not one for each, or they have yet to be
        calibrated.
    """
    if isinstance(asked, str):
        asked = parse_sparse(asked)
    thresholds = asked.thresholds if isinstance(asked, SparseMlp) else tuple(map(float, asked))
    has_mlp(spec)
    layers = sparse_mlps(spec)
    if not thresholds:
        raise RequestError(
            "the thresholds of --sparse-mlp have not been calibrated: the command line does so, "
            "and says in which file they are"
        )
    if len(thresholds) == 1:
        thresholds *= len(layers)
    if len(thresholds) != len(layers):
        raise RequestError(
            f"{len(thresholds)} thresholds were given for {len(layers)} MLPs: they are another "
            "model's"
        )
    if not all(0 <= t <= _MOST_THRESHOLD for t in thresholds):
        raise RequestError(f"a threshold of an MLP must be 0 to {_MOST_THRESHOLD:g}")
    of = dict(zip(layers, thresholds, strict=True))
    changed = (replace(x, mlp_threshold=of.get(i, 0.0)) for i, x in enumerate(spec.layers))
    return replace(spec, layers=tuple(changed))
