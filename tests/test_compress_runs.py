"""Compressing: runs that are killed, that find no room, or that are refused."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from pronk.cli import main
from pronk.compress import compress as module
from pronk.compress.bits import Goal
from pronk.compress.recipes import Recipe, recipe_of
from pronk.errors import PronkError, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "hf"
    return checkpoints.tiny_llama_dir(path, intermediate_size=128)


@pytest.fixture(scope="module")
def gguf(tiny: Path) -> Path:
    return checkpoints.tiny_gguf(tiny.parent / "tiny.gguf", tiny)


def made(source: Path, recipe: Recipe, out: Path, **options: Any) -> Path:
    module.compress(source, recipe, out, samples=3, **options)
    return out


KILLED = """
import sys
from pronk.compress import compress as module
from pronk.compress.recipes import recipe_of

plain = module.compress_layer
def slow(ckpt, decoder, layer, *rest):
    if layer == 1:
        print("half-way", flush=True)
        sys.stdin.read()  # until it is killed, or its parent is
    return plain(ckpt, decoder, layer, *rest)
module.compress_layer = slow
module.compress(sys.argv[1], recipe_of("int4-gptq"), sys.argv[2], samples=3)
"""


def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    target = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tiny), str(target)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == b"half-way\n"
        with pytest.raises(RequestError, match="in use"):
            made(tiny, recipe_of("int4-gptq"), target)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not target.exists()
    assert (tmp_path / ".out.compress" / "layer-0").is_dir()
    layers: list[int] = []
    plain = module.compress_layer

    def watched(ckpt: Any, decoder: Any, layer: int, *rest: Any) -> Any:
        layers.append(layer)
        return plain(ckpt, decoder, layer, *rest)

    monkeypatch.setattr(module, "compress_layer", watched)
    made(tiny, recipe_of("int4-gptq"), target)
    assert layers == [1]
    whole = made(tiny, recipe_of("int4-gptq"), tmp_path / "whole")
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_another_recipe_left_is_begun_anew(tiny: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.compress"
    (left / "layer-0").mkdir(parents=True)
    (left / "layer-0" / "report.json").write_text("{}")
    (left / "key.json").write_text("{}")
    target = made(tiny, recipe_of("int4-rtn"), tmp_path / "out")
    whole = made(tiny, recipe_of("int4-rtn"), tmp_path / "whole")
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["stages", "bundle", "gguf"])
def test_a_full_disk_leaves_the_old_output(
    where: str, tiny: Path, gguf: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    target = tmp_path / ("out.gguf" if where == "gguf" else "out")
    source = gguf if where == "gguf" else tiny
    made(source, recipe_of("int8"), target)
    file = target if where == "gguf" else target / "model.safetensors"
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at = {"stages": "numpy.save", "bundle": "os.posix_fallocate", "gguf": "os.fsync"}[where]
    with monkeypatch.context() as patch:
        patch.setattr(at, full)
        with pytest.raises(PronkError, match="cannot be written: No space left"):
            made(source, recipe_of("int4-rtn"), target)
    assert file.read_bytes() == before
    made(source, recipe_of("int4-rtn"), target)
    assert file.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"caf\xe9", "not UTF-8"),
        (b"a few words", "shorter than one window"),
        (None, "does not exist"),
    ],
)
def test_texts_that_will_not_do(
    data: bytes | None, words: str, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    text = tmp_path / "text.txt"
    if data is not None:
        text.write_bytes(data)
    arguments = ["compress", str(tiny), "--recipe", "int4-gptq", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--calibration", str(text)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "int4-rtn", "--group-size", "128"], "give --group-size 32, 64 or channel"),
        (["--recipe", "int4-rtn", "--group-size", "48"], "multiple of 32"),
        (["--recipe", "bf16", "--group-size", "64"], "no groups"),
        (["--recipe", "int5"], "no recipe 'int5'"),
        (["--recipe", "int4-gptq", "--samples", "0"], "--samples"),
        (["--recipe", "int4-gptq", "--bits", "4"], "for auto"),
        ([], "give a MODEL and a --recipe"),
        (["--recipe", "int8", "-o", "{there}"], "not a bundle"),
        (["--recipe", "int8", "-o", "{there}/out.gguf"], "no GGUF file"),
    ],
)
def test_requests_that_will_not_do(
    options: list[str], words: str, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.txt").write_text("x")
    options = [option.format(there=there) for option in options]
    if "-o" not in options:
        options += ["-o", str(tmp_path / "out")]
    assert main(["compress", str(tiny), *options]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in there.iterdir()] == ["thesis.txt"]


def test_gguf_has_no_three_bits_of_ours(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no type"):
        made(gguf, recipe_of("int3-rtn"), tmp_path / "out.gguf")


def test_bits_are_chosen_for_bundles(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="bundles only"):
        made(gguf, recipe_of("auto"), tmp_path / "out.gguf", goal=Goal(bits=4))


def test_inputs_that_were_lost(tmp_path: Path, monkeypatch: Any) -> None:
    untied = checkpoints.tiny_llama_dir(tmp_path / "hf", tie_word_embeddings=False)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_head", stop)
        with pytest.raises(KeyboardInterrupt):
            made(untied, recipe_of("int4-gptq"), tmp_path / "out")
    (tmp_path / ".out.compress" / "inputs-2.npy").unlink()
    with pytest.raises(PronkError, match="damaged"):
        made(untied, recipe_of("int4-gptq"), tmp_path / "out")


def test_without_torch_a_sentence_says_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["compress", str(tiny), "--recipe", "int8", "-o", str(tmp_path / "out")]) == 2
    assert "pip install torch" in capsys.readouterr().err
