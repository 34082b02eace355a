"""Rounding learnt by sign gradients: what a layer gives is kept, not what one matrix gives.

SignRound (Cheng et al. 2023, arXiv:2309.05516), the method of AutoRound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pronk.compress.forward import Decoder
from pronk.compress.grid import Grid, code_range

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sign_round"]

_WINDOWS = 2  # windows a step


def sign_round(
    decoder: Decoder,
    layer: int,
    x: Tensor,
    weights: Mapping[str, Tensor],
    grids: Mapping[str, Grid],
    *,
    steps: int,
    seed: int,
) -> dict[str, tuple[Tensor, Grid]]:
    """Codes and grids of a layer's matrices, of least error in what the layer gives.

    A shift of each weight before it is rounded, within half a code, and a factor of each
    scale are learnt; each step goes by the sign of its gradient, less far each time.

    Parameters
    ----------
    decoder, layer
    x : float32 [windows, tokens, hidden]
        What the layer is given.
    weights : Mapping
        Its exact float32 tensors.
    grids : Mapping
        Where to start, for each matrix to round.
    steps, seed : int
        Steps, and the seed of the windows drawn for each.
    """
    import torch

    if not grids:
        return {}
    order = torch.Generator().manual_seed(seed)
    shift = {name: torch.zeros_like(weights[name], requires_grad=True) for name in grids}
    factor = {name: torch.ones_like(grid.scale, requires_grad=True) for name, grid in grids.items()}
    with torch.no_grad():
        target = torch.cat([decoder.run(layer, part, weights) for part in x.split(_WINDOWS)])
    for step in range(steps):
        drawn = torch.randperm(len(x), generator=order)[:_WINDOWS]
        rounded = dict(weights)
        for name, grid in grids.items():
            rounded[name] = _soft(weights[name], grid, shift[name], factor[name])
        out = decoder.run(layer, x[drawn], rounded)
        loss = (out - target[drawn]).square().mean() / target[drawn].square().mean()
        loss.backward()
        reach = 0.5 / steps * 4 * (1 - step / steps)
        with torch.no_grad():
            for name in grids:
                for part, least, most, far in (
                    (shift[name], -0.5, 0.5, reach),
                    (factor[name], 0.7, 1.2, reach / 10),
                ):
                    if part.grad is not None:
                        part -= far * part.grad.sign()
                        part.clamp_(least, most)
                        part.grad = None
    out_codes = {}
    with torch.no_grad():
        for name, grid in grids.items():
            settled = Grid(grid.storage, (grid.scale * factor[name]).half().float(), grid.low)
            scale, low = settled.wide(weights[name].shape[1])
            moved = weights[name] if low is None else weights[name] - low
            safe = torch.where(scale == 0, torch.ones_like(scale), scale)
            codes = (moved / safe + shift[name]).round().clamp(*code_range(grid.storage))
            out_codes[name] = torch.where(scale == 0, torch.zeros_like(codes), codes), settled
    return out_codes


def _soft(weight: Tensor, grid: Grid, shift: Tensor, factor: Tensor) -> Tensor:
    """The rounded weight, whose gradient passes through the rounding."""
    import torch

    wide = Grid(grid.storage, grid.scale * factor, grid.low)
    scale, low = wide.wide(weight.shape[1])
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    x = (weight if low is None else weight - low) / safe + shift
    codes = x + (x.round() - x).detach()
    codes = codes.clamp(*code_range(grid.storage))
    return codes * scale if low is None else codes * scale + low
