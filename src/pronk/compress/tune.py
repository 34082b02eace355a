"""Scales and norms learnt end to end, so that the model predicts what its source does.

Codes stay as they are, and so do the formats: the second phase of EfficientQAT (Chen et al. 2024,
arXiv:2407.11062), here by the divergence from the source's own predictions. Layers run one at a
time, forwards and backwards, each once more from what it was given: memory holds one of them in
floats, codes of one byte a weight, and the values between layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.kinds import EMBEDDING
from pronk.checkpoint.storage import Storage
from pronk.compress.calibrate import batches
from pronk.compress.forward import Decoder, embedded
from pronk.compress.grid import Grid, from_blocks, refit, to_blocks
from pronk.compress.layers import read_floats
from pronk.errors import PronkError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Tuner"]

_LOGITS = 1 << 24  # that exist at a time
_BATCH = 2  # windows a step
_WARM = 0.05  # share of the steps in which the rate rises


@dataclass(slots=True)
class _Held:
    """A tensor of the compressed model and the factors of its scales, or of its elements."""

    factor: Tensor
    codes: Tensor | None = None  # int8 [rows, cols]
    grid: Grid | None = None
    vector: Tensor | None = None

    def values(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The weights as they are with their factors, float32; gradients pass to these."""
        factor = self.factor[rows]
        if self.vector is not None:
            return self.vector[rows] * factor
        if self.codes is None or self.grid is None:
            raise ValueError("there are neither codes nor a vector")
        codes = self.codes[rows].unflatten(1, (factor.shape[1], -1))
        out: Tensor = codes * self.grid.scale[rows][..., None]
        if self.grid.low is not None:
            out = out + self.grid.low[rows][..., None]
        out = (out * factor[..., None]).flatten(1)
        return out


class Tuner:
    """Tunes a compressed model; the same inputs give the same factors, cut short or not.

    Parameters
    ----------
    source, view : Checkpoint
        The model as it was, and what was made of it.
    decoder : Decoder
        In bfloat16 where the CPU multiplies that, it takes half the time.
    storages : Mapping
        Of the matrices of `view`. Those of whole numbers are tuned, and the vectors.
    windows : int64 [windows, tokens]
        Text to learn from.
    steps, rate, seed : int, float, int
        Steps of two windows each; the largest change of a factor in one; of the windows' order.
    """

    def __init__(
        self,
        source: Checkpoint,
        view: Checkpoint,
        decoder: Decoder,
        storages: Mapping[str, Storage],
        windows: NDArray[np.int64],
        *,
        steps: int,
        rate: float,
        seed: int,
    ) -> None:
        import torch

        self._view, self._decoder = view, decoder
        self._steps = steps
        self._layers = view.spec.num_layers
        self._held: dict[str, _Held] = {}
        names = [n for i in range(self._layers + 1) for n in decoder.names(i)]
        for name in dict.fromkeys(names):
            held = _hold(view, name, storages.get(name))
            if held is not None:
                self._held[name] = held
        self._adam = torch.optim.Adam(
            [held.factor for held in self._held.values()], lr=rate, betas=(0.9, 0.95)
        )
        self._rate = rate
        # What the source gives is not asked of windows that no step takes.
        used, self._order = np.unique(
            _order(len(windows), steps * _BATCH, seed), return_inverse=True
        )
        self._windows = windows[used]
        self._source, self._target = source, torch.empty(0)
        self.losses: list[float] = []

    def run(self, tell: Callable[[int, int], None], keep: Callable[[Tuner], None]) -> None:
        """Take the steps that are left.

        Parameters
        ----------
        tell : callable
            Called with the steps done and all steps.
        keep : callable
            Called with this every 16 steps, to keep `state`.
        """
        import torch

        tell(len(self.losses), self._steps)
        if len(self.losses) < self._steps:
            with torch.no_grad():
                self._target = self._ends()
        while len(self.losses) < self._steps:
            at = len(self.losses)
            self._adam.zero_grad()
            loss = self._step(self._order[at * _BATCH : (at + 1) * _BATCH])
            if not math.isfinite(loss):
                raise PronkError(
                    f"the loss is no longer finite at step {at + 1} of tuning: leave "
                    "--tune-scales out"
                )
            self.losses.append(loss)
            self._adam.param_groups[0]["lr"] = self._rate * self._share(at)
            self._adam.step()
            tell(len(self.losses), self._steps)
            if len(self.losses) % 16 == 0:
                keep(self)

    def _share(self, at: int) -> float:
        """Of the rate, at a step: it rises, and falls by a cosine to a twentieth."""
        warm = max(1, round(_WARM * self._steps))
        return min(1, (at + 1) / warm) * (0.525 + 0.475 * math.cos(math.pi * at / self._steps))

    def _ends(self) -> Tensor:
        """What the source's last layer gives for every window."""
        import torch

        x = embedded(self._source, self._decoder, self._windows)
        for layer in range(self._layers):
            weights = read_floats(self._source, self._decoder.names(layer))
            x = torch.cat([self._decoder.run(layer, p, weights) for _, p in batches(x)])
        return x

    def _weights(self, layer: int) -> dict[str, Tensor]:
        names = self._decoder.names(layer)
        plain = read_floats(self._view, [n for n in names if n not in self._held])
        return plain | {n: self._held[n].values() for n in names if n in self._held}

    def _step(self, drawn: NDArray[np.int64]) -> float:
        """The loss of some windows; gradients are left in the factors."""
        import torch

        ids = self._windows[drawn]
        table = self._held.get(EMBEDDING)
        inputs = []
        with torch.no_grad():
            if table is None:
                x = embedded(self._view, self._decoder, ids)
            else:
                x = self._decoder.embed(self._embedded(table, ids))
            for layer in range(self._layers):
                inputs.append(x)
                x = self._decoder.run(layer, x, self._weights(layer))
        loss, slope = self._head(x, self._target[torch.from_numpy(drawn)])
        for layer in reversed(range(self._layers)):
            given = inputs.pop().requires_grad_()
            self._decoder.run(layer, given, self._weights(layer)).backward(slope)
            if given.grad is None:
                raise ValueError("a layer does not depend on what it is given")
            slope = given.grad
        if table is not None:
            self._decoder.embed(self._embedded(table, ids)).backward(slope)
        return loss

    def _embedded(self, table: _Held, ids: NDArray[np.int64]) -> Tensor:
        import torch

        rows = table.values(torch.from_numpy(ids.reshape(-1)))
        return rows.reshape(*ids.shape, -1)

    def _head(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """Divergence of the predictions, and its slope by what the last layer gives."""
        import torch

        run, last = self._decoder.run, self._layers
        names = self._decoder.names(last)
        made = self._weights(last)
        with torch.no_grad():
            exact = read_floats(self._source, names)
        # Gradients gather in the floats, and pass from there to the factors once.
        leaves = {name: made[name].detach().requires_grad_() for name in names}
        flat = x.reshape(1, -1, x.shape[-1]).detach().requires_grad_()
        goal = target.reshape(1, -1, x.shape[-1])
        count = max(1, _LOGITS // self._view.spec.vocab_size)
        total = 0.0
        for mine, theirs in zip(flat.split(count, 1), goal.split(count, 1), strict=True):
            with torch.no_grad():
                p = run(last, theirs, exact).log_softmax(-1)
            q = run(last, mine, leaves).log_softmax(-1)
            part = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
            part = part / flat.shape[1]
            part.backward()
            total += float(part.detach())
        for name in names:
            slope = leaves[name].grad
            if made[name].requires_grad and slope is not None:
                made[name].backward(slope)
        if flat.grad is None:
            raise ValueError("the head does not depend on what it is given")
        return total, flat.grad.reshape(x.shape)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Factors and moments."""
        out = {}
        for name, held in self._held.items():
            out[name] = held.factor.detach().numpy()
            moments = self._adam.state[held.factor]
            for which in ("exp_avg", "exp_avg_sq"):
                out[f"{which}.{name}"] = moments[which].numpy()
        return out

    def resume(self, losses: list[float], state: Callable[[str], NDArray[Any]]) -> None:
        """Go on from a `state` that an earlier run kept, and its losses."""
        import torch

        self.losses = list(losses)
        for name, held in self._held.items():
            held.factor.data.copy_(torch.from_numpy(np.array(state(name))))
            self._adam.state[held.factor] = {
                "step": torch.tensor(float(len(losses))),
                **{
                    which: torch.from_numpy(np.array(state(f"{which}.{name}")))
                    for which in ("exp_avg", "exp_avg_sq")
                },
            }

    def made(self) -> dict[str, NDArray[Any]]:
        """The tuned tensors: rows of blocks, uint8; vectors, float32."""
        import torch

        out: dict[str, NDArray[Any]] = {}
        with torch.no_grad():
            for name, held in self._held.items():
                if held.codes is None or held.grid is None:
                    out[name] = held.values().numpy()
                else:
                    low = None if held.grid.low is None else held.grid.low * held.factor
                    grid = refit(held.grid, held.grid.scale * held.factor, low)
                    out[name] = to_blocks(held.codes.float(), grid)
        return out


def _hold(view: Checkpoint, name: str, storage: Storage | None) -> _Held | None:
    import torch

    info = view.tensors[name]
    if len(info.shape) == 1:
        vector = read_floats(view, [name])[name]
        return _Held(torch.ones_like(vector).requires_grad_(), vector=vector)
    if storage is None or storage.kind != "int":
        return None
    codes, grid = from_blocks(view.read_rows(name, 0, info.rows), storage, info.cols)
    return _Held(torch.ones_like(grid.scale).requires_grad_(), codes.to(torch.int8), grid)


def _order(windows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Windows in an order in which all come before any comes again."""
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(windows) for _ in range(-(-count // windows))]
    return np.concatenate(rounds)[:count]
