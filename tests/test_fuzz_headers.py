"""Whatever the bytes, a reader refuses in a sentence: no crash, no hang, no huge allocation."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from checkpoints import tiny_gguf, tiny_llama_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Imported here, or the first example would be charged for loading them.
import pronk.checkpoint.gguf
import pronk.checkpoint.safetensors  # noqa: F401
from pronk.checkpoint.open import open_checkpoint
from pronk.errors import CheckpointError

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Values that overflow, wrap or reach past the end when taken for a length or an offset.
EDGES = [0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63, 2**64 - 1]

Mutation = tuple[float, bytes | int]
mutations = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(EDGES), st.just(-1)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, length: int, changes: list[Mutation]) -> bytes:
    """Overwrite bytes, plant edge values, or cut, all within the first `length` bytes."""
    out = bytearray(data)
    for where, what in changes:
        at = int(where * min(length, len(out)))
        if what == -1:
            del out[at:]
        else:
            new = struct.pack("<Q", what) if isinstance(what, int) else what
            out[at : at + len(new)] = new
    return bytes(out)


def check(path: Path, size: int) -> None:
    """Open and read everything; only a CheckpointError may stop it."""
    tracemalloc.start()
    start = time.thread_time()  # of this thread alone: the machine may be busy
    try:
        with open_checkpoint(path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                checkpoint.read_rows(name, 0, min(info.rows, 8))
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 * size + (1 << 20), f"{peak} bytes for a file of {size}"
    assert time.thread_time() - start < 5


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("hf"), attention_bias=True)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory, hf_dir: Path) -> bytes:
    path = tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", hf_dir, "q4_0")
    check(path, path.stat().st_size)  # also warms the imports up
    return path.read_bytes()


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_as_gguf(tmp_path: Path, data: bytes, magic: bool) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes((b"GGUF\x03\0\0\0" if magic else b"") + data)
    check(path, len(data))


@FUZZ
@given(mutations, st.sampled_from([200, 1500, 60_000]))
def test_mutated_gguf(tmp_path: Path, valid: bytes, changes: list[Mutation], length: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(mutate(valid, length, changes))
    check(path, len(valid))


@settings(FUZZ, max_examples=60)
@given(mutations)
def test_mutated_tokenizer_metadata(tmp_path: Path, valid: bytes, changes: list[Mutation]) -> None:
    start = valid.index(b"tokenizer.ggml.model")
    end = valid.index(b"tokenizer.chat_template")
    path = tmp_path / "m.gguf"
    path.write_bytes(valid[:start] + mutate(valid[start:end], end - start, changes) + valid[end:])
    try:
        with open_checkpoint(path) as checkpoint:
            checkpoint.load_tokenizer().encode("the quick brown fox")
    except CheckpointError as error:
        assert "\n" not in str(error)


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_as_safetensors(
    tmp_path: Path, hf_dir: Path, data: bytes, length: bool
) -> None:
    place(tmp_path, hf_dir)
    prefix = struct.pack("<Q", len(data)) if length else b""
    (tmp_path / "model.safetensors").write_bytes(prefix + data)
    check(tmp_path, len(data))


@FUZZ
@given(mutations)
def test_mutated_safetensors(tmp_path: Path, hf_dir: Path, changes: list[Mutation]) -> None:
    place(tmp_path, hf_dir)
    data = (hf_dir / "model.safetensors").read_bytes()
    length = 8 + struct.unpack_from("<Q", data)[0]
    (tmp_path / "model.safetensors").write_bytes(mutate(data, length, changes))
    check(tmp_path, len(data))


@FUZZ
@given(mutations)
def test_mutated_config(tmp_path: Path, hf_dir: Path, changes: list[Mutation]) -> None:
    place(tmp_path, hf_dir)
    data = (hf_dir / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(mutate(data, len(data), changes))
    check(tmp_path, (hf_dir / "model.safetensors").stat().st_size)


def place(target: Path, source: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())


@pytest.mark.parametrize("count", [4_000, 300_000])
def test_many_empty_things_take_no_more_than_their_bytes(tmp_path: Path, count: int) -> None:
    def run(body: bytes) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(body)
        check(path, len(body))

    def head(value: bytes) -> bytes:
        return struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + value

    run(head(struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)))  # empty strings
    run(head(struct.pack("<IIQ", 9, 9, count) + bytes(12 * count)))  # empty arrays


@settings(FUZZ, max_examples=25)
@given(mutations)
def test_mutated_real_header(tmp_path: Path, smollm2: Path, changes: list[Mutation]) -> None:
    # Behind the header lies a hole: the file keeps its size and takes no disk.
    with smollm2.open("rb") as file:
        data = file.read(2 << 20)
    size = smollm2.stat().st_size
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(mutate(data, len(data), changes))
        file.truncate(size)
    check(path, 4 << 20)
