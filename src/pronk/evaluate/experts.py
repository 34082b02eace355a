"""How evenly a mixture's tokens spread over its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ExpertLoad", "expert_load", "format_load"]


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """What the experts of a model were chosen.

    Attributes
    ----------
    per_token : float
        Mean number of experts that a token went to in a layer.
    loads : ndarray, float64 [layers, experts]
        Share of a layer's choices that fell on each; a layer's shares add up to 1.
    entropies : ndarray, float64 [layers]
        Entropy of the shares in bits; at most log2 of the experts, where all are chosen alike.
    """

    per_token: float
    loads: NDArray[np.float64]
    entropies: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """Plain data under stable names."""
        return {
            "per_token": self.per_token,
            "experts": self.loads.shape[1],
            "entropy": float(self.entropies.mean()),
            "most_entropy": float(np.log2(self.loads.shape[1])),
            "layers": [
                {"load": load.tolist(), "entropy": float(entropy)}
                for load, entropy in zip(self.loads, self.entropies, strict=True)
            ],
        }


def expert_load(counts: NDArray[np.uint64], per_token: float) -> ExpertLoad:
    """Shares and entropies of counts, [layers, experts], of a model that has run some tokens."""
    loads = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    logs = np.log2(loads, out=np.zeros_like(loads), where=loads > 0)
    return ExpertLoad(per_token, loads, np.maximum(-(loads * logs).sum(1), 0.0))


def format_load(load: ExpertLoad, shown: int = 8) -> list[str]:
    """Lines for people: the busiest experts of each layer, their shares, and the entropy."""
    experts = load.loads.shape[1]
    lines = [
        f"experts: {load.per_token:.2f} of {experts} a token; entropy "
        f"{load.entropies.mean():.2f} of {np.log2(experts):.2f} bits"
    ]
    for i, (shares, entropy) in enumerate(zip(load.loads, load.entropies, strict=True)):
        order = np.argsort(-shares, kind="stable")[:shown]
        parts = " ".join(f"{expert}: {shares[expert]:.1%}" for expert in order)
        more = " ..." if experts > shown else ""
        lines.append(f"  layer {i:3}  {entropy:5.2f} bits  {parts}{more}")
    return lines
