"""Scales of activations folded into weights, so that nothing changes until these are rounded.

AWQ (Lin et al. 2023, arXiv:2306.00978) scales up the columns that meet large inputs, by the
power of their size that lowers the output error most. SmoothQuant (Xiao et al. 2022,
arXiv:2211.10438) evens out the ranges of inputs and weights. The inverse goes into the norm
before, or the rows of the up projection: the checkpoint stays an ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pronk.checkpoint.storage import Storage
from pronk.compress.calibrate import Inputs
from pronk.compress.forward import Decoder
from pronk.compress.gptq import output_error
from pronk.compress.grid import fit_grid

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fold_layer"]

_POWERS = 11
_BALANCE = 0.5  # SmoothQuant's alpha


def fold_layer(
    how: str,
    decoder: Decoder,
    layer: int,
    weights: dict[str, Tensor],
    inputs: Mapping[str, Inputs],
    storage: Callable[[str], Storage],
) -> dict[str, float]:
    """Scale a layer's weights in place; how much each stage's inputs were scaled at most.

    Parameters
    ----------
    how : {"awq", "smooth"}
    decoder, layer
    weights : dict of str to float32 tensors
    inputs : Mapping
        Those of each stage's first matrix; divided as the weights are multiplied.
    storage : callable
        Of a matrix by its name.
    """
    out = {}
    for stage in decoder.matrices(layer):
        before = decoder.scaled_by(layer, stage[0])
        if before is None or any(storage(name).kind != "int" for name in stage):
            continue
        met = inputs[stage[0]]
        scale = (_awq if how == "awq" else _smooth)(
            [(weights[name], storage(name)) for name in stage], met
        )
        for name in stage:
            weights[name] = weights[name] * scale
        for name in before:
            part = weights[name]
            weights[name] = part / (scale if part.ndim == 1 else scale[:, None])
        met.divide(scale)
        out[stage[0]] = float(scale.max())
    return out


def _awq(matrices: list[tuple[Tensor, Storage]], met: Inputs) -> Tensor:
    import torch

    mean, hessian = met.mean.clamp_min(1e-8), met.hessian
    best, least = torch.ones_like(mean), float("inf")
    for power in torch.linspace(0, 1, _POWERS).tolist():
        scale = mean**power
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        error = 0.0
        for weight, storage in matrices:
            grid = fit_grid(weight * scale, storage, search=False)
            rounded = grid.values(grid.codes(weight * scale)) / scale
            error += output_error(rounded - weight, hessian)
        if error < least:
            best, least = scale, error
    return best


def _smooth(matrices: list[tuple[Tensor, Storage]], met: Inputs) -> Tensor:
    import torch

    top = torch.stack([weight.abs().amax(0) for weight, _ in matrices]).amax(0)
    scale = met.largest.clamp_min(1e-5) ** _BALANCE / top.clamp_min(1e-5) ** (1 - _BALANCE)
    return (scale / scale.log().mean().exp()).clamp(1e-3, 1e3)
