"""Round-to-nearest quantization of a checkpoint's tensors, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.kinds import tensor_kind
from pronk.checkpoint.loss import ErrorSum, square
from pronk.errors import CheckpointError

__all__ = ["RoundToNearest", "quantize_tensor"]

# Float32 bytes of the rows in flight; quantizing holds about three more arrays of this size.
CHUNK_BYTES = 2 << 20


class RoundToNearest:
    """`quantize_tensor` as a bundle's writer calls it, adding up the error by tensor kind."""

    def __init__(self) -> None:
        self._sums: dict[str, ErrorSum] = {}

    def __call__(
        self, ckpt: Checkpoint, name: str, dtype: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield ``(first row, blocks)`` of a tensor."""
        total = self._sums.setdefault(tensor_kind(name) or name, ErrorSum())
        return quantize_tensor(ckpt, name, dtype, total)

    @property
    def errors(self) -> dict[str, float]:
        """Relative RMS error by tensor kind, of the tensors quantized so far."""
        return {kind: total.relative_rms for kind, total in self._sums.items()}


def quantize_tensor(
    ckpt: Checkpoint, name: str, dtype: str, error: ErrorSum | None = None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield ``(first row, blocks)`` of a tensor as `dtype`, in row order, in bounded memory.

    A tensor the checkpoint already holds as `dtype` passes through bit for bit.

    Parameters
    ----------
    ckpt : Checkpoint
        Where the tensor is.
    name : str
        Its canonical name.
    dtype : str
        A native dtype, such as ``"q4_1"``.
    error : ErrorSum, optional
        Receives the squared error against the checkpoint's own values.

    Raises
    ------
    CheckpointError
        If the tensor is missing, holds values that are not finite, or has rows that
        `dtype` cannot group or whose scale it cannot hold.
    """
    info = ckpt.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{ckpt.path} has no tensor named {name!r}")
    rows, cols = math.prod(info.shape[:-1]), info.shape[-1]
    step = max(1, CHUNK_BYTES // (4 * cols))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        blocks = ckpt.read_rows(name, start, stop)
        values = dequantize(blocks, info.dtype, cols)
        norm = square(values)
        if not math.isfinite(norm):
            raise CheckpointError(
                f"{name} of {ckpt.path} holds values that are not finite, in rows {start} to "
                f"{stop}: the checkpoint is damaged"
            )
        lost = 0.0
        if info.dtype != dtype:
            blocks = quantize(values, dtype)
            difference = dequantize(blocks, dtype, cols)
            difference -= values
            lost = square(difference)
            if not math.isfinite(lost):
                raise CheckpointError(
                    f"{name} of {ckpt.path} holds values too large for {dtype}, in rows "
                    f"{start} to {stop}"
                )
        if error is not None:
            error.error += lost
            error.norm += norm
        yield start, blocks
