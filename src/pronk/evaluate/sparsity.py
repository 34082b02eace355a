"""How many of an MLP's activations are zero, and thresholds that make them so within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.errors import RequestError
from pronk.evaluate.divergence import mean_divergence

__all__ = ["Activity", "Calibration", "activity", "calibrate", "format_sparse"]

_STEPS = 7  # of the search: the share of zeros is found to 1 %


@dataclass(frozen=True, slots=True)
class Activity:
    """What the inputs of ``down`` were, over all tokens that ran.

    Attributes
    ----------
    zeros : tuple of float
        Share of them that were zero, by MLP.
    zero_groups : tuple of float
        Share of the groups of 32 neighbours that were zero throughout: what a lone token need
        not read of ``down``.
    """

    zeros: tuple[float, ...]
    zero_groups: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data under stable names."""
        return {
            "skipped": float(np.mean(self.zeros)),
            "skipped_groups": float(np.mean(self.zero_groups)),
            "layers": [
                {"skipped": zeros, "skipped_groups": groups}
                for zeros, groups in zip(self.zeros, self.zero_groups, strict=True)
            ],
        }


def activity(counts: NDArray[np.uint64]) -> Activity:
    """Shares from counts, [MLPs, magnitudes + 2], as `Model.activity` gives them."""
    values = np.maximum(counts[:, :-2].sum(1), 1)
    groups = np.maximum(counts[:, -2], 1)
    return Activity(
        tuple((counts[:, 0] / values).tolist()), tuple((counts[:, -1] / groups).tolist())
    )


class _Model(Protocol):
    def logits(self, ids: Sequence[int], /, *, last: int) -> NDArray[Any]:
        """Next-token logits at the last positions, float32 [last, vocabulary]."""

    def set_thresholds(self, thresholds: Sequence[float], /) -> None:
        """Below which magnitude each MLP's activations are zero."""

    def watch(self, on: bool = True, /) -> None:
        """Count activations from now on."""

    def activity(self) -> NDArray[np.uint64]:
        """Counts by MLP: of each magnitude, of groups, and of groups that are zero."""

    def magnitudes(self) -> NDArray[np.float32]:
        """The least magnitude of each bin."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds by MLP, the share of activations that are then zero, and what that changes.

    ``kl`` is KL(as it is || sparse), in nats a token, on the text it was calibrated on.
    """

    thresholds: tuple[float, ...]
    skipped: float
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data under stable names."""
        return {"thresholds": list(self.thresholds), "skipped": self.skipped, "kl": self.kl}


def calibrate(
    model: _Model,
    ids: Sequence[int],
    rows: int,
    *,
    kl: float = 0.0,
    keep: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Thresholds that leave every MLP the same share of its activations (arXiv:2408.14690).

    Which share, `keep` says, or it is the least whose divergence is within `kl`, found by
    bisection. The model's thresholds are changed on the way, and left as they were found.

    Parameters
    ----------
    model : model
        Without thresholds.
    ids : sequence of int
        A text.
    rows : int
        How many of its last positions are compared.
    kl : float
        Nats a token, on this text.
    keep : float
        Range (0, 1]; where it is not 0, `kl` does not count.
    progress : callable, optional
        Called with the runs done and the runs to do.

    Raises
    ------
    RequestError
        If the text is shorter than two tokens or than `rows`.
    """
    if not 1 <= rows < len(ids):
        raise RequestError(f"a text of {len(ids)} tokens is too short to calibrate on")
    runs = 2 if keep else _STEPS + 2
    model.watch()
    expected = model.logits(ids, last=rows)
    counts, edges = model.activity()[:, :-2], model.magnitudes()
    below = np.cumsum(counts, 1) / np.maximum(counts.sum(1, keepdims=True), 1)

    def thresholds(share: float) -> tuple[float, ...]:
        """The upper edge of the last bin that is within the share."""
        bins = (below <= share).sum(1)
        return tuple(float(edges[b]) for b in bins.tolist())

    def measure(run: int, share: float) -> float:
        model.set_thresholds(thresholds(share))
        model.watch()
        found = mean_divergence(expected, model.logits(ids, last=rows))
        if progress is not None:
            progress(run, runs)
        return found

    low, high = (1 - keep, 1.0) if keep else (0.0, 1.0)
    for step in range(0 if keep else _STEPS):
        middle = (low + high) / 2
        if measure(step + 2, middle) <= kl:
            low = middle
        else:
            high = middle
    found = measure(runs, low)
    shares = activity(model.activity())
    model.watch(False)
    return Calibration(thresholds(low), float(np.mean(shares.zeros)), found)


def format_sparse(sparse: Mapping[str, Any]) -> list[str]:
    """The lines of a table, from what ``pronk bench --json`` calls ``sparse``."""
    lines = [
        f"sparse MLPs: {sparse['skipped']:.1%} of the activations zero, "
        f"{sparse['skipped_groups']:.1%} of the groups of 32; without and with, in turns:"
    ]
    for key in ("prefill", "decode"):
        speed = sparse[key]
        lines.append(
            f"  {key:<12} {speed['without']:8.1f} {speed['with']:8.1f} tokens/s, "
            f"ratio {speed['ratio']:.3f}"
        )
    return lines
