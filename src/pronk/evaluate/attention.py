"""Which layers must attend to everything: those whose windows change the predictions most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from numpy.typing import NDArray

from pronk.errors import RequestError
from pronk.evaluate.divergence import mean_divergence

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
            found[layer] = mean_divergence(expected, model.logits(ids, last=rows))
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
