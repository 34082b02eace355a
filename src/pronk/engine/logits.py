"""Logits of one sequence, beside the requests that an engine runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pronk.engine.runner import Runner
from pronk.engine.scheduler import Scheduler
from pronk.errors import RequestError

__all__ = ["check_tokens", "run_logits"]


def check_tokens(tokens: Sequence[int], vocab: int) -> None:
    """Raise RequestError for an empty prompt or an id outside the vocabulary."""
    if not tokens:
        raise RequestError("the prompt is empty: give at least one token")
    for token in tokens:
        if not 0 <= token < vocab:
            raise RequestError(f"token id {token} is not in the vocabulary of {vocab}")


def run_logits(
    runner: Runner,
    scheduler: Scheduler,
    context: int,
    tokens: Sequence[int],
    first: int,
    endings: Iterable[Sequence[int]] | None,
) -> Iterator[NDArray[np.float32]]:
    """What `Engine.logits` gives; the cache that it needs is freed when it ends.

    Raises
    ------
    RequestError
        If requests hold the cache, or an ending does not fit.
    """
    kv, at_once = scheduler.kv, scheduler.max_tokens
    holding = kv.hold()
    most = len(tokens) if endings is None else min(len(tokens) + at_once, context)
    while not kv.promise(holding, most):
        if not scheduler.reclaim():
            raise RequestError("the KV pool is in use by running requests: wait for them to end")

    def run(part: Sequence[int], start: int) -> NDArray[np.float32]:
        n = len(part)
        positions = list(range(start, start + n))
        rows = list(range(max(0, first - start), n))
        kv.move(holding, start, start + n)
        return runner.step(list(part), positions, [0] * n, [holding.blocks], rows)

    try:
        for start in range(0, len(tokens), at_once):
            logits = run(tokens[start : start + at_once], start)
            if len(logits):
                yield logits
        for ending in endings or ():
            check_tokens(ending, runner.program.spec.vocab_size)
            if len(ending) > most - len(tokens):
                raise RequestError(
                    f"{len(ending)} tokens after {len(tokens)} do not fit a step of {at_once} "
                    f"or the context of {context}"
                )
            yield run(ending, len(tokens))  # over the keys and values of the ending before
    finally:
        kv.release(holding)
