"""One layer, or the output head, compressed by a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize
from pronk.checkpoint.kinds import tensor_kind
from pronk.checkpoint.storage import Storage
from pronk.compress.calibrate import Inputs, batches
from pronk.compress.fold import fold_layer
from pronk.compress.forward import Decoder
from pronk.compress.gptq import damped, gptq, output_error
from pronk.compress.grid import Grid, fit_grid, round_floats, to_blocks
from pronk.compress.recipes import Recipe
from pronk.compress.signround import sign_round
from pronk.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Made",
    "compress_layer",
    "compress_matrix",
    "compress_plainly",
    "is_matrix",
    "meet",
    "read_floats",
]

_ROWS = 1 << 13  # rows of a matrix in float32 at a time, where no calibration needs them all


@dataclass(slots=True)
class Made:
    """What a step gives.

    Attributes
    ----------
    blocks : dict
        Rows of blocks of each matrix, uint8 [rows, row bytes]; changed vectors, float32.
    dtypes : dict of str
        Of each.
    errors : dict
        By matrix, ``weights``: relative RMS difference of the weights; ``outputs``: relative
        mean square of the difference of outputs on calibration text, where there is one.
    """

    blocks: dict[str, NDArray[Any]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def read_floats(ckpt: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint in float32, vectors as such.

    Raises
    ------
    CheckpointError
        If one holds values that are not finite.
    """
    import torch

    out = {}
    for name in names:
        values = torch.from_numpy(ckpt.read_float(name))
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"{name} of {ckpt.path} holds values that are not finite: the checkpoint is damaged"
            )
        out[name] = values if len(ckpt.tensors[name].shape) > 1 else values.reshape(-1)
    return out


def compress_matrix(
    weight: Tensor, storage: Storage, recipe: Recipe, met: Inputs | None
) -> tuple[NDArray[np.uint8], dict[str, float]]:
    """Blocks of one matrix, and its errors; `met` is what it is multiplied with, if known."""
    if storage.kind not in ("int", "k"):
        blocks = round_floats(weight.numpy(), storage)
        return blocks, _errors(weight, blocks, storage, met)
    if recipe.method in ("gptq", "signround") and met is not None:
        made = gptq(
            weight, met.hessian, storage,
            act_order=recipe.act_order, damping=recipe.damping, sweeps=recipe.sweeps,
        )  # fmt: skip
        blocks = to_blocks(*made)
    else:
        importance = None
        if met is not None and recipe.method == "imatrix":
            importance = damped(met.hessian, recipe.damping).diagonal()
        grid = fit_grid(weight, storage, importance, search=recipe.method != "rtn")
        blocks = to_blocks(grid.codes(weight), grid)
    return blocks, _errors(weight, blocks, storage, met)


def _floats(blocks: NDArray[np.uint8], storage: Storage, cols: int) -> Tensor:
    import torch

    return torch.from_numpy(dequantize(blocks, storage.blocks, cols))


def _errors(
    weight: Tensor, blocks: NDArray[np.uint8], storage: Storage, met: Inputs | None
) -> dict[str, float]:
    lost = _floats(blocks, storage, weight.shape[1]) - weight
    norm = float(weight.square().sum())
    out = {"weights": float(lost.square().sum() / norm) ** 0.5 if norm else 0.0}
    if met is not None:
        whole = output_error(weight, met.hessian)
        out["outputs"] = output_error(lost, met.hessian) / whole if whole else 0.0
    return out


def compress_plainly(
    ckpt: Checkpoint, name: str, storage: Storage, recipe: Recipe, made: Made, met: Inputs | None
) -> None:
    """Compress a matrix a few rows at a time: each row by itself."""
    info = ckpt.tensors[name]
    if storage.holds(info.dtype):
        keep(ckpt, name, made)
        return
    parts = []
    sums = np.zeros(2)
    outputs = np.zeros(2)
    for at in range(0, info.rows, _ROWS):
        stop = min(at + _ROWS, info.rows)
        weight = _rows(ckpt, name, at, stop)
        blocks, _ = compress_matrix(weight, storage, recipe, met)
        lost = _floats(blocks, storage, info.cols) - weight
        sums += float(lost.square().sum()), float(weight.square().sum())
        if met is not None:
            outputs += output_error(lost, met.hessian), output_error(weight, met.hessian)
        parts.append(blocks)
    made.blocks[name], made.dtypes[name] = np.concatenate(parts), storage.blocks
    made.errors[name] = {"weights": float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0}
    if met is not None:
        made.errors[name]["outputs"] = float(outputs[0] / outputs[1]) if outputs[1] else 0.0


def keep(ckpt: Checkpoint, name: str, made: Made) -> None:
    """Take a matrix as it is: it is stored in its format already."""
    info = ckpt.tensors[name]
    made.blocks[name], made.dtypes[name] = ckpt.read_rows(name, 0, info.rows), info.dtype
    made.errors[name] = {"weights": 0.0}


def _rows(ckpt: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    import torch

    values = ckpt.read_float(name, start, stop)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{name} of {ckpt.path} holds values that are not finite: the checkpoint is damaged"
        )
    return torch.from_numpy(values)


def compress_layer(
    ckpt: Checkpoint,
    decoder: Decoder,
    layer: int,
    x: Tensor,
    recipe: Recipe,
    storages: Mapping[str, Storage],
    seed: int,
) -> tuple[Made, Tensor]:
    """Compress a layer on what the compressed layers before it give; and what it gives itself.

    Parameters
    ----------
    ckpt : Checkpoint
    decoder : Decoder
    layer : int
    x : float32 [windows, tokens, hidden]
    recipe : Recipe
    storages : Mapping
        By matrix.
    seed : int
    """
    import torch

    made = Made()
    weights = read_floats(ckpt, decoder.names(layer))
    stages = decoder.matrices(layer)
    with torch.no_grad():
        if recipe.fold:
            met = meet(decoder, layer, x, weights, [stage[0] for stage in stages])
            vectors = [name for name in weights if weights[name].ndim == 1]
            fold_layer(recipe.fold, decoder, layer, weights, met, storages.__getitem__)
            made.blocks |= {name: weights[name].numpy() for name in vectors}
            made.dtypes |= dict.fromkeys(vectors, "f32")
    exact = dict(weights)
    learnt: dict[str, tuple[Tensor, Grid]] = {}
    if recipe.method == "signround":
        grids = {n: fit_grid(weights[n], s) for n, s in storages.items() if n in weights
                 and s.kind == "int" and not s.holds(ckpt.tensors[n].dtype)}  # fmt: skip
        learnt = sign_round(decoder, layer, x, exact, grids, steps=recipe.steps, seed=seed)
    with torch.no_grad():
        for stage in stages:
            met = meet(decoder, layer, x, weights, [stage[0]])
            for name in stage:
                storage = storages[name]
                if storage.holds(ckpt.tensors[name].dtype) and not recipe.fold:
                    keep(ckpt, name, made)
                    continue
                if name in learnt:
                    blocks = to_blocks(*learnt[name])
                    errors = _errors(exact[name], blocks, storage, met[stage[0]])
                else:
                    blocks, errors = compress_matrix(exact[name], storage, recipe, met[stage[0]])
                made.blocks[name], made.dtypes[name] = blocks, storage.blocks
                made.errors[name] = errors
                weights[name] = _floats(blocks, storage, exact[name].shape[1])
        out = torch.empty_like(x)
        for at, part in batches(x):
            out[at] = decoder.run(layer, part, weights)
    return made, out


def meet(
    decoder: Decoder, layer: int, x: Tensor, weights: Mapping[str, Tensor], names: list[str]
) -> dict[str, Inputs]:
    """What the matrices `names`, each the first of its stage, are multiplied with."""
    met = {name: Inputs(weights[name].shape[1]) for name in names}

    def look(name: str, inputs: Tensor) -> None:
        if name in met:
            met[name].add(inputs)

    for _, part in batches(x):
        decoder.run(layer, part, weights, look, until=names[-1])
    return met


def is_matrix(ckpt: Checkpoint, name: str) -> bool:
    """Whether a tensor is one that recipes give a format."""
    return tensor_kind(name) is not None and len(ckpt.tensors[name].shape) == 2
