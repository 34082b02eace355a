"""What every checkpoint reader offers: a spec, named tensors, and their rows on demand."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.blocks import BLOCK_SIZES, dequantize
from pronk.errors import CheckpointError
from pronk.spec import Budget, ModelSpec

if TYPE_CHECKING:
    from pronk.checkpoint.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "Span",
    "TensorInfo",
    "row_bytes",
]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as `Checkpoint.read_rows` returns it: row-major, ``dtype`` in GGUF layout."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def rows(self) -> int:
        """Number of rows; a 1-D tensor is one row."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Elements in a row."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a tensor in a file, one after the other and as `Checkpoint.read_rows` gives them.

    Parameters
    ----------
    fd : int
        The open file.
    offset : int
        Its first byte.
    pairs : int
        Rows of a head, where the file alternates between the rows of its two halves; else 0.
    """

    fd: int
    offset: int
    pairs: int = 0


def row_bytes(dtype: str, cols: int) -> int:
    """Bytes of one row of `cols` elements stored as `dtype`.

    Raises
    ------
    CheckpointError
        If the dtype is unknown or `cols` is no multiple of its block.
    """
    size = BLOCK_SIZES.get(dtype)
    if size is None:
        raise CheckpointError(f"tensor type {dtype!r} is not one that Pronk can read")
    block, nbytes = size
    if cols % block:
        raise CheckpointError(
            f"a row of {cols} elements is no multiple of the {dtype} block {block}"
        )
    return cols // block * nbytes


class Checkpoint(abc.ABC):
    """An open model file: its header has been read and checked, its tensors have not.

    Attributes
    ----------
    path : Path
        The file or directory.
    spec : ModelSpec
        The model it holds.
    tensors : Mapping[str, TensorInfo]
        Every tensor of the model under its Hugging Face name.
    format : {"gguf", "safetensors", "bundle"}
        What was opened.
    budget : Budget or None
        What a bundle was fitted to.
    """

    path: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorInfo]
    format: str
    budget: Budget | None = None

    @property
    def files(self) -> tuple[int, ...]:
        """Descriptors of the files that hold the tensors."""
        return ()

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows ``start:stop`` of a tensor as uint8 [stop - start, row_bytes], read afresh."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor named {name!r}")
        if not 0 <= start <= stop <= info.rows:
            raise ValueError(f"rows {start}:{stop} of {name} are out of range 0:{info.rows}")
        return self._read(info, start, stop)

    def read_float(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``start:stop`` of a tensor, dequantized to float32 [rows, cols]."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor named {name!r}")
        rows = self.read_rows(name, start, info.rows if stop is None else stop)
        return dequantize(rows, info.dtype, info.cols)

    def span(self, name: str) -> Span | None:
        """Where a tensor's rows can be read from as they are; None if they have to be made."""
        return None

    @abc.abstractmethod
    def _read(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        """Read checked rows of one tensor."""

    @abc.abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the open files; reading afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
