"""Packed weights on disk: the same weights, whole or not at all, and only of the same file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_gguf, tiny_llama_dir
from engines import make_runner

import pronk.engine.packing as packing
from pronk import _native, load
from pronk.checkpoint import packed_cache
from pronk.checkpoint.open import open_checkpoint
from pronk.cli import main
from pronk.errors import RequestError

IDS = list(range(3, 60))


@pytest.fixture(autouse=True)
def cache_of_everything(home, monkeypatch):
    """An empty cache that even a tiny model is kept in."""
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)
    monkeypatch.setattr(packed_cache, "_SPARE", 0)
    return home


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def path(tiny, tmp_path):
    return tiny_gguf(tmp_path / "m.gguf", tiny, "q4_1")


def start(path: Path, **options: object) -> tuple[np.ndarray, str]:
    with load(path, context=64, **options) as model:
        return model.logits(IDS), model.packed_cache


def kept(home: Path) -> list[Path]:
    return sorted((home / "packed").glob("*.weights"))


def test_the_second_start_reads_the_same_bits(path, home):
    first, said = start(path)
    assert said == "kept packed for the next start"
    second, said = start(path)
    assert said == "read from the packed cache"
    assert np.array_equal(first, second)
    assert len(kept(home)) == 1


def test_what_a_conversion_lost_is_remembered(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("pronk.graph.program.runtime_dtype", lambda *_: "q8_0")
    path = tiny_gguf(tmp_path / "m.gguf", tiny, "f32")
    with load(path, context=64) as model:
        (first,) = model.conversions
    with load(path, context=64) as model:
        assert model.packed_cache == "read from the packed cache"
        assert model.conversions == (first,)
    assert (first.stored, first.runs_as) == ("f32", "q8_0")
    assert first.error > 0


def test_a_directory_is_kept_too(tiny, home):
    first, _ = start(tiny)
    second, said = start(tiny)
    assert said == "read from the packed cache"
    assert np.array_equal(first, second)


def test_it_can_be_turned_off(path, home, monkeypatch):
    assert start(path, packed_cache=False)[1] == "not kept packed: it is turned off"
    monkeypatch.setenv(packed_cache.ENVIRONMENT, "0")
    assert start(path)[1] == "not kept packed: it is turned off"
    assert not kept(home)
    monkeypatch.setenv(packed_cache.ENVIRONMENT, "many")
    with pytest.raises(RequestError, match="PRONK_PACKED_CACHE is 'many'"):
        packed_cache.limit()


def test_what_packs_fast_is_not_kept(path, home, monkeypatch):
    monkeypatch.setattr(packing, "WORTHWHILE", 3600.0)
    assert "it would save" in start(path)[1]
    assert not (home / "packed").exists()


@pytest.mark.parametrize("kind", ["weights", "sums", "length", "short", "empty"])
def test_a_damaged_file_is_packed_again(path, home, kind):
    first, _ = start(path)
    (file,) = kept(home)
    raw = bytearray(file.read_bytes())
    if kind == "weights":
        raw[len(raw) // 3] ^= 1
    elif kind == "sums":
        raw[-100] ^= 1
    elif kind == "length":
        raw[-24:-16] = (1 << 60).to_bytes(8, "little")
    else:
        del raw[0 if kind == "empty" else len(raw) // 2 :]
    file.write_bytes(raw)
    again, said = start(path)
    assert said == "kept packed for the next start"
    assert np.array_equal(first, again)
    assert start(path)[1] == "read from the packed cache"


def test_another_file_at_the_same_place_is_packed(path, tiny, tmp_path):
    start(path)
    state = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1  # in the last tensor
    with path.open("r+b") as out:
        out.write(raw)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as rsync would
    assert start(path)[1] == "kept packed for the next start"


def test_a_copy_shares_what_is_packed(path, home, tmp_path):
    start(path)
    copy = shutil.copy(path, tmp_path / "copy.gguf")
    assert start(copy)[1] == "kept packed for the next start"  # its hash was not known
    assert start(copy)[1] == "read from the packed cache"
    assert len(kept(home)) == 1


def test_another_program_is_packed(path, home, monkeypatch):
    start(path)
    monkeypatch.setenv("PRONK_ISA", "generic")
    assert start(path)[1] == "kept packed for the next start"
    assert len(kept(home)) == 2


def test_the_limit_evicts_what_was_used_longest_ago(tiny, tmp_path, home, monkeypatch):
    paths = {d: tiny_gguf(tmp_path / f"{d}.gguf", tiny, d) for d in ("q4_0", "q4_1", "q8_0", "f16")}
    files = {}
    for i, dtype in enumerate(("q4_0", "q4_1", "q8_0")):
        before = set(kept(home))
        start(paths[dtype])
        (files[dtype],) = set(kept(home)) - before
        os.utime(files[dtype], (i, i))
    start(paths["q4_0"])  # used again
    total = sum(p.stat().st_size for p in kept(home))
    with load(paths["f16"], context=64, packed_cache=False) as model:
        size = model.memory.weights
    monkeypatch.setenv(packed_cache.ENVIRONMENT, f"{total + size - 1}B")
    start(paths["f16"])
    assert files["q4_0"].exists()
    assert not files["q4_1"].exists()
    assert files["q8_0"].exists()
    assert len(kept(home)) == 3
    monkeypatch.setenv(packed_cache.ENVIRONMENT, "1kB")
    assert "above its limit of 1.0 kB" in start(paths["q4_1"])[1]


def test_a_directory_that_cannot_be_written_goes_without(path, home):
    home.write_text("no directory")
    logits, said = start(path)
    assert said.startswith("not kept packed: ") and "cannot be written" in said
    assert np.isfinite(logits).all()


def test_a_full_disk_leaves_nothing(path, home, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_native, "save_weights", full)
    assert "No space left" in start(path)[1]
    assert not kept(home) and not list((home / "packed").glob("*.tmp"))


def test_a_full_disk_is_an_os_error(path):
    with (
        load(path, context=64) as model,
        Path("/dev/full").open("wb") as full,
        pytest.raises(OSError, match="No space left"),
    ):
        _native.save_weights(model._open().executor, full.fileno(), [(0, 0, 64)])


def test_one_writes_and_the_other_goes_without(path, home):
    (home / "packed").mkdir(parents=True)
    with packed_cache._locked(home / "packed", wait=True):
        assert start(path)[1] == "not kept packed: another process writes"
    assert start(path)[1] == "kept packed for the next start"


def test_threads_that_start_together_agree(path):
    said, logits = [], []

    def one() -> None:
        values, what = start(path)
        logits.append(values)
        said.append(what)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "kept packed for the next start" in said
    assert all(np.array_equal(logits[0], x) for x in logits)
    assert start(path)[1] == "read from the packed cache"


def test_a_killed_writer_leaves_nothing_that_is_used(path, home):
    code = f"""
import os, signal
from pronk import _native, load
import pronk.engine.packing as packing
packing.WORTHWHILE = 0.0
def killed(executor, fd, parts):
    os.write(fd, b"half")
    os.kill(os.getpid(), signal.SIGKILL)
_native.save_weights = killed
load({str(path)!r}, context=64).packed_cache
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((home / "packed").glob("*.tmp")) and not kept(home)
    assert start(path)[1] == "kept packed for the next start"
    assert not list((home / "packed").glob("*.tmp"))


def test_list_shows_and_clears_it(path, home, capsys):
    start(path)
    assert main(["list"]) == 0
    assert "packed weights of 1 model: " in capsys.readouterr().out
    assert main(["list", "--clear-packed", "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)["packed"]
    assert packed["models"] == packed["bytes"] == 0 and packed["freed"] > 0
    assert start(path)[1] == "kept packed for the next start"


@pytest.mark.parametrize(
    ("data", "sum"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_sums_are_those_of_xxhash(data, sum):
    assert _native.xxh64(data) == sum


def test_another_context_shares_what_does_not_follow_from_it(tmp_path):
    plain = tiny_llama_dir(tmp_path / "plain")
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = tiny_llama_dir(tmp_path / "dynamic", rope_parameters=scaling)
    for path, shared in ((plain, True), (dynamic, False)):
        with open_checkpoint(path) as checkpoint:
            keys = {packing._program(checkpoint, make_runner(path, context=c)) for c in (256, 1024)}
        assert (len(keys) == 1) == shared
