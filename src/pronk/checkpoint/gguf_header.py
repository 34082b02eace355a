"""The header of a GGUF file, read defensively: every claim is held against the file's size."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from pronk._native import read_pairs, read_strings, read_vocabulary, skip_strings
from pronk.checkpoint.blocks import BLOCK_SIZES
from pronk.checkpoint.io import read_exact
from pronk.errors import CheckpointError

__all__ = ["TYPE_NUMBERS", "GgufArray", "GgufHeader", "StoredTensor", "read_header"]

T = TypeVar("T")

_WINDOW = 1 << 18
_MAX_DEPTH = 4
_MAX_DIMS = 4
_MAX_NAME = 1 << 16
_MAX_STRING = 1 << 24
_MAX_ALIGNMENT = 1 << 20
# Far above any model's: keep what Python builds of a header small beside the file.
_MAX_PAIRS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_STRINGS = 1 << 24
_MAX_NESTED = 1 << 12
_STRING, _ARRAY = 8, 9

_SCALARS = {
    0: ("u1", struct.Struct("<B")),
    1: ("i1", struct.Struct("<b")),
    2: ("<u2", struct.Struct("<H")),
    3: ("<i2", struct.Struct("<h")),
    4: ("<u4", struct.Struct("<I")),
    5: ("<i4", struct.Struct("<i")),
    6: ("<f4", struct.Struct("<f")),
    7: ("u1", struct.Struct("<?")),
    10: ("<u8", struct.Struct("<Q")),
    11: ("<i8", struct.Struct("<q")),
    12: ("<f8", struct.Struct("<d")),
}
_U32, _U64 = _SCALARS[4][1], _SCALARS[10][1]

_TENSOR_TYPES = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    20: "iq4_nl",
    21: "iq3_s",
    22: "iq2_s",
    23: "iq4_xs",
    29: "iq1_m",
    30: "bf16",
    34: "tq1_0",
    35: "tq2_0",
    39: "mxfp4",
}
TYPE_NUMBERS = {dtype: number for number, dtype in _TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata, left in the file: a vocabulary is read when it is wanted."""

    kind: int
    count: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file; `shape` is row-major."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensor table of a GGUF file."""

    path: Path
    fd: int
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    pairs_at: tuple[int, int]
    """Bytes of the file from and to which the metadata lies."""

    def count(self, key: str) -> int:
        """How many there are in the array under `key`; 0 where there is none."""
        array = self._array(key)
        return 0 if array is None else array.count

    def strings(self, key: str) -> list[str] | None:
        """The array of strings under `key`, or None where there is none."""
        return self._strings(key, read_strings)

    def vocabulary(self, key: str) -> tuple[list[str], dict[str, int]] | None:
        """The array of strings under `key`, and the place of each; None where there is none."""
        return self._strings(key, read_vocabulary)

    def packed_strings(self, key: str) -> tuple[bytes, int] | None:
        """The array of strings under `key` as the file has it, and their number."""
        array = self._array(key)
        if array is None:
            return None
        if array.kind != _STRING:
            raise CheckpointError(f"{self.path} has {key} as something else than strings")
        return read_exact(self.fd, array.offset, array.nbytes, self.path).tobytes(), array.count

    def _strings(self, key: str, read: Callable[[bytes, int], T]) -> T | None:
        packed = self.packed_strings(key)
        if packed is None:
            return None
        try:
            return read(*packed)
        except ValueError:
            raise CheckpointError(f"{self.path} has a string in {key} that is no UTF-8") from None

    def pairs(self, key: str) -> list[tuple[str, str]] | None:
        """The array of strings under `key`, each cut at a space, or None where there is none."""
        array = self._array(key)
        if array is None or array.kind != _STRING:
            return None
        raw = read_exact(self.fd, array.offset, array.nbytes, self.path).tobytes()
        try:
            return read_pairs(raw, array.count)
        except IndexError as error:
            text = read_strings(raw, array.count)[int(str(error))]
            raise CheckpointError(
                f"{self.path} holds the merge {text[:40]!r}, which is no pair"
            ) from None
        except ValueError:
            raise CheckpointError(f"{self.path} has a string in {key} that is no UTF-8") from None

    def numbers(self, key: str) -> NDArray[Any] | None:
        """The numeric array under `key`, or None where there is none."""
        array = self._array(key)
        if array is None:
            return None
        if array.kind not in _SCALARS:
            raise CheckpointError(f"{self.path} has {key} as something else than numbers")
        raw = read_exact(self.fd, array.offset, array.nbytes, self.path)
        return raw.view(_SCALARS[array.kind][0])

    def _array(self, key: str) -> GgufArray | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, GgufArray):
            raise CheckpointError(f"{self.path} has {key} as something else than an array")
        return value


class _Cursor:
    """A forward reader over a window of the file."""

    def __init__(self, fd: int, size: int, path: Path) -> None:
        self.fd, self.size, self.path = fd, size, path
        self.window = b""
        self.base = 0
        self.at = 0
        self.nested = 0

    @property
    def position(self) -> int:
        return self.base + self.at

    def need(self, nbytes: int) -> None:
        """Have `nbytes` in the window at the cursor."""
        if nbytes <= len(self.window) - self.at:
            return
        start = self.position
        if nbytes > self.size - start:
            raise self.truncated()
        length = min(max(nbytes, _WINDOW), self.size - start)
        self.window = read_exact(self.fd, start, length, self.path).tobytes()
        self.base, self.at = start, 0

    def truncated(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated: its header runs past the end of the file at byte "
            f"{self.size}, so fetch it again"
        )

    def skip(self, nbytes: int) -> None:
        if nbytes > self.size - self.position:
            raise self.truncated()
        self.at += nbytes

    def scalar(self, form: struct.Struct) -> Any:
        self.need(form.size)
        value = form.unpack_from(self.window, self.at)[0]
        self.at += form.size
        return value

    def text(self, limit: int, what: str) -> str:
        length = self.scalar(_U64)
        if length > self.size - self.position:
            raise self.truncated()
        if length > limit:
            raise CheckpointError(f"{self.path} has a {what} of {length} bytes, above {limit}")
        self.need(length)
        raw = self.window[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path} has a {what} that is no UTF-8") from None

    def count(self, least: int, most: int, what: str) -> int:
        """A count of things of at least `least` bytes each, at most `most`."""
        count: int = self.scalar(_U64)
        if count > (self.size - self.position) // least:
            raise self.truncated()
        if count > most:
            raise CheckpointError(f"{self.path} claims {count} {what}, above the limit of {most}")
        return count

    def skip_strings(self, count: int) -> None:
        while count:
            self.need(8)
            try:
                self.at, count = skip_strings(self.window, self.at, count, self.size - self.base)
            except ValueError:
                raise self.truncated() from None

    def array(self, depth: int = 1) -> GgufArray:
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{self.path} nests metadata arrays deeper than {_MAX_DEPTH}")
        kind: int = self.scalar(_U32)
        if kind in _SCALARS:
            count = self.count(_SCALARS[kind][1].size, 1 << 62, "numbers")
            start = self.position
            self.skip(count * _SCALARS[kind][1].size)
        elif kind == _STRING:
            count = self.count(8, _MAX_STRINGS, "strings in an array")
            start = self.position
            self.skip_strings(count)
        elif kind == _ARRAY:
            count = self.count(12, _MAX_NESTED - self.nested, "nested arrays")
            self.nested += count
            start = self.position
            for _ in range(count):
                self.array(depth + 1)
        else:
            raise CheckpointError(f"{self.path} has a metadata array of unknown type {kind}")
        return GgufArray(kind, count, start, self.position - start)

    def value(self) -> Any:
        kind = self.scalar(_U32)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind][1])
        if kind == _STRING:
            return self.text(_MAX_STRING, "metadata string")
        if kind == _ARRAY:
            return self.array()
        raise CheckpointError(f"{self.path} has a metadata value of unknown type {kind}")


def read_header(fd: int, path: Path) -> GgufHeader:
    """Read and check the header of the GGUF file open as `fd`.

    Memory is bounded by a window of the file plus the metadata kept; nothing is allocated
    on the word of a count that the file is too short to hold.
    """
    size = os.fstat(fd).st_size
    cursor = _Cursor(fd, size, path)
    if size < 4 or read_exact(fd, 0, 4, path).tobytes() != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with the bytes 'GGUF'")
    cursor.need(4)
    cursor.at = 4
    version = cursor.scalar(_U32)
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{path} is a big-endian GGUF file, which Pronk does not read")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; Pronk reads versions 2 and 3")
    tensor_count = cursor.count(24, _MAX_TENSORS, "tensors")
    pair_count = cursor.count(13, _MAX_PAIRS, "metadata values")
    metadata: dict[str, Any] = {}
    begin = cursor.position
    for _ in range(pair_count):
        key = cursor.text(_MAX_NAME, "metadata key")
        if key in metadata:
            raise CheckpointError(f"{path} has the metadata key {key[:80]!r} twice")
        metadata[key] = cursor.value()
    pairs_at = begin, cursor.position
    alignment = metadata.get("general.alignment", 32)
    good = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT
    if not good or alignment & (alignment - 1):
        raise CheckpointError(
            f"{path} gives general.alignment as {str(alignment)[:60]}, not a power of two up "
            f"to {_MAX_ALIGNMENT}"
        )
    table: dict[str, StoredTensor] = {}
    for _ in range(tensor_count):
        name = cursor.text(_MAX_NAME, "tensor name")
        if name in table:
            raise CheckpointError(f"{path} has the tensor {name[:80]!r} twice")
        table[name] = _tensor(cursor, name, alignment)
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(path, fd, metadata, _place(path, table, start, size), pairs_at)


def _tensor(cursor: _Cursor, name: str, alignment: int) -> StoredTensor:
    path = cursor.path
    short = name[:80]
    dims = cursor.scalar(_U32)
    if not 1 <= dims <= _MAX_DIMS:
        raise CheckpointError(f"{path} gives tensor {short!r} {dims} dimensions, not 1 to 4")
    shape = tuple(cursor.scalar(_U64) for _ in range(dims))[::-1]
    kind = cursor.scalar(_U32)
    offset = cursor.scalar(_U64)
    dtype = _TENSOR_TYPES.get(kind)
    if dtype is None:
        raise CheckpointError(
            f"{path} has tensor {short!r} of type {kind}, which Pronk cannot read"
        )
    block, nbytes = BLOCK_SIZES[dtype]
    elements = 1
    for dim in shape:
        elements *= dim
        # A file cannot hold more elements than 256 a byte: stops a product early.
        if not 0 < elements <= cursor.size * 256:
            raise CheckpointError(
                f"{path} gives tensor {short!r} the shape {shape}, which the file cannot hold"
            )
    if shape[-1] % block:
        raise CheckpointError(
            f"{path} has tensor {short!r} with rows of {shape[-1]} elements, no multiple of "
            f"the {dtype} block {block}"
        )
    if offset % alignment:
        raise CheckpointError(f"{path} has tensor {short!r} at an offset off its alignment")
    return StoredTensor(dtype, shape, offset, elements // block * nbytes)


def _place(
    path: Path, table: dict[str, StoredTensor], start: int, size: int
) -> dict[str, StoredTensor]:
    """Tensors at offsets within the file, none outside it and none over another."""
    placed = {
        name: StoredTensor(t.dtype, t.shape, start + t.offset, t.nbytes)
        for name, t in table.items()
    }
    end = 0
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].offset):
        if tensor.offset + tensor.nbytes > size:
            raise CheckpointError(
                f"{path} is truncated or damaged: tensor {name[:80]!r} ends at byte "
                f"{tensor.offset + tensor.nbytes}, but the file ends at byte {size}, "
                f"so fetch it again"
            )
        if tensor.offset < end:
            raise CheckpointError(f"{path} has tensor {name[:80]!r} overlapping another tensor")
        end = tensor.offset + tensor.nbytes
    return placed
