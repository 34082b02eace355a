"""The next token from a row of logits: small steps, NumPy only, ids only.

The order is: what a constraint forbids, logit bias, repetition, presence and frequency penalties,
(log-probabilities are taken here), temperature, top-k, top-p, min-p, draw. Among equal logits the
lowest id comes first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pronk.errors import PronkError, RequestError
from pronk.spec import SamplingParams

__all__ = ["MOST_KEPT", "Keep", "Sample", "Sampler"]

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

# Below this, every other token's probability is zero in float32 anyway.
_MIN_TEMPERATURE = 1e-30
_FIRST_NUCLEUS = 64
MOST_KEPT = 64


class Keep(NamedTuple):
    """Which logits of a row count: those that may be among the `most` largest, and within `span`.

    Parameters
    ----------
    most : int
        At most `MOST_KEPT`; 0 means any number.
    span : float
        Of the largest logit.
    """

    most: int
    span: float = math.inf


@dataclass(frozen=True, slots=True)
class Sample:
    """One chosen token.

    Parameters
    ----------
    token : int
        Its id.
    logprob : float or None
        Natural logarithm of its probability after bias and penalties, before temperature
        and truncation; None unless asked for.
    top_logprobs : tuple of (int, float)
        The most likely tokens under the same distribution, best first.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Candidates(NamedTuple):
    """Tokens still in play: ids and their logits, in the same order."""

    ids: Ids
    logits: Floats


class Counts:
    """How often each token was seen, as arrays that grow by one token in constant time."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one more occurrence of `token`."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token
        self._counts[slot] += 1

    @property
    def ids(self) -> Ids:
        """The distinct tokens."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Floats:
        """How often each of `ids` was seen."""
        return self._counts[: len(self._slots)]


@lru_cache(maxsize=4)  # a server may run several models
def all_ids(vocab_size: int) -> Ids:
    """The whole vocabulary; kept, for every step of every sequence starts from it. Read-only."""
    ids = np.arange(vocab_size, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def forbid(logits: Floats, mask: NDArray[Any]) -> Floats:
    """A copy with minus infinity where `mask` is false: bool [vocab], or bits of 32-bit words."""
    if mask.dtype != np.bool_:
        words = np.ascontiguousarray(mask, "<u4" if mask.dtype.kind == "u" else "<i4")
        mask = np.unpackbits(words.reshape(-1).view(np.uint8), bitorder="little").view(np.bool_)
    if len(mask) < len(logits):
        raise PronkError(f"a constraint's mask has {len(mask)} tokens, not {len(logits)}")
    return np.where(mask[: len(logits)], logits, np.float32(-np.inf))


def add_bias(logits: Floats, ids: Ids, bias: Floats) -> None:
    """Add `bias` to the logits of `ids`, in place."""
    logits[ids] += bias


def penalize_repetition(logits: Floats, seen: Ids, penalty: float) -> None:
    """Divide positive and multiply negative logits of `seen` tokens, in place."""
    values = logits[seen]
    scale = np.float32(penalty)
    logits[seen] = np.where(values > 0, values / scale, values * scale)


def penalize_generated(logits: Floats, counts: Counts, presence: float, frequency: float) -> None:
    """Subtract ``presence + frequency * count`` from generated tokens' logits, in place."""
    logits[counts.ids] -= np.float32(presence) + np.float32(frequency) * counts.counts


def log_total(logits: Floats) -> float:
    """The logarithm of the sum of exponentials: what a logit less this is, is a logprob."""
    peak = logits.max()
    return float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))


def scale_by_temperature(logits: Floats, peak: float, temperature: float) -> Floats:
    """``(logits - peak) / temperature``, a new array whose largest element is 0."""
    scaled = logits - np.float32(peak)
    with np.errstate(over="ignore"):
        scaled /= np.float32(max(temperature, _MIN_TEMPERATURE))
    return scaled


def keep_top_k(candidates: Candidates, k: int) -> Candidates:
    """The `k` most likely candidates, best first; the lower id first among equals."""
    ids, logits = candidates
    if k < len(logits):
        cut = len(logits) - k
        kept = np.flatnonzero(logits >= np.partition(logits, cut)[cut])
        ids, logits = ids[kept], logits[kept]
    order = np.lexsort((ids, -logits))[:k]
    return Candidates(ids[order], logits[order])


def keep_top_p(candidates: Candidates, top_p: float) -> Candidates:
    """The smallest set of most likely candidates whose probability reaches `top_p`, best first."""
    logits = candidates.logits
    peak = logits.max()
    target = top_p * float(np.exp(logits - peak).sum(dtype=np.float64))
    width = _FIRST_NUCLEUS
    # Most nuclei are small: look among a few before sorting the whole vocabulary.
    while True:
        head = keep_top_k(candidates, min(width, len(logits)))
        mass = np.cumsum(np.exp(head.logits - peak), dtype=np.float64)
        if mass[-1] >= target or width >= len(logits):
            break
        width *= 16
    size = int(np.searchsorted(mass, target)) + 1
    return Candidates(head.ids[:size], head.logits[:size])


def keep_min_p(candidates: Candidates, min_p: float) -> Candidates:
    """The candidates at least `min_p` times as likely as the most likely one."""
    ids, logits = candidates
    kept = logits >= logits.max() + np.float32(math.log(min_p))
    return Candidates(ids[kept], logits[kept])


def draw(candidates: Candidates, uniform: float) -> int:
    """The candidate at `uniform` (in [0, 1)) of the cumulative distribution."""
    ids, logits = candidates
    cumulative = np.cumsum(np.exp(logits - logits.max()), dtype=np.float64)
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])


class Sampler:
    """Chooses the tokens of one sequence.

    Parameters
    ----------
    params : SamplingParams
        How to choose.
    prompt : sequence of int
        The prompt's token ids; they count for the repetition penalty.
    vocab_size : int
        Length of every row of logits.

    Raises
    ------
    RequestError
        If a biased or a prompt token is not in the vocabulary.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self._vocab_size = vocab_size
        self._bias = _bias_arrays(params.logit_bias, vocab_size)
        self._random = random.Random(params.seed)
        self._generated = Counts()
        self._counts_generated = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._seen: Counts | None = None
        if params.repetition_penalty != 1:
            if any(not 0 <= token < vocab_size for token in prompt):
                raise RequestError(f"the prompt has a token id outside 0 to {vocab_size - 1}")
            self._seen = Counts(prompt)
        self._adjusts = bool(
            params.logit_bias or self._counts_generated or params.repetition_penalty != 1
        )

    @property
    def keep(self) -> Keep | None:
        """Which logits `sample` needs; it may have minus infinity for others. None: all."""
        params = self.params
        if self._adjusts or params.logprobs is not None:
            return None
        if params.temperature == 0:
            return Keep(1)
        if params.top_k > MOST_KEPT or (params.top_p < 1 and not params.top_k):
            return None
        span = math.inf
        if params.min_p > 0 and params.top_p == 1:  # a nucleus is a share of what min-p drops too
            span = -math.log(params.min_p) * params.temperature
        return Keep(params.top_k, span) if params.top_k or span < math.inf else None

    def sample(self, logits: Floats, mask: NDArray[Any] | None = None) -> Sample:
        """Choose the next token.

        Parameters
        ----------
        logits : ndarray of float32, shape (vocab_size,)
            The model's output for the last token, at least what `keep` says. Not modified.
        mask : ndarray, optional
            The tokens that may be chosen: bool [vocab_size], or bits of 32-bit words.

        Returns
        -------
        Sample
            The chosen token, and log-probabilities if asked for.

        Raises
        ------
        PronkError
            If the logits hold not-a-number or infinity, or leave no token to choose.
        """
        if logits.shape != (self._vocab_size,):
            raise PronkError(
                f"the model gave logits of shape {logits.shape}, not ({self._vocab_size},)"
            )
        params = self.params
        if mask is not None:
            logits = forbid(logits, mask)
        if self._adjusts:
            logits = self._adjusted(logits)
        # argmax stops at a not-a-number, so looking at the best logit is enough.
        best = int(logits.argmax())
        peak = float(logits[best])
        if mask is not None and peak == -math.inf:
            raise RequestError("the constraint leaves no token to choose")
        if not math.isfinite(peak):
            raise PronkError(
                f"the model gave a logit of {peak} at token {best}: the checkpoint is damaged "
                "or its numbers overflow"
            )
        token = best if params.temperature == 0 else self._drawn(logits, peak)
        if self._seen is not None:
            self._seen.add(token)
        if self._counts_generated:
            self._generated.add(token)
        if params.logprobs is None:
            return Sample(token)
        return self._with_logprobs(logits, token, params.logprobs)

    def _adjusted(self, logits: Floats) -> Floats:
        logits = np.array(logits, np.float32)
        if self._bias is not None:
            add_bias(logits, *self._bias)
        if self._seen is not None:
            penalize_repetition(logits, self._seen.ids, self.params.repetition_penalty)
        if self._counts_generated:
            penalize_generated(
                logits, self._generated, self.params.presence_penalty, self.params.frequency_penalty
            )
        return logits

    def _drawn(self, logits: Floats, peak: float) -> int:
        params = self.params
        scaled = scale_by_temperature(logits, peak, params.temperature)
        candidates = Candidates(all_ids(self._vocab_size), scaled)
        if params.top_k:
            candidates = keep_top_k(candidates, min(params.top_k, self._vocab_size))
        if params.top_p < 1:
            candidates = keep_top_p(candidates, params.top_p)
        if params.min_p > 0:
            candidates = keep_min_p(candidates, params.min_p)
        return draw(candidates, self._random.random())

    def _with_logprobs(self, logits: Floats, token: int, best: int) -> Sample:
        total = log_total(logits)
        top: tuple[tuple[int, float], ...] = ()
        if best:
            everything = Candidates(all_ids(len(logits)), logits)
            head = keep_top_k(everything, min(best, len(logits)))
            top = tuple(
                (int(i), float(value) - total)
                for i, value in zip(head.ids, head.logits, strict=True)
                if value > -math.inf
            )
        return Sample(token, float(logits[token]) - total, top)


def _bias_arrays(bias: Mapping[int, float], vocab_size: int) -> tuple[Ids, Floats] | None:
    if not bias:
        return None
    outside = [token for token in bias if not 0 <= token < vocab_size]
    if outside:
        raise RequestError(
            f"logit_bias names token {outside[0]}, but the model's tokens are 0 to {vocab_size - 1}"
        )
    return np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float32)
