"""How fast a model answers, by the definitions of MLPerf Client."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pronk.errors import RequestError
from pronk.spec import SamplingParams

__all__ = ["Latency", "check_sizes", "latency", "turned"]


class _Generator(Protocol):
    def generate(self, prompt: list[int], params: SamplingParams, /) -> Iterator[Any]: ...


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians over runs.

    Attributes
    ----------
    ttft : float
        Time to first token: seconds from the request to the first token.
    decode : float
        Tokens a second after the first: ``(n - 1) / (time of the last - time of the first)``.
    prefill : float
        Prompt tokens over the time to first token.
    prompt_tokens, tokens, runs : int
        Sizes of a run, and how many were measured.
    """

    ttft: float
    decode: float
    prefill: float
    prompt_tokens: int
    tokens: int
    runs: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain data under stable names."""
        return {
            "ttft": self.ttft,
            "decode": self.decode,
            "prefill": self.prefill,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "runs": self.runs,
        }


def check_sizes(prompt: Sequence[int], tokens: int, runs: int, warmup: int) -> None:
    """Raise RequestError unless so much can be measured."""
    if not prompt:
        raise RequestError("the prompt to measure with is empty")
    if tokens < 2 or runs < 1 or warmup < 0:
        raise RequestError("measuring needs at least 2 tokens and 1 run")


def turned(prompt: Sequence[int], run: int) -> list[int]:
    """The prompt of a run: all but its first token turned by one more place.

    So no two runs share more than that token, and a prefix cache cannot help.
    """
    first, rest = list(prompt[:1]), list(prompt[1:])
    turn = run % len(rest) if rest else 0
    return [*first, *rest[turn:], *rest[:turn]]


def latency(
    model: _Generator,
    prompt: Sequence[int],
    tokens: int = 128,
    runs: int = 3,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Generate `tokens` tokens greedily, past any end of sequence, and time them.

    Each run has a prompt of its own (`turned`).

    Parameters
    ----------
    model : object with ``generate(ids, params)``
        Yields one object per token.
    prompt : sequence of int
        Token ids; at least one.
    tokens, runs, warmup : int
        Tokens to generate (at least 2), runs to measure, and runs before those.
    clock : callable
        Seconds.

    Raises
    ------
    RequestError
        If a size is out of range, or the model stops before `tokens` tokens.
    """
    check_sizes(prompt, tokens, runs, warmup)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    ttft, decode = [], []
    for run in range(warmup + runs):
        stamps = []
        start = clock()
        for _ in model.generate(turned(prompt, run), params):
            stamps.append(clock())
        if len(stamps) < tokens:
            raise RequestError(
                f"the model stopped after {len(stamps)} of {tokens} tokens: give a longer context"
            )
        if run >= warmup:
            ttft.append(stamps[0] - start)
            decode.append((len(stamps) - 1) / max(stamps[-1] - stamps[0], 1e-9))
    middle = statistics.median(ttft)
    return Latency(
        ttft=middle,
        decode=statistics.median(decode),
        prefill=len(prompt) / max(middle, 1e-9),
        prompt_tokens=len(prompt),
        tokens=tokens,
        runs=runs,
    )
