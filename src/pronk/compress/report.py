"""What a compression has written, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pronk.compress.recipes import Recipe

__all__ = ["CompressReport"]


@dataclass(frozen=True, slots=True)
class CompressReport:
    """What was written, and what it cost.

    ``errors`` holds, by matrix, the relative RMS difference of its weights and, where there was
    calibration text, the relative mean square of that of its outputs. ``prediction`` holds, of
    automatic bits, ``kl`` as predicted and ``measured_kl``, both on calibration text; ``tuning``
    the mean loss of the first and the last steps. Sizes in bytes.
    """

    source: str
    output: str
    recipe: Recipe
    group: str
    formats: Mapping[str, str]
    weight_bytes: int
    weights: int
    errors: Mapping[str, Mapping[str, float]]
    provenance: Mapping[str, Any]
    seconds: float
    prediction: Mapping[str, float] | None = None
    sensitivity: Mapping[str, Mapping[str, float]] | None = None
    tuning: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data under stable names, for ``--json``."""
        return {
            "source": self.source,
            "output": self.output,
            "recipe": self.recipe.name,
            "group_size": self.group,
            "weight_bytes": self.weight_bytes,
            "weights": self.weights,
            "bytes_per_weight": self.weight_bytes / self.weights,
            "formats": dict(self.formats),
            "errors": {name: dict(error) for name, error in self.errors.items()},
            **self.provenance,
            **self.learnt,
            "seconds": self.seconds,
        }

    @property
    def learnt(self) -> dict[str, Any]:
        """What was found on the way, where the recipe looks for it."""
        found = {
            "prediction": self.prediction,
            "sensitivity": self.sensitivity,
            "tuning": self.tuning,
        }
        return {name: dict(value) for name, value in found.items() if value}
