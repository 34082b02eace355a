"""GPTQ: columns rounded one by one, each error made up for by the columns still to come.

Frantar et al. 2022, arXiv:2210.17323. What it leaves is then lowered by coordinate descent
(QuantEase, Behdin et al. 2023, arXiv:2309.01885) in turn with scales by least squares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pronk.checkpoint.storage import Storage
from pronk.compress.grid import Grid, fit_grid, nearest, refit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["damped", "gptq", "output_error"]

_BLOCK = 128  # columns whose errors are spread at once
_ROWS = 1 << 13  # rows at a time


def damped(hessian: Tensor, share: float) -> Tensor:
    """The Hessian with a share of its mean diagonal added; columns that nothing met get one."""
    import torch

    diagonal = hessian.diagonal()
    extra = share * diagonal.mean().clamp_min(1e-12)
    return hessian + torch.diag(torch.where(diagonal == 0, torch.ones_like(diagonal), extra))


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Mean squared change of the outputs, summed over rows: trace of ``D H D^T``."""
    return float(((difference @ hessian) * difference).sum())


def gptq(
    weight: Tensor,
    hessian: Tensor,
    storage: Storage,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    sweeps: int = 2,
) -> tuple[Tensor, Grid]:
    """Codes and their grid for a weight, given what it is multiplied with.

    Groups keep their place whatever the order (static groups), so no index is stored.

    Parameters
    ----------
    weight : float32 [rows, cols]
    hessian : float32 [cols, cols]
        Mean of ``x x^T`` over calibration tokens.
    storage : Storage
        Of whole numbers.
    act_order : bool
        Columns of the largest inputs first.
    damping : float
        Share of the mean diagonal that is added to it.
    sweeps : int
        Rounds of coordinate descent after it, each with scales fitted anew before.

    Returns
    -------
    codes : float32 [rows, cols]
    grid : Grid
    """
    import torch

    h = damped(hessian, damping)
    cols = weight.shape[1]
    order = torch.arange(cols)
    if act_order:
        order = h.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(h[order][:, order].double())
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    grid = fit_grid(weight, storage, importance=h.diagonal())
    codes = torch.empty_like(weight)
    scales = []
    for at in range(0, len(weight), _ROWS):
        some = slice(at, at + _ROWS)
        part = grid.rows(some)
        codes[some] = _compensate(weight[some], part, factor, order)
        for _ in range(sweeps):
            if part.low is None and part.upper is None:
                part = refit(part, _scales(weight[some], codes[some], part, h))
            codes[some] = _descend(weight[some], codes[some], part, h)
        scales.append(part.scale)
    return codes, replace(grid, scale=torch.cat(scales))


def _columns(grid: Grid, cols: int) -> tuple[Tensor, Tensor | None]:
    """Scale and low of each column of every row, [cols, rows]."""
    size = cols // grid.scale.shape[1]
    low = None if grid.low is None else grid.low.T.repeat_interleave(size, 0)
    return grid.scale.T.repeat_interleave(size, 0), low


def _compensate(weight: Tensor, grid: Grid, factor: Tensor, order: Tensor) -> Tensor:
    import torch

    # Columns lie in memory one after the other: they are gone through one by one.
    w = weight.T[order]
    scale, low = _columns(grid, len(w))
    codes = torch.empty_like(w)
    for begin in range(0, len(w), _BLOCK):
        end = min(begin + _BLOCK, len(w))
        errors = torch.empty(end - begin, w.shape[1])
        for j in range(begin, end):
            at = order[j]
            s, m = scale[at], None if low is None else low[at]
            q = nearest(w[j], s, m, grid.storage)
            codes[at] = q
            value = q * s if m is None else q * s + m
            error = torch.div(w[j] - value, factor[j, j], out=errors[j - begin])
            w[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return codes.T


def _descend(weight: Tensor, codes: Tensor, grid: Grid, h: Tensor) -> Tensor:
    """One round of coordinate descent on the output error, column by column."""
    import torch

    scale, low = _columns(grid, weight.shape[1])
    codes = codes.T.contiguous()
    values = codes * scale if low is None else codes * scale + low
    slope = h @ (weight.T - values)
    for begin in range(0, len(codes), _BLOCK):
        end = min(begin + _BLOCK, len(codes))
        moved = torch.empty(end - begin, codes.shape[1])
        for j in range(begin, end):
            target = values[j] + slope[j] / h[j, j]
            s, m = scale[j], None if low is None else low[j]
            q = nearest(target, s, m, grid.storage)
            step = torch.mul(q - codes[j], s, out=moved[j - begin])
            codes[j] = q
            slope[j:end].addr_(h[j, j:end], step, alpha=-1)
        slope[end:].addmm_(h[begin:end, end:].T, moved, alpha=-1)
    return codes.T


def _scales(weight: Tensor, codes: Tensor, grid: Grid, h: Tensor) -> Tensor:
    """Scales of least output error for these codes, all groups of a row at once."""
    import torch

    rows, cols = weight.shape
    groups = grid.scale.shape[1]
    size = cols // groups
    normal = torch.empty(rows, groups, groups)
    for g in range(groups):
        some = slice(g * size, (g + 1) * size)
        normal[:, g] = (codes[:, some] @ h[some] * codes).unflatten(1, (groups, size)).sum(2)
    target = ((weight @ h) * codes).unflatten(1, (groups, size)).sum(2)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    # A group of zeros keeps its scale; the rest lean on theirs a little, for float32's sake.
    lean = torch.where(diagonal > 0, 1e-5 * diagonal, torch.ones_like(diagonal))
    solved = torch.linalg.solve(normal + torch.diag_embed(lean), target + lean * grid.scale)
    return torch.where(torch.isfinite(solved) & (diagonal > 0), solved, grid.scale)
