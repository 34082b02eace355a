"""``model.safetensors`` of a bundle: quantized rows, written as they are computed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize
from pronk.checkpoint.bundle_config import module_of
from pronk.checkpoint.families import family_of
from pronk.checkpoint.fp8 import pack_fp8
from pronk.checkpoint.kinds import EMBEDDING, EMBEDDING_DTYPE, HEAD, tensor_kind
from pronk.checkpoint.packed import narrow, pack_blocks
from pronk.checkpoint.real_minima import split_minima
from pronk.checkpoint.storage import Storage, storage_of
from pronk.errors import CheckpointError

__all__ = ["Quantize", "write_tensors"]

Quantize = Callable[[Checkpoint, str, str], Iterator[tuple[int, NDArray[np.uint8]]]]
"""``(checkpoint, name, dtype)`` to ``(first row, blocks)`` pairs that cover the tensor."""

_ITEM_BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def _entries(name: str, storage: Storage, rows: int, cols: int) -> list[_Entry]:
    base, groups = name.removesuffix("weight"), storage.groups(cols)
    if storage.kind == "float":
        return [_Entry(name, storage.blocks.upper(), (rows, cols))]
    scale = _Entry(f"{base}weight_scale", "F16", (rows, groups))
    if storage.kind == "fp8":
        return [_Entry(name, "F8_E4M3", (rows, cols)), _Entry(scale.name, "F32", (rows, 1))]
    entries = [
        _Entry(f"{base}weight_packed", "I32", (rows, cols * storage.bits // 32)),
        scale,
        _Entry(f"{base}weight_shape", "I64", (2,)),
    ]
    if storage.minimum:
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
    inputs: Mapping[str, float] | None = None,
) -> None:
    """Quantize every weight of a checkpoint into a safetensors file, a few rows at a time.

    Norms, biases and routers are float32. A tied embedding becomes a packed output head, with the
    same values in float16 for `transformers`; one that is not tied is rounded likewise, and is
    float16 alone. Scales of inputs go to the packed matrices that they are named by.
    """
    tied = ckpt.spec.tie_embeddings
    plain = [name for name in ckpt.tensors if tensor_kind(name) is None]
    matrices = [name for name in ckpt.tensors if tensor_kind(name) is not None]
    if tied:
        # A source may hold a copy of the head.
        matrices = [name for name in matrices if name != HEAD]
    entries = [_Entry(_plain(ckpt, name), "F32", ckpt.tensors[name].shape) for name in plain]
    packed = [name for name in matrices if name != EMBEDDING or tied]
    places = _places(ckpt, packed, formats)
    for name in matrices:
        shape = ckpt.tensors[name].shape
        storage = storage_of(formats, name)
        group = storage.group or 32
        if len(shape) != 2 or (storage.kind == "int" and shape[1] % group):
            raise CheckpointError(
                f"{name} of {ckpt.path} has shape {shape}: only matrices whose rows are a "
                f"multiple of {group} can be quantized to {storage}"
            )
        if name == EMBEDDING:
            entries.append(_Entry(name, "F16", shape))
        if name in places and places[name].first == 0:
            for stored in places[name].names:
                entries.extend(_entries(stored, storage, places[name].rows, shape[1]))
            if inputs and storage.kind == "int":
                entries.append(_Entry(_input_scale(places[name]), "F32", (1,)))

    less = family_of(ckpt.spec.family).norm_adds_one
    file = _File(path, entries, progress)
    try:
        for name in plain:
            values = _finite(name, ckpt.read_float(name))
            values = values - 1 if less and "norm" in name.split(".")[-2] else values
            file.put(_plain(ckpt, name), 0, values)
        for name in matrices:
            if name in places:
                storage = storage_of(formats, name)
                _write_packed(ckpt, name, storage, places[name], file, quantize)
                if inputs and storage.kind == "int" and places[name].first == 0:
                    scale = np.array([inputs[name]], dtype=np.float32)
                    file.put(_input_scale(places[name]), 0, scale)
            else:
                _write_half(ckpt, name, file, quantize)
    finally:
        file.close()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix goes: a stored one of so many rows, from its row `first` on.

    Experts go to `count` of them, one after the other; ``*`` stands for their numbers.
    """

    name: str
    first: int
    rows: int
    count: int = 1

    @property
    def names(self) -> list[str]:
        return [self.name.replace("*", str(i)) for i in range(self.count)]

    def cut(
        self, start: int, blocks: NDArray[np.uint8]
    ) -> Iterator[tuple[str, int, NDArray[np.uint8]]]:
        """The stored matrix, the row of it and the blocks, of those from row `start` on."""
        at = self.first + start
        while len(blocks):
            number, row = divmod(at, self.rows)
            part = blocks[: self.rows - row]
            yield self.name.replace("*", str(number)), row, part
            at, blocks = at + len(part), blocks[len(part) :]


def _plain(ckpt: Checkpoint, name: str) -> str:
    """What a family calls a tensor that stays float."""
    return f"{module_of(ckpt.spec, name)[0]}.weight" if name.endswith(".weight") else name


def _input_scale(place: _Place) -> str:
    return f"{place.name.removesuffix('weight')}input_scale"


def _places(ckpt: Checkpoint, names: list[str], formats: Mapping[str, str]) -> dict[str, _Place]:
    """The place of each matrix that is packed, by its canonical name."""
    places = {}
    for name in names:
        module, parts = module_of(ckpt.spec, name)
        if len({storage_of(formats, part) for part in parts}) > 1:
            raise CheckpointError(
                f"{module} of a {ckpt.spec.family} model is one matrix: what it is made of "
                "cannot have different formats"
            )
        rows = [ckpt.tensors[part].shape[0] for part in parts]
        # Only a tied embedding is packed, and that is the output head.
        stored = HEAD if name == EMBEDDING else f"{module}.weight"
        moe = ckpt.spec.moe
        count = moe.experts if moe is not None and "*" in module else 1
        places[name] = _Place(stored, sum(rows[: parts.index(name)]), sum(rows) // count, count)
    return places


def _finite(name: str, values: NDArray[np.floating]) -> NDArray[np.floating]:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} holds values that are not finite: the checkpoint is damaged")
    return values


def _write_packed(
    ckpt: Checkpoint,
    name: str,
    storage: Storage,
    place: _Place,
    file: _File,
    quantize: Quantize,
) -> None:
    cols = ckpt.tensors[name].shape[1]
    dtype = storage.blocks
    for start, blocks in quantize(ckpt, name, dtype):
        for stored, row, rows in place.cut(start, blocks):
            for part, values in _parts(rows, storage, cols).items():
                at = row * values[0].nbytes
                file.put(f"{stored.removesuffix('weight')}{part}", at, values)
        if name == EMBEDDING:
            floats = dequantize(blocks, dtype, cols).astype(np.float16)
            file.put(name, start * 2 * cols, floats)
    if place.first:
        return
    for stored in place.names:
        base = stored.removesuffix("weight")
        if storage.kind == "int":
            file.put(f"{base}weight_shape", 0, np.array([place.rows, cols], dtype=np.int64))
        if storage.minimum:
            file.put(f"{base}weight_global_scale", 0, np.ones(1, dtype=np.float32))


def _parts(blocks: NDArray[np.uint8], storage: Storage, cols: int) -> dict[str, NDArray[Any]]:
    """What a bundle keeps of rows of blocks, by the tensor it goes to."""
    if storage.kind == "float":
        return {"weight": blocks}
    if storage.kind == "fp8":
        return pack_fp8(dequantize(blocks, storage.blocks, cols))
    parts = split_minima(blocks, cols) if storage.minimum else pack_blocks(blocks, cols)
    parts["weight_packed"] = narrow(parts["weight_packed"], storage.bits)
    # The blocks of a group share its scale.
    step = (storage.group or cols) // 32
    return {k: v[:, ::step] if k != "weight_packed" else v for k, v in parts.items()}


def _write_half(ckpt: Checkpoint, name: str, file: _File, quantize: Quantize) -> None:
    cols = ckpt.tensors[name].shape[1]
    for start, blocks in quantize(ckpt, name, EMBEDDING_DTYPE):
        with np.errstate(over="ignore"):
            half = dequantize(blocks, EMBEDDING_DTYPE, cols).astype(np.float16)
        file.put(name, start * 2 * cols, _finite(name, half))
