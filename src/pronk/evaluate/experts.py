"""How evenly a mixture's tokens spread over its experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.spec import SamplingParams
from pronk.units import format_bytes

__all__ = ["ExpertLoad", "Traffic", "expert_load", "expert_traffic", "format_load"]


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


class _Model(Protocol):
    def generate(self, prompt: list[int], params: SamplingParams, /) -> Iterator[Any]: ...
    def expert_reads(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a prompt and its answer read of experts that were not in memory.

    Attributes
    ----------
    prompt, answer : ExpertReads
    """

    prompt: Any
    answer: Any

    def to_dict(self) -> dict[str, Any]:
        """Plain data under stable names."""
        return {"prompt": self.prompt.to_dict(), "answer": self.answer.to_dict()}

    def format(self) -> str:
        """A line for people."""
        prompt, answer = self.prompt, self.answer
        return (
            f"expert memory: {answer.slots} of {answer.experts} in {format_bytes(answer.memory)}; "
            f"answers find {answer.hit_rate:.1%} there and read "
            f"{format_bytes(round(answer.read_per_token))} a token, prompts {prompt.hit_rate:.1%} "
            f"and {format_bytes(round(prompt.read_per_token))}"
        )


def expert_traffic(model: _Model, prompt: Sequence[int], tokens: int) -> Traffic:
    """Have a model answer once, and tell what it reads of experts before and after its first token.

    Parameters
    ----------
    model : object with ``generate(ids, params)`` and ``expert_reads()``
    prompt : sequence of int
    tokens : int
        Tokens of the answer.
    """
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = model.expert_reads()
    pieces = model.generate(list(prompt), params)
    next(pieces)
    first = model.expert_reads()
    for _ in pieces:
        pass
    return Traffic(first.since(start), model.expert_reads().since(first))


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
