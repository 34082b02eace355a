"""Which layers must attend to everything: those whose windows change the predictions most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.windows import log_normalizer, rows_at_a_time

__all__ = ["choose_global", "window_divergence"]


class _Model(Protocol):
    def logits(self, ids: Sequence[int], /, *, last: int) -> NDArray[Any]:
        """Next-token logits at the last positions, float32 [last, vocabulary]."""


def window_divergence(
    reference: _Model,
    windowed: Callable[[int], AbstractContextManager[_Model]],
    layers: Iterable[int],
    ids: Sequence[int],
    rows: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """What a window on each layer alone does to the predictions at the end of a text.

    Parameters
    ----------
    reference : model
        Without the windows.
    windowed : callable
        A layer to the model whose window is on that layer alone, as a context manager.
    layers : iterable of int
    ids : sequence of int
        A text longer than the window.
    rows : int
        How many of its last positions are compared.
    progress : callable, optional
        Called with the layers measured and the layers to measure.

    Returns
    -------
    dict
        By layer, KL(reference || windowed) in nats a token.
    """
    expected = reference.logits(ids, last=rows)
    every = list(layers)
    found: dict[int, float] = {}
    for layer in every:
        with windowed(layer) as model:
            found[layer] = _divergence(expected, model.logits(ids, last=rows))
        if progress is not None:
            progress(len(found), len(every))
    return found


def choose_global(divergence: dict[int, float], count: int) -> tuple[int, ...]:
    """The layers whose windows do most harm, in the order of the model.

    Raises
    ------
    RequestError
        If there are fewer.
    """
    if count > len(divergence):
        raise RequestError(
            f"the attention policy keeps {count} layers global, but only {len(divergence)} could "
            "get its window"
        )
    worst = sorted(divergence, key=lambda layer: (-divergence[layer], layer))[:count]
    return tuple(sorted(worst))


def _divergence(expected: NDArray[Any], got: NDArray[Any]) -> float:
    if expected.shape != got.shape:
        raise CheckpointError(f"logits of shapes {expected.shape} and {got.shape} were compared")
    total, step = 0.0, rows_at_a_time(expected.shape[1])
    for at in range(0, len(expected), step):
        p = expected[at : at + step].astype(np.float64)
        q = got[at : at + step].astype(np.float64)
        p -= log_normalizer(p)[:, None]
        q -= log_normalizer(q)[:, None]
        # A token that the reference rules out (-inf) adds nothing: 0 log 0 = 0.
        possible = np.isfinite(p)
        total += float((np.exp(p[possible]) * (p[possible] - q[possible])).sum())
    return max(0.0, total / len(expected))
