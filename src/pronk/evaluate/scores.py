"""What each token of a text costs each of several models, and how far they are from a reference.

One pass over the text serves them all: the reference is run once, however many are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.windows import LogitsModel, Window, log_normalizer, rows_at_a_time

__all__ = ["Scores", "score_window"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """A model on some tokens of a text, in their order.

    Attributes
    ----------
    nll : ndarray, float64 [tokens]
        Negative log-likelihood of each token, in nats.
    kl : ndarray, float64 [tokens]
        KL(reference || model) of the prediction of each, in nats; zeros without a reference.
    same : ndarray, bool [tokens]
        Whether the reference finds the same token the likeliest; all true without one.
    """

    nll: Floats
    kl: Floats
    same: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.nll)

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of parts of a text, one behind the other."""
        if not parts:
            return cls(np.empty(0), np.empty(0), np.empty(0, bool))
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in cls.__slots__))


class _Rows:
    """The logits of one window of one model, a few rows at a time."""

    def __init__(self, model: LogitsModel, window: Window) -> None:
        self._window = window
        self._left: NDArray[Any] | None = None
        parts = getattr(model, "logit_parts", None)
        # In parts, no window's logits are held at once, and those before `first` not computed.
        self._parts: Iterator[NDArray[Any]] = (
            iter([model.logits(window.ids)[window.first :]])
            if parts is None
            else parts(window.ids, window.first)
        )

    def take(self, count: int) -> Floats:
        """The next rows, float64 [count, vocabulary], the caller's to change."""
        got: list[NDArray[Any]] = []
        while count:
            if self._left is None or not len(self._left):
                self._left = next(self._parts, None)
                if self._left is None:
                    raise CheckpointError(
                        f"the model gave too few logits for {len(self._window.ids)} tokens"
                    )
                self._check(self._left)
            part, self._left = self._left[:count], self._left[count:]
            got.append(part.astype(np.float64))
            count -= len(part)
        return got[0] if len(got) == 1 else np.concatenate(got)

    def _check(self, logits: NDArray[Any]) -> None:
        targets = self._window.targets
        if logits.ndim != 2:
            raise CheckpointError(f"the model gave logits of shape {logits.shape}")
        if max(targets) >= logits.shape[1] or min(targets) < 0:
            raise CheckpointError(
                f"the text has token {max(targets)}, and the model's vocabulary ends at "
                f"{logits.shape[1] - 1}: its tokenizer is another model's"
            )


def score_window(
    window: Window, models: Sequence[LogitsModel], reference: LogitsModel | None = None
) -> list[Scores]:
    """Score the targets of one window with every model.

    Memory: some 16 MB, and the logits that a model gives at once.

    Parameters
    ----------
    window : Window
    models : sequence of LogitsModel
        One that also has ``logit_parts`` is asked for its logits in parts. The same object may
        come more than once, and be the reference too: it is run once.
    reference : LogitsModel, optional
        What the predictions are compared with.

    Returns
    -------
    list of Scores
        One a model.

    Raises
    ------
    RequestError
        If the vocabularies of the reference and a model differ in size.
    CheckpointError
        If logits are missing, not finite, or cannot score a target.
    """
    everyone = {id(m): m for m in (*models, *(() if reference is None else (reference,)))}
    rows = {key: _Rows(model, window) for key, model in everyone.items()}
    found: dict[int, list[Scores]] = {key: [] for key in everyone}
    # The vocabulary is not known before the first row is.
    at, step = 0, 1
    while at < len(window.targets):
        targets = np.asarray(window.targets[at : at + step], np.int64)
        picked = (np.arange(len(targets)), targets)
        p: _Expected | None = None
        if reference is not None:
            p = _Expected(rows[id(reference)].take(len(targets)), picked)
            found[id(reference)].append(p.scores)
        for key, one in rows.items():
            if reference is not None and key == id(reference):
                continue
            x = one.take(len(targets))
            vocabulary = x.shape[1]
            found[key].append(_plain(x, picked) if p is None else p.against(x))
        at += len(targets)
        step = rows_at_a_time(vocabulary if p is None else p.log.shape[1])
    return [Scores.join(found[id(model)]) for model in models]


def _plain(x: Floats, picked: tuple[NDArray[Any], ...]) -> Scores:
    nll = log_normalizer(x) - x[picked]
    return Scores(nll, np.zeros(len(nll)), np.ones(len(nll), bool))


class _Expected:
    """What the reference predicts for some tokens."""

    def __init__(self, x: Floats, picked: tuple[NDArray[Any], ...]) -> None:
        self._picked = picked
        self.scores = _plain(x, picked)
        self._best = x.argmax(axis=1)
        x -= log_normalizer(x)[:, None]
        self.log, self._p = x, np.exp(x)
        # A token that the reference rules out (-inf) adds nothing: 0 log 0 = 0.
        self._impossible = None if np.isfinite(x).all() else ~np.isfinite(x)

    def against(self, x: Floats) -> Scores:
        """The scores of a model by its logits, which are overwritten."""
        if x.shape != self.log.shape:
            raise RequestError(
                f"the reference has {self.log.shape[1]} tokens in its vocabulary and the model "
                f"{x.shape[1]}: only models of one vocabulary can be compared"
            )
        same = x.argmax(axis=1) == self._best
        x -= log_normalizer(x)[:, None]
        nll = -x[self._picked]
        if self._impossible is None:
            np.subtract(self.log, x, out=x)
        else:
            np.subtract(self.log, x, out=x, where=~self._impossible)
            x[self._impossible] = 0
        kl = np.einsum("ij,ij->i", self._p, x)
        # Rounding can leave a sum of equal distributions a hair below zero.
        return Scores(nll, np.maximum(kl, 0), same)
