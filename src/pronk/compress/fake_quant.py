"""Quantization-aware training: weights that are rounded in every forward pass, and their grid.

The grid is what Pronk's blocks hold: whole codes times a float16 scale a group. torchao 0.18 runs
with torch 2.13 too, but its fake quantization takes float32 scales from each group's maximum,
which is neither a grid that the blocks can store exactly nor a good one at 3 bits. So the rounding
is a straight-through estimator (Bengio et al. 2013, arXiv:1308.3432) with learned scales (LSQ,
arXiv:1902.08153), written here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.kinds import KINDS
from pronk.compress.quantize import quantize_tensor
from pronk.errors import RequestError
from pronk.graph.pack import GROUP

__all__ = ["Grid", "GridBlocks", "attach", "codes_of", "fit_scales", "parse_grid"]

_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"
_LEAST_SCALE = 2.0**-14  # of float16's normal numbers


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes of `bits` from ``-2**(bits - 1)`` on, times a float16 scale for `group` columns."""

    bits: int
    group: int

    def __str__(self) -> str:
        return f"int{self.bits}-g{self.group}"

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The highest."""
        return (1 << self.bits - 1) - 1

    @property
    def dtype(self) -> str:
        """The blocks of 32 that hold the codes as they are."""
        return "q4_0" if self.bits <= 4 else "q8_0"

    @property
    def bits_a_weight(self) -> float:
        """Bits of a weight if the codes were packed as tightly as they can be."""
        return self.bits + 16 / self.group


def parse_grid(text: str) -> Grid:
    """A grid such as ``int3-g64``.

    Raises
    ------
    RequestError
        If it is not of 2, 3, 4 or 8 bits in groups of a multiple of 32.
    """
    match = re.fullmatch(r"int([2348])-g([0-9]{1,5})", text, re.ASCII)
    if match is None or int(match[2]) % GROUP or match[2].startswith("0"):
        raise RequestError(
            f"--format {text[:40]} is not int2, int3, int4 or int8 in groups of a multiple of "
            f"{GROUP}, such as int3-g64"
        )
    return Grid(int(match[1]), int(match[2]))


def fit_scales(weight: Any, grid: Grid, clip: bool = True) -> Any:
    """The scale of each group, as float32 that float16 holds.

    Parameters
    ----------
    weight : float32 [rows, columns]
    grid : Grid
    clip : bool
        Search the scale of least squared error, of either sign, since there is a code more on
        one side; without, the largest value decides, and nothing is clipped.

    Returns
    -------
    float32 [rows, columns / group]
    """
    import torch

    groups = weight.reshape(weight.shape[0], -1, grid.group)
    if not clip:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        return _storable(largest / grid.low)
    top = groups.abs().amax(-1) / -grid.low
    best = torch.full_like(top, torch.inf)
    out = torch.zeros_like(top)
    for share in torch.linspace(0.4, 1.2, 17).tolist():
        for sign in (1, -1):
            scale = _storable(top * (share * sign))
            made = (groups / scale[..., None]).round_().clamp_(grid.low, grid.high)
            error = made.mul_(scale[..., None]).sub_(groups).square_().sum(-1)
            better = error < best
            best, out = torch.where(better, error, best), torch.where(better, scale, out)
    return out


def _storable(scale: Any) -> Any:
    """A scale as float16 holds it, and not zero."""
    import torch

    sign = torch.where(scale < 0, -1.0, 1.0)
    return sign * scale.abs().clamp(_LEAST_SCALE, 65504.0).half().float()


def codes_of(weight: Any, scale: Any, grid: Grid) -> Any:
    """The codes of a matrix, float32 [rows, groups, group]; `scale` is used as it is stored."""
    groups = weight.reshape(*scale.shape, grid.group)
    return (groups / _storable(scale)[..., None]).round().clamp(grid.low, grid.high)


def _module(grid: Grid, scale: Any) -> Any:
    import torch

    class Round(torch.autograd.Function):
        # Only weight and scales are kept for the way back: all between is as large as the model.
        @staticmethod
        def forward(ctx: Any, weight: Any, scale: Any) -> Any:
            ctx.save_for_backward(weight, scale)
            held = _storable(scale)[..., None]
            return (codes_of(weight, scale, grid) * held).reshape(weight.shape)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> tuple[Any, Any]:
            weight, scale = ctx.saved_tensors
            grad = grad.reshape(*scale.shape, grid.group)
            groups = weight.reshape(grad.shape) / _storable(scale)[..., None]
            inside = (groups >= grid.low) & (groups <= grid.high)
            # d(code * scale) / d(scale): the code, less what moving the weight would undo.
            slope = groups.clamp(grid.low, grid.high).round_()
            slope = torch.where(inside, slope - groups, slope)
            return (grad * inside).reshape(weight.shape), (grad * slope).sum(-1)

    rounded: Any = Round.apply

    class Rounded(torch.nn.Module):
        """A weight on its grid; gradients pass to the weight and to the scales."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(scale)

        def forward(self, weight: Any) -> Any:
            return rounded(weight, self.scale)

    return Rounded()


def attach(model: Any, grid: Grid, clip: bool = True) -> list[str]:
    """Put the linear modules of all layers on a grid; the names of their weights.

    Only they and their scales are trained from then on. Embedding and head are rounded to q8_0,
    as the bundle will hold them, so that training sees all of the loss.

    Raises
    ------
    RequestError
        If the groups do not divide the rows.
    """
    import torch
    from torch.nn.utils import parametrize

    for weight in model.parameters():
        weight.requires_grad_(False)
    with torch.no_grad():
        tables = {model.model.embed_tokens.weight, model.lm_head.weight}
        for table in tables:
            blocks = quantize(table.numpy(), "q8_0")
            table.copy_(torch.from_numpy(dequantize(blocks, "q8_0", table.shape[1])))
    names = []
    for i, layer in enumerate(model.model.layers):
        for part in _LINEAR:
            module = layer.get_submodule(part)
            if module.in_features % grid.group:
                raise RequestError(
                    f"groups of {grid.group} do not divide the {module.in_features} columns of "
                    f"{part}: give --format with another group"
                )
            module.weight.requires_grad_(True)
            scale = fit_scales(module.weight.detach(), grid, clip)
            parametrize.register_parametrization(module, "weight", _module(grid, scale))
            names.append(f"model.layers.{i}.{part}.weight")
    return names


class GridBlocks:
    """The blocks of a model that `attach` prepared, for a bundle's writer.

    Matrices with a grid come as their codes and scales, bit for bit; the rest is rounded.
    """

    def __init__(self, model: Any, grid: Grid) -> None:
        self._model, self._grid = model, grid
        self.formats = {kind: "q8_0" if kind == "head" else grid.dtype for kind in KINDS}

    def __call__(
        self, ckpt: Checkpoint, name: str, dtype: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield ``(first row, blocks)`` of a tensor."""
        module = self._model.get_submodule(name.removesuffix(".weight"))
        if not hasattr(module, "parametrizations"):
            return quantize_tensor(ckpt, name, dtype)
        held = module.parametrizations.weight
        scale = held[0].scale.detach()
        codes = codes_of(held.original.detach(), scale, self._grid)
        codes = codes.reshape(len(codes), -1).numpy().astype(np.int8)
        repeats = self._grid.group // GROUP
        scales = np.repeat(_storable(scale).numpy().astype(np.float16), repeats, axis=1)
        return iter([(0, _blocks(codes, scales, dtype))])


def _blocks(codes: NDArray[np.int8], scales: NDArray[np.float16], dtype: str) -> NDArray[np.uint8]:
    """Blocks uint8 [rows, row bytes] of codes [rows, columns], a scale for each 32."""
    rows, groups = scales.shape
    parts = codes.reshape(rows, groups, GROUP)
    if dtype == "q8_0":
        values = parts.view(np.uint8)
    else:
        nibbles = (parts + np.int8(8)).view(np.uint8)
        values = nibbles[:, :, :16] | (nibbles[:, :, 16:] << np.uint8(4))
    heads = scales.reshape(rows, groups, 1).view(np.uint8)
    return np.concatenate([heads, values], axis=2).reshape(rows, -1)
