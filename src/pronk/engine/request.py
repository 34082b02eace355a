"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.engine.blocks import Holding
from pronk.engine.sampler import Keep, Sample, Sampler
from pronk.engine.speculate import Lookup
from pronk.errors import PronkError
from pronk.spec import SamplingParams

__all__ = ["Constraint", "Event", "Request"]


class Constraint(Protocol):
    """What a request's tokens must keep to, such as a grammar. It follows the tokens drawn.

    The engine asks on its own thread, and for one request never twice at a time. What a call
    raises ends the request with an error.
    """

    def mask(self) -> NDArray[Any]:
        """The tokens that may come next: bool [vocab], or 32 a word from the lowest bit on.

        Words are int32 or uint32, as ``llguidance`` and ``xgrammar`` fill them.
        """

    def accept(self, token: int) -> None:
        """Go on by a token that was drawn, an end token included."""

    def valid(self, tokens: list[int]) -> int:
        """How many of these tokens may come next, one after the other; changes nothing."""


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what has been generated from it, and the KV blocks it holds.

    ``tokens`` is prompt and output; the first ``computed`` of them have keys and values in the
    cache. ``cached`` of the prompt's were there before. A request without a sampler asks for the
    sum of its tokens' last hidden states, ``hidden``. Those of lower ``rank`` go first.
    ``preempted`` and ``told`` say whether it ever was, and whether any token was told of it.
    ``added`` and ``begun`` are when it was queued and when it first ran (`time.perf_counter`).
    """

    id: int
    tokens: list[int]
    max_length: int
    params: SamplingParams
    sampler: Sampler | None
    holding: Holding
    priority: int = 0
    session: str | None = None
    lookup: Lookup | None = None
    constraint: Constraint | None = None
    hidden: NDArray[np.float64] | None = None
    computed: int = 0
    cached: int = 0
    rank: tuple[int, int] = (0, 0)
    preempted: bool = False
    told: bool = False
    added: float = 0.0
    begun: float = 0.0

    @property
    def keep(self) -> Keep | None:
        """Which logits of a row its sampler needs; None: all, as where a constraint takes some."""
        return None if self.sampler is None or self.constraint else self.sampler.keep

    @property
    def waited(self) -> float:
        """Seconds in line before its first step."""
        return max(0.0, self.begun - self.added)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Event:
    """A generated token, or the end of a request, or both.

    Parameters
    ----------
    request_id : int
    sample : Sample or None
        The token, unless the request ended without one.
    finish_reason : str or None
        None while it goes on, else ``"stop"`` (an end token), ``"length"``, ``"abort"``, or
        ``"error"``: then there is no sample, and ``error`` says why.
    error : PronkError or None
    cached_tokens : int
        Tokens of the prompt whose keys and values were there before the request.
    embedding : ndarray, float32 [hidden size], or None
        What a request for an embedding ends with.
    waited : float
        Seconds that the request stood in line before its first step.
    """

    request_id: int
    sample: Sample | None
    finish_reason: str | None
    error: PronkError | None = None
    cached_tokens: int = 0
    embedding: NDArray[np.float32] | None = None
    waited: float = 0.0
