"""Sessions on disk: tokens, and the KV blocks of the model that computed them.

A file is laid out as safetensors: the length of a header, the header as JSON, raw bytes. Its
metadata names the tokens, and for each kind of attention which blocks of 32 positions are there;
``kv.N`` are their bytes. A sum over all of it shows what was damaged.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pronk.checkpoint.io import open_file, parse_json, read_exact
from pronk.engine.blocks import Holding, KvBlocks
from pronk.engine.runner import Runner
from pronk.errors import CheckpointError, PronkError, RequestError
from pronk.graph.kv import blocks_of

__all__ = ["read_about", "read_session", "write_session"]

_FORMAT = "pronk-session-1"
_MOST_HEADER = 1 << 26
_LENGTH = struct.Struct("<Q")


def write_session(
    path: Path,
    tokens: Sequence[int],
    holding: Holding,
    runner: Runner,
    model: str,
    about: Mapping[str, Any] | None = None,
) -> int:
    """Write a session; gives the bytes of its file, which appears whole or not at all.

    Parameters
    ----------
    path : Path
    tokens : sequence of int
        Those whose keys and values are in the cache.
    holding : Holding
    runner : Runner
    model : str
        Names the model, and all else that decides the bits of its cache.
    about : mapping, optional
        What its owner wants to find with it, as JSON.

    Raises
    ------
    PronkError
        If the file cannot be written.
    """
    held = [[i for i, block in enumerate(blocks) if block >= 0] for blocks in holding.blocks]
    contents = json.dumps(
        {"model": model, "tokens": list(tokens), "held": held, "about": dict(about or {})}
    )
    total = zlib.crc32(contents.encode())
    header: dict[str, Any] = {}
    at = 0

    def bytes_of(group: int, place: int) -> bytes:
        return runner.executor.kv_block(group, holding.blocks[group][place]).tobytes()

    for i, (places, pool) in enumerate(zip(held, runner.program.kv_pools, strict=True)):
        for place in places:
            total = zlib.crc32(bytes_of(i, place), total)
        stop = at + len(places) * pool.block_bytes
        shape = [len(places), pool.block_bytes]
        header[f"kv.{i}"] = {"dtype": "U8", "shape": shape, "data_offsets": [at, stop]}
        at = stop
    header["__metadata__"] = {"format": _FORMAT, "contents": contents, "sum": f"{total}"}
    raw = json.dumps(header).encode()
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(_LENGTH.pack(len(raw)) + raw)
            for i, places in enumerate(held):
                for place in places:
                    file.write(bytes_of(i, place))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise PronkError(f"cannot write the session to {path}: {error.strerror}") from None
    return _LENGTH.size + len(raw) + at


def read_session(
    path: Path,
    kv: KvBlocks,
    runner: Runner,
    model: str,
    context: int,
    make_room: Callable[[], bool],
) -> tuple[list[int], Holding]:
    """What `write_session` wrote: the tokens, and blocks of this cache that hold them.

    Parameters
    ----------
    path, runner, model
        As it took them.
    kv : KvBlocks
    context : int
        Most tokens.
    make_room : callable
        Frees blocks that are in no use; whether there were any.

    Raises
    ------
    CheckpointError
        If the file is damaged, or not of this model.
    RequestError
        If the cache has no room for it.
    """
    try:
        fd, size = open_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the session {path}: {error.strerror}") from None
    try:
        tokens, held, total, expected, at = _header(fd, size, path, runner, model, context)
        while not kv.spare([len(places) for places in held]):
            if not make_room():
                raise RequestError(f"the KV cache has no room for the session {path} now")
        holding = kv.hold()
        try:
            for i, (places, manager) in enumerate(zip(held, kv.managers, strict=True)):
                blocks = holding.blocks[i]
                blocks += [-1] * (places[-1] + 1 if places else 0)
                for place, block in zip(places, manager.pool.take(len(places)), strict=True):
                    blocks[place] = block
                for place in places:
                    planes = runner.executor.kv_block(i, blocks[place])
                    raw = read_exact(fd, at, planes.size, path)
                    planes[:] = raw.reshape(planes.shape)
                    total = zlib.crc32(raw.data, total)
                    at += planes.size
            if total != expected:
                raise CheckpointError(f"the session {path} is damaged: its sum is wrong")
        except BaseException:
            kv.release(holding)
            raise
        return tokens, holding
    finally:
        os.close(fd)


def read_about(path: Path) -> dict[str, Any]:
    """What `write_session` was given about a session; that it is whole, `read_session` tells.

    Raises
    ------
    CheckpointError
        If it cannot be read, or is no session.
    """
    try:
        fd, size = open_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the session {path}: {error.strerror}") from None
    try:
        found, _ = _contents(fd, size, path)
    finally:
        os.close(fd)
    about = found.get("about", {})
    if not isinstance(about, dict):
        raise _damaged(path)
    return about


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"the session {path} is damaged, or no session")


def _contents(fd: int, size: int, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a header holds, and its metadata."""
    if size < _LENGTH.size:
        raise _damaged(path)
    (length,) = _LENGTH.unpack(read_exact(fd, 0, _LENGTH.size, path).tobytes())
    if length > min(_MOST_HEADER, size - _LENGTH.size):
        raise _damaged(path)
    header = parse_json(read_exact(fd, _LENGTH.size, length, path).tobytes(), path)
    meta = header.get("__metadata__")
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise _damaged(path)
    contents = meta.get("contents")
    if not isinstance(contents, str) or not isinstance(meta.get("sum"), str):
        raise _damaged(path)
    return parse_json(contents.encode(), path), {**meta, "start": _LENGTH.size + length}


def _header(
    fd: int, size: int, path: Path, runner: Runner, model: str, context: int
) -> tuple[list[int], list[list[int]], int, int, int]:
    """Tokens, blocks that are there, the sum so far, that of all, and where the bytes begin."""
    damaged = _damaged(path)
    found, meta = _contents(fd, size, path)
    start, contents, expected = meta["start"], meta["contents"], meta["sum"]
    tokens, held, pools = found.get("tokens"), found.get("held"), runner.program.kv_pools
    if found.get("model") != model:
        raise CheckpointError(f"the session {path} is of another model, or of other options")
    vocab = runner.program.spec.vocab_size
    if not isinstance(tokens, list) or not isinstance(held, list) or not _below(tokens, vocab):
        raise damaged
    if len(tokens) > context:
        raise CheckpointError(
            f"the session {path} has {len(tokens)} tokens, but the context holds {context}"
        )
    blocks = blocks_of(len(tokens))
    if len(held) != len(pools) or not all(_rising(places, blocks) for places in held):
        raise damaged
    whole = sum(len(p) * pool.block_bytes for p, pool in zip(held, pools, strict=True))
    if size != start + whole or not expected.isascii() or not expected.isdigit():
        raise damaged
    return tokens, held, zlib.crc32(contents.encode()), int(expected[:20]), start


def _below(values: Any, bound: int) -> bool:
    """Whether this is a list of integers in [0, bound)."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < bound for v in values)


def _rising(values: Any, bound: int) -> bool:
    """Whether each is above the one before, too."""
    return _below(values, bound) and all(a < b for a, b in pairwise(values))
