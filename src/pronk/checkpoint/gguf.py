"""GGUF files as checkpoints: llama.cpp's names and row order to Hugging Face's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.arrange import arrange, check_tensors
from pronk.checkpoint.base import Checkpoint, Span, TensorInfo
from pronk.checkpoint.blocks import BLOCK_SIZES
from pronk.checkpoint.gguf_config import ROPE_TENSORS, read_family, read_spec
from pronk.checkpoint.gguf_header import GgufHeader, read_header
from pronk.checkpoint.io import open_file, read_exact
from pronk.checkpoint.rows import Tensor
from pronk.errors import CheckpointError

if TYPE_CHECKING:
    from pronk.checkpoint.tokenizer import Tokenizer

__all__ = ["GgufCheckpoint"]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as it lies in the file; a matrix for each of its last but one dimensions."""

    fd: int
    path: Path
    offset: int
    width: int

    def rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows of blocks, uint8 [stop - start, bytes a row]."""
        width = self.width
        raw = read_exact(self.fd, self.offset + start * width, (stop - start) * width, self.path)
        return raw.reshape(stop - start, width)

    def span(self) -> Span:
        """Where it lies."""
        return Span(self.fd, self.offset)


class GgufCheckpoint(Checkpoint):
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = "gguf"
        self._fd, _ = open_file(path)
        try:
            self.header = read_header(self._fd, path)
            family = read_family(self.header)
            self.spec = read_spec(self.header, family)
            self._sources = arrange(path, family, self.spec, _tensors(self.header), gguf=True)
            self.tensors = MappingProxyType({n: info for n, (info, _) in self._sources.items()})
            check_tensors(path, self.spec, self.tensors)
        except BaseException:
            self.close()
            raise

    def _read(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        return self._sources[info.name][1].rows(start, stop)

    def span(self, name: str) -> Span | None:
        """Where a tensor lies; None for a vector whose elements change places."""
        return self._sources[name][1].span()

    @property
    def files(self) -> tuple[int, ...]:
        """The one file."""
        return (self._fd,)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer the metadata describes."""
        from pronk.checkpoint.tokenizer_gguf import from_gguf

        return from_gguf(self.header, self.spec.vocab_size)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _tensors(header: GgufHeader) -> dict[str, Tensor]:
    """The weights under their names in the file."""
    out: dict[str, Tensor] = {}
    for name, tensor in header.tensors.items():
        if name in ROPE_TENSORS:
            continue
        if len(tensor.shape) == 1 and BLOCK_SIZES[tensor.dtype][0] != 1:
            raise CheckpointError(f"{header.path} has vector {name!r} of type {tensor.dtype}")
        info = TensorInfo(name, tensor.dtype, tensor.shape, tensor.nbytes)
        width = tensor.nbytes // max(info.rows, 1)
        out[name] = info, _Stored(header.fd, header.path, tensor.offset, width)
    return out
