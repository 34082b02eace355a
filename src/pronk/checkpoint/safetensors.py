"""Hugging Face directories as checkpoints: safetensors weights, and Pronk's own bundles."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.arrange import arrange, check_tensors
from pronk.checkpoint.base import Checkpoint, Span, TensorInfo, row_bytes
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.fp8 import unpack_e4m3
from pronk.checkpoint.hf_config import TEXT_PREFIX, read_family, read_spec, text_part
from pronk.checkpoint.io import open_file, parse_json, read_exact, read_json
from pronk.checkpoint.kinds import EMBEDDING_DTYPE
from pronk.checkpoint.packed import (
    FP8,
    Scheme,
    assemble,
    packed_dtype,
    read_schemes,
    unpack_down,
    widen,
)
from pronk.checkpoint.real_minima import join_minima
from pronk.checkpoint.rows import Tensor
from pronk.errors import CheckpointError
from pronk.spec import Budget, ModelSpec

if TYPE_CHECKING:
    from pronk.checkpoint.tokenizer import Tokenizer

__all__ = ["SafetensorsCheckpoint"]

_MAX_HEADER = 100 * 1000 * 1000
_MAX_SHARDS = 1000
_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2}
_SIZES |= {"F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
_PACKED = ".weight_packed"
_UNUSED = (".input_scale", ".input_zero_point")  # inputs are rounded as they come


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as it lies in a file."""

    fd: int
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows of the stored bytes, uint8 [stop - start, bytes a row]."""
        count = math.prod(self.shape[:-1])
        width = self.nbytes // max(count, 1)
        raw = read_exact(self.fd, self.offset + start * width, (stop - start) * width, self.path)
        return raw.reshape(stop - start, width)

    def floats(self, start: int, stop: int) -> NDArray[np.float32]:
        return dequantize(self.rows(start, stop), _FLOATS[self.dtype], self.shape[-1])

    def span(self) -> Span:
        """Where it lies."""
        return Span(self.fd, self.offset)


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Float values that were rounded to `EMBEDDING_DTYPE` when they were written."""

    source: _Stored

    def rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows in GGUF's block layout."""
        return quantize(self.source.floats(start, stop), EMBEDDING_DTYPE)

    def span(self) -> None:
        """None: the values have to be rounded."""


@dataclass(frozen=True, slots=True)
class _Float8:
    """An e4m3 weight with a scale a row, as the nearest bfloat16."""

    codes: _Stored
    scale: _Stored

    def rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows of bfloat16."""
        values = unpack_e4m3(self.codes.rows(start, stop), self.scale.floats(start, stop))
        return quantize(values, "bf16")

    def span(self) -> None:
        """None: values have to be scaled."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """A packed weight: values, scales and, if asymmetric, zero points."""

    dtype: str
    bits: int
    words: _Stored
    scale: _Stored
    zero: _Stored | None

    def rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows in GGUF's block layout."""
        zero = None
        words = widen(self.words.rows(start, stop), self.bits)
        if self.zero is not None and self.zero.dtype == "F32":
            try:
                return join_minima(
                    words,
                    self.scale.floats(start, stop),
                    self.zero.floats(start, stop),
                )
            except CheckpointError as error:
                raise CheckpointError(f"{self.words.path} is damaged: {error}") from None
        if self.zero is not None:
            raw = self.zero.rows(start // 8, -(-stop // 8)).view("<i4")
            zero = unpack_down(raw, start % 8, stop - start)
        try:
            return assemble(words, self.scale.floats(start, stop), zero, self.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.words.path} is damaged: {error}") from None

    def span(self) -> None:
        """None: values and scales lie in several places."""


class SafetensorsCheckpoint(Checkpoint):
    """A model in a Hugging Face directory; a bundle if it also holds ``pronk.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = "safetensors"
        self._fds: list[int] = []
        try:
            config, wrapped = text_part(path, read_json(_part(path, "config.json")))
            tied = self._bundle(path)
            stored = self._open_files(path)
            if wrapped:
                stored = {
                    name.removeprefix(TEXT_PREFIX): tensor
                    for name, tensor in stored.items()
                    if name.startswith(TEXT_PREFIX)
                }
            spec, self._sources = self._arrange(config, stored, tied)
            self.spec = spec
            self.tensors = MappingProxyType(
                {name: info for name, (info, _) in self._sources.items()}
            )
            check_tensors(path, spec, self.tensors)
        except BaseException:
            self.close()
            raise

    def _bundle(self, path: Path) -> bool:
        """Whether this is a bundle whose embedding is its output head."""
        try:
            manifest = read_json(path / "pronk.json")
        except FileNotFoundError:
            return False
        if type(manifest.get("format")) is not int or manifest["format"] != 1:
            raise CheckpointError(
                f"{path} is a bundle of format {str(manifest.get('format'))[:40]}; this Pronk "
                f"reads format 1"
            )
        tied = manifest.get("tied", False)
        if not isinstance(tied, bool):
            raise CheckpointError(f"{path / 'pronk.json'} gives tied as something else than a bool")
        self.format = "bundle"
        self.budget = _budget(path, manifest)
        return tied

    def _open_files(self, path: Path) -> dict[str, _Stored]:
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if single.exists() or not index.exists():
            return self._open_file(_part(path, "model.safetensors"))
        where = read_json(index, _MAX_HEADER).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise CheckpointError(f"{index} has no weight_map")
        shards: dict[str, dict[str, _Stored]] = {}
        out = {}
        for name, file in where.items():
            if not isinstance(file, str) or "/" in file or ".." in file:
                raise CheckpointError(
                    f"{index} names the shard {str(file)[:80]!r}, which is no plain file name"
                )
            if "\\" in file or "\0" in file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {file[:80]!r}, which is no safetensors file")
            if file not in shards:
                if len(shards) == _MAX_SHARDS:
                    raise CheckpointError(f"{index} names more than {_MAX_SHARDS} shards")
                shards[file] = self._open_file(_part(path, file))
            if name not in shards[file]:
                raise CheckpointError(f"{path / file} has no tensor {name[:80]!r}")
            out[name] = shards[file][name]
        return out

    def _open_file(self, path: Path) -> dict[str, _Stored]:
        fd, size = open_file(path)
        self._fds.append(fd)
        return read_header(fd, size, path)

    def _arrange(
        self, config: dict[str, Any], stored: dict[str, _Stored], tied: bool
    ) -> tuple[ModelSpec, dict[str, Tensor]]:
        schemes: frozenset[Scheme] = frozenset()
        quantization = config.get("quantization_config")
        if quantization is not None:
            schemes = read_schemes(self.path, quantization)
        sources: dict[str, Tensor] = {}
        for name in list(stored):
            if name.endswith(_PACKED):
                module = name.removesuffix(_PACKED)
                info, packed = self._packed(module, stored, schemes)
                sources[info.name] = info, packed
        if FP8 in schemes:
            for name in [n for n, t in stored.items() if t.dtype == "F8_E4M3"]:
                sources[name] = self._float8(name, stored)
        for name, tensor in stored.items():
            if name.endswith(".rotary_emb.inv_freq"):
                continue  # a buffer that old checkpoints saved; it follows from the config
            if schemes and name.endswith(_UNUSED):
                continue
            if name in sources:
                raise CheckpointError(f"{self.path} has {name!r} both packed and plain")
            dtype = _FLOATS.get(tensor.dtype)
            if dtype is None:
                raise CheckpointError(
                    f"{tensor.path} has tensor {name[:80]!r} of type {tensor.dtype}; Pronk reads "
                    f"{', '.join(_FLOATS)}"
                )
            sources[name] = TensorInfo(name, dtype, tensor.shape, tensor.nbytes), tensor
        spec = read_spec(self.path, config, tied)
        sources = arrange(self.path, read_family(self.path, config), spec, sources)
        if tied:
            head = sources.pop("lm_head.weight", None)
            if head is None:
                raise CheckpointError(f"{self.path} is a tied bundle without lm_head.weight")
            name = "model.embed_tokens.weight"
            info = TensorInfo(name, head[0].dtype, head[0].shape, head[0].nbytes)
            sources[name] = info, head[1]
        elif spec.tie_embeddings:
            sources.pop("lm_head.weight", None)
        elif self.format == "bundle":
            self._round_embedding(sources)
        return spec, sources

    def _round_embedding(self, sources: dict[str, Tensor]) -> None:
        name = "model.embed_tokens.weight"
        if name not in sources:
            return
        info, stored = sources[name]
        if isinstance(stored, _Stored) and len(info.shape) == 2:
            nbytes = info.rows * row_bytes(EMBEDDING_DTYPE, info.cols)
            info = TensorInfo(name, EMBEDDING_DTYPE, info.shape, nbytes)
            sources[name] = info, _Rounded(stored)

    def _float8(self, name: str, stored: dict[str, _Stored]) -> tuple[TensorInfo, _Float8]:
        """Gather an e4m3 weight and its scales out of `stored`."""
        codes = stored.pop(name)
        scale = stored.pop(f"{name}_scale", None)
        rows = codes.shape[0]
        if len(codes.shape) != 2 or scale is None or scale.shape != (rows, 1):
            raise CheckpointError(f"{self.path} has float-quantized {name[:80]!r} without a scale "
                                  f"for each of its rows")  # fmt: skip
        if scale.dtype not in _FLOATS:
            raise CheckpointError(f"{self.path} has scales of {name[:80]!r} that are no floats")
        nbytes = rows * row_bytes("bf16", codes.shape[1])
        return TensorInfo(name, "bf16", codes.shape, nbytes), _Float8(codes, scale)

    def _packed(
        self, module: str, stored: dict[str, _Stored], schemes: frozenset[Scheme]
    ) -> tuple[TensorInfo, _Packed]:
        """Gather the tensors of one packed weight out of `stored`."""

        def refuse(what: str) -> CheckpointError:
            return CheckpointError(f"{self.path} has packed weight {module[:80]!r} {what}")

        words = stored.pop(module + _PACKED)
        scale = stored.pop(module + ".weight_scale", None)
        shape = stored.pop(module + ".weight_shape", None)
        zero = stored.pop(module + ".weight_zero_point", None)
        overall = stored.pop(module + ".weight_global_scale", None)
        if scale is None or shape is None:
            raise refuse("without its weight_scale or weight_shape")
        if module + ".weight_g_idx" in stored:
            raise refuse("in activation order (weight_g_idx), which Pronk does not read")
        if shape.dtype not in ("I64", "I32") or shape.shape != (2,):
            raise refuse("with a weight_shape that is not two whole numbers")
        raw = read_exact(shape.fd, shape.offset, shape.nbytes, shape.path)
        rows, cols = (int(n) for n in raw.view("<i8" if shape.dtype == "I64" else "<i4"))
        if words.dtype != "I32" or len(words.shape) != 2 or words.shape[0] != rows:
            raise refuse("whose values are not the int32 rows its shape calls for")
        if cols <= 0 or cols % 32 or words.shape[1] * 32 % cols:
            raise refuse(f"with rows of {cols}, which the stored values do not fill")
        bits, symmetric = words.shape[1] * 32 // cols, zero is None
        if scale.dtype not in _FLOATS or len(scale.shape) != 2 or scale.shape[0] != rows:
            raise refuse("with scales that do not fit its rows")
        groups = scale.shape[1]
        if groups <= 0 or cols % groups or cols // groups % 32:
            raise refuse(f"with {groups} scales for rows of {cols}")
        if zero is not None and zero.dtype == "F32":
            if zero.shape != (rows, groups):
                raise refuse("with zero points that do not fit its scales")
            if overall is None or overall.dtype != "F32" or overall.shape != (1,):
                raise refuse("with real zero points and without its weight_global_scale")
            if read_exact(overall.fd, overall.offset, 4, overall.path).view("<f4")[0] != 1:
                raise refuse("with a weight_global_scale other than one")
        elif overall is not None:
            raise refuse("with a weight_global_scale, which Pronk does not read")
        elif zero is not None and bits != 4:
            raise refuse(f"of {bits} bits with whole zero points, which Pronk does not read")
        elif zero is not None and (zero.dtype != "I32" or zero.shape != (-(-rows // 8), groups)):
            raise refuse("with zero points that do not fit its scales")
        dtype = packed_dtype(bits, symmetric)
        stated = {(bits, symmetric, cols // groups), (bits, symmetric, 0 if groups == 1 else -1)}
        if dtype is None or not stated & schemes:
            raise refuse(
                f"of {bits} bits in groups of {cols // groups}, which its quantization_config "
                f"does not name"
            )
        info = TensorInfo(module + ".weight", dtype, (rows, cols), rows * row_bytes(dtype, cols))
        return info, _Packed(dtype, bits, words, scale, zero)

    def span(self, name: str) -> Span | None:
        """Where a plain tensor lies; a packed one is in several places."""
        return self._sources[name][1].span()

    def _read(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        return self._sources[info.name][1].rows(start, stop)

    @property
    def files(self) -> tuple[int, ...]:
        """The weight files."""
        return tuple(self._fds)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of the directory's tokenizer.json."""
        from pronk.checkpoint.tokenizer import from_directory

        return from_directory(self.path, self.spec.vocab_size)

    def close(self) -> None:
        """Close the weight files."""
        while self._fds:
            os.close(self._fds.pop())


def _budget(path: Path, manifest: dict[str, Any]) -> Budget | None:
    """What the bundle was fitted to; None for one that was not."""
    budget, plan = manifest.get("budget"), manifest.get("plan", {})
    if budget is None:
        return None
    if isinstance(budget, dict) and isinstance(plan, dict):
        figures = [budget.get("memory"), budget.get("context"), plan.get("overhead", 0)]
        if _whole(figures, 1 << 62) and figures[1] >= 2:
            return Budget(*figures)
    raise CheckpointError(
        f"{path / 'pronk.json'} gives a budget that is not in whole bytes and tokens"
    )


def _part(path: Path, name: str) -> Path:
    file = path / name
    if not file.exists():
        raise CheckpointError(f"{path} has no {name}, so it is no Hugging Face checkpoint")
    return file


def read_header(fd: int, size: int, path: Path) -> dict[str, _Stored]:
    """The tensor table of a safetensors file, each entry within the file and its own."""
    if size < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes hold no safetensors header")
    length = int(read_exact(fd, 0, 8, path).view("<u8")[0])
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated or damaged: it claims a header of {length} bytes, but the "
            f"file has {size}"
        )
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes, above the limit of {_MAX_HEADER}"
        )
    header = parse_json(read_exact(fd, 8, length, path).tobytes(), path)
    header.pop("__metadata__", None)
    start = 8 + length
    out = {}
    for name, entry in header.items():
        out[name] = _entry(fd, path, name, entry, start, size)
    end = start
    for name, tensor in sorted(out.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise CheckpointError(f"{path} has tensor {name[:80]!r} overlapping another tensor")
        end = tensor.offset + tensor.nbytes
    return out


def _entry(fd: int, path: Path, name: str, entry: object, start: int, size: int) -> _Stored:
    short = name[:80]
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path} describes tensor {short!r} by something else than an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise CheckpointError(
            f"{path} has tensor {short!r} of type {str(dtype)[:40]}, which Pronk cannot read"
        )
    if not _whole(shape, size) or not 1 <= len(shape) <= 4:
        raise CheckpointError(f"{path} gives tensor {short!r} a shape that the file cannot hold")
    if not _whole(span, size) or len(span) != 2:
        raise CheckpointError(f"{path} places tensor {short!r} outside the file")
    begin, end = span
    nbytes = math.prod(shape) * _SIZES[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path} gives tensor {short!r} {end - begin} bytes where its shape takes {nbytes}"
        )
    if start + end > size:
        raise CheckpointError(
            f"{path} is truncated or damaged: tensor {short!r} ends at byte {start + end}, but "
            f"the file ends at byte {size}"
        )
    return _Stored(fd, path, dtype, tuple(shape), start + begin, nbytes)


def _whole(value: object, limit: int) -> TypeGuard[list[int]]:
    """Whether `value` is a list of whole numbers from 0 to `limit`."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= limit for n in value)
