"""``model.safetensors`` of a bundle: quantized rows, written as they are computed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize
from pronk.checkpoint.bundle_config import GROUP
from pronk.checkpoint.families import family_of
from pronk.checkpoint.kinds import EMBEDDING_DTYPE, tensor_kind
from pronk.checkpoint.packed import pack_blocks
from pronk.checkpoint.real_minima import split_minima
from pronk.errors import CheckpointError

__all__ = ["Quantize", "write_tensors"]

Quantize = Callable[[Checkpoint, str, str], Iterator[tuple[int, NDArray[np.uint8]]]]
"""``(checkpoint, name, dtype)`` to ``(first row, blocks)`` pairs that cover the tensor."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_ITEM_BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2}


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def _packed_entries(name: str, dtype: str, rows: int, cols: int) -> list[_Entry]:
    base = name.removesuffix("weight")
    groups = cols // GROUP
    bits = 8 if dtype == "q8_0" else 4
    entries = [
        _Entry(f"{base}weight_packed", "I32", (rows, cols * bits // 32)),
        _Entry(f"{base}weight_scale", "F16", (rows, groups)),
        _Entry(f"{base}weight_shape", "I64", (2,)),
    ]
    if dtype == "q4_1":
        entries.append(_Entry(f"{base}weight_zero_point", "F32", (rows, groups)))
        entries.append(_Entry(f"{base}weight_global_scale", "F32", (1,)))
    return entries


class _File:
    """A safetensors file whose header is written first and whose tensors are filled in place."""

    def __init__(
        self, path: Path, entries: list[_Entry], progress: Callable[[int, int], None] | None
    ) -> None:
        # Widest elements first, so that every tensor is aligned to its element.
        entries = sorted(entries, key=lambda entry: -_ITEM_BYTES[entry.dtype])
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.offsets: dict[str, tuple[int, int]] = {}
        at = 0
        for entry in entries:
            span = (at, at + entry.nbytes)
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": list(span),
            }
            self.offsets[entry.name] = span
            at = span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.total, self.done, self.progress = at, 0, progress
        self.start = 8 + len(text)
        self.handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        try:
            self._put(0, len(text).to_bytes(8, "little") + text)
            # Where the disk has no room, say so before hours of quantizing.
            if at and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.handle, 0, self.start + at)
        except BaseException:
            os.close(self.handle)
            raise

    def put(self, name: str, at: int, values: NDArray[np.generic]) -> None:
        """Write `values` at byte `at` of a tensor."""
        begin, end = self.offsets[name]
        data = np.ascontiguousarray(values)
        if at + data.nbytes > end - begin:
            raise ValueError(f"{name} would overrun its place")
        self._put(self.start + begin + at, data.reshape(-1).view(np.uint8).data)
        self.done += data.nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _put(self, at: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.handle, view, at)
            view, at = view[count:], at + count

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)


def write_tensors(
    ckpt: Checkpoint,
    formats: Mapping[str, str],
    path: Path,
    quantize: Quantize,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Quantize every weight of a checkpoint into a safetensors file, a few rows at a time.

    Norms and biases are float32. A tied embedding becomes a packed output head, with the
    same values in float16 for `transformers`; one that is not tied is rounded likewise, and is
    float16 alone.
    """
    tied = ckpt.spec.tie_embeddings
    plain = [name for name in ckpt.tensors if tensor_kind(name) is None]
    matrices = [name for name in ckpt.tensors if tensor_kind(name) is not None]
    if tied:
        # A source may hold a copy of the head.
        matrices = [name for name in matrices if name != HEAD]
    entries = [_Entry(name, "F32", ckpt.tensors[name].shape) for name in plain]
    places = _places(ckpt, [name for name in matrices if name != EMBEDDING or tied])
    for name in matrices:
        shape = ckpt.tensors[name].shape
        if len(shape) != 2 or shape[1] % GROUP:
            raise CheckpointError(
                f"{name} of {ckpt.path} has shape {shape}: only matrices whose rows are a "
                f"multiple of {GROUP} can be quantized"
            )
        if name == EMBEDDING:
            entries.append(_Entry(name, "F16", shape))
        if name in places and places[name].first == 0:
            place, dtype = places[name], formats[tensor_kind(name) or ""]
            entries.extend(_packed_entries(place.name, dtype, place.rows, shape[1]))

    less = family_of(ckpt.spec.family).norm_adds_one
    file = _File(path, entries, progress)
    try:
        for name in plain:
            values = _finite(name, ckpt.read_float(name))
            file.put(name, 0, values - 1 if less and "norm" in name.split(".")[-2] else values)
        for name in matrices:
            if name in places:
                dtype = formats[tensor_kind(name) or ""]
                _write_packed(ckpt, name, dtype, places[name], file, quantize)
            else:
                _write_half(ckpt, name, file, quantize)
    finally:
        file.close()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix goes: a stored one of so many rows, from its row `first` on."""

    name: str
    first: int
    rows: int


def _places(ckpt: Checkpoint, names: list[str]) -> dict[str, _Place]:
    """The place of each matrix that is packed, by its canonical name."""
    # Only a tied embedding is packed, and that is the output head.
    places = {
        name: _Place(HEAD if name == EMBEDDING else name, 0, ckpt.tensors[name].shape[0])
        for name in names
    }
    for into, parts in family_of(ckpt.spec.family).hf_names.items():
        for name in names:
            layer = name.removesuffix(f"{parts[0]}.weight")
            if layer == name:
                continue
            together = [f"{layer}{part}.weight" for part in parts]
            rows = [ckpt.tensors[part].shape[0] for part in together]
            for i, part in enumerate(together):
                places[part] = _Place(f"{layer}{into}.weight", sum(rows[:i]), sum(rows))
    return places


def _finite(name: str, values: NDArray[np.floating]) -> NDArray[np.floating]:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} holds values that are not finite: the checkpoint is damaged")
    return values


def _write_packed(
    ckpt: Checkpoint, name: str, dtype: str, place: _Place, file: _File, quantize: Quantize
) -> None:
    cols = ckpt.tensors[name].shape[1]
    base = place.name.removesuffix("weight")
    for start, blocks in quantize(ckpt, name, dtype):
        parts = split_minima(blocks, cols) if dtype == "q4_1" else pack_blocks(blocks, dtype, cols)
        for part, values in parts.items():
            file.put(f"{base}{part}", (place.first + start) * values[0].nbytes, values)
        if name == EMBEDDING:
            floats = dequantize(blocks, dtype, cols).astype(np.float16)
            file.put(name, start * 2 * cols, floats)
    if place.first:
        return
    file.put(f"{base}weight_shape", 0, np.array([place.rows, cols], dtype=np.int64))
    if dtype == "q4_1":
        file.put(f"{base}weight_global_scale", 0, np.ones(1, dtype=np.float32))


def _write_half(ckpt: Checkpoint, name: str, file: _File, quantize: Quantize) -> None:
    cols = ckpt.tensors[name].shape[1]
    for start, blocks in quantize(ckpt, name, EMBEDDING_DTYPE):
        with np.errstate(over="ignore"):
            half = dequantize(blocks, EMBEDDING_DTYPE, cols).astype(np.float16)
        file.put(name, start * 2 * cols, _finite(name, half))
