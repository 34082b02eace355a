"""Writing a GGUF file: the metadata and tokenizer of another, with tensors of other types."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.arrange import gguf_parts, rotated
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.gguf import GgufCheckpoint
from pronk.checkpoint.gguf_config import ROPE_TENSORS, read_family
from pronk.checkpoint.gguf_header import TYPE_NUMBERS, GgufHeader
from pronk.checkpoint.io import read_exact
from pronk.checkpoint.storage import Storage
from pronk.errors import PronkError, RequestError

__all__ = ["check_gguf", "write_gguf"]

# llama.cpp's numbers of files by the type of most of their weights.
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9,
               "q4_k": 15,
               "q6_k": 18, "bf16": 32}  # fmt: skip


def check_gguf(ckpt: Checkpoint, target: Path, storages: Mapping[str, Storage]) -> None:
    """Refuse what no GGUF file can be written of.

    Raises
    ------
    RequestError
        If the source is no GGUF file, which has the tokenizer in the form that is wanted, or a
        format has no type there, or `target` is a directory.
    """
    if not isinstance(ckpt, GgufCheckpoint):
        raise RequestError(
            f"{ckpt.path} is no GGUF file, and only of one can another be written: give -o a "
            f"directory"
        )
    for name, storage in storages.items():
        if storage.kind == "fp8" or (storage.kind == "int" and storage.bits < 4):
            raise RequestError(
                f"GGUF has no type for {name} as {storage}: give -o a directory, or take a recipe "
                f"of 4 bits or more"
            )
    if target.is_dir():
        raise RequestError(f"{target} is a directory: give -o a file that ends in .gguf")


def write_gguf(view: Checkpoint, source: Checkpoint, target: Path) -> None:
    """Write the tensors of `view` with all else of the GGUF file `source`.

    The file is written beside `target` and renamed. A row that llama.cpp has in another order
    is put back there.

    Raises
    ------
    PronkError
        If it cannot be written; what was at `target` is untouched.
    """
    if not isinstance(source, GgufCheckpoint):
        raise TypeError("the source is no GGUF file")
    beside = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(view, source, beside)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise PronkError(f"{target} cannot be written: {error.strerror or error}") from error


def _write(view: Checkpoint, source: GgufCheckpoint, path: Path) -> None:
    header = source.header
    alignment = int(header.metadata.get("general.alignment", 32))
    parts = {name: _parts(view, source, name) for name in header.tensors}
    dtypes = {
        name: view.tensors[of[0]].dtype if of else header.tensors[name].dtype
        for name, of in parts.items()
    }
    sizes = {
        name: sum(view.tensors[one].nbytes for one in of) if of else header.tensors[name].nbytes
        for name, of in parts.items()
    }
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(parts), len(header.metadata)))
    head += _metadata(header, dtypes, sizes)
    at = 0
    for name, tensor in header.tensors.items():
        label = name.encode()
        head += struct.pack("<Q", len(label)) + label + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        head += struct.pack("<IQ", TYPE_NUMBERS[dtypes[name]], at)
        at += -(-sizes[name] // alignment) * alignment
    with path.open("wb") as file:
        file.write(head)
        for name, of in parts.items():
            file.write(bytes(-file.tell() % alignment))
            if of:
                for one in of:
                    file.write(_rows(view, source, one).data)
            else:
                tensor = header.tensors[name]
                file.write(read_exact(header.fd, tensor.offset, tensor.nbytes, header.path).data)
        file.write(bytes(-file.tell() % alignment))
        file.flush()
        os.fsync(file.fileno())


def _parts(view: Checkpoint, source: GgufCheckpoint, name: str) -> list[str]:
    """The canonical tensors that a stored one holds; none of one that is copied."""
    if name in ROPE_TENSORS:
        return []
    parts = gguf_parts(name, read_family(source.header))
    if any(one not in view.tensors for one in parts):
        raise RequestError(f"{source.path} keeps experts one by one, which Pronk does not write")
    if len({view.tensors[one].dtype for one in parts}) > 1:
        raise RequestError(f"{name} of {source.path} is one tensor and cannot be of several types")
    return parts


def _rows(view: Checkpoint, source: GgufCheckpoint, name: str) -> NDArray[np.uint8]:
    info = view.tensors[name]
    rows = view.read_rows(name, 0, info.rows)
    if not read_family(source.header).pairs_adjacent or not rotated(name):
        return rows
    # Halves of heads back to pairs side by side: of rows, or of the elements of a vector.
    count = rows.shape[0] if len(info.shape) > 1 else info.cols
    half = source.spec.head_dim // 2
    pairs = rows.reshape(count // (2 * half), 2, half, -1).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(rows.shape)


def _metadata(header: GgufHeader, dtypes: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
    """The metadata as the source has it, but for the type of most of the weights."""
    begin, end = header.pairs_at
    data = bytearray(read_exact(header.fd, begin, end - begin, header.path))
    held: dict[str, int] = {}
    for name, dtype in dtypes.items():
        held[dtype] = held.get(dtype, 0) + sizes[name]
    key = b"general.file_type"
    at = data.find(struct.pack("<Q", len(key)) + key + struct.pack("<I", 4))
    if at >= 0:
        most = _FILE_TYPES.get(max(held, key=lambda dtype: held[dtype]), 1024)
        struct.pack_into("<I", data, at + 12 + len(key), most)
    return bytes(data)
