"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass

from pronk.engine.blocks import Holding
from pronk.engine.sampler import Sample, Sampler
from pronk.engine.speculate import Lookup
from pronk.errors import PronkError
from pronk.spec import SamplingParams

__all__ = ["Event", "Request"]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what has been generated from it, and the KV blocks it holds.

    ``tokens`` is prompt and output; the first ``computed`` of them have keys and values in the
    cache.
    """

    id: int
    tokens: list[int]
    max_length: int
    params: SamplingParams
    sampler: Sampler
    holding: Holding
    session: str | None = None
    lookup: Lookup | None = None
    computed: int = 0

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Event:
    """A generated token, or the end of a request, or both.

    ``finish_reason`` is None while it goes on, else ``"stop"`` (an end token), ``"length"``, or
    ``"error"``: then there is no sample, and ``error`` says why.
    """

    request_id: int
    sample: Sample | None
    finish_reason: str | None
    error: PronkError | None = None
