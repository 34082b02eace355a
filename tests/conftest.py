"""Fixtures shared by the tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from checkpoints import tiny_llama_dir

from pronk.checkpoint.sources import resolve
from pronk.errors import SourceError


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The path of SmolLM2-135M, downloaded into the user's cache the first time."""
    return registered("smollm2-135m")


@pytest.fixture(scope="session")
def qwen() -> Path:
    """The path of Qwen2.5-Coder-0.5B (491 MB): for slow tests."""
    return registered("qwen2.5-coder-0.5b")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """The path of Gemma 3 270M (253 MB): for slow tests."""
    return registered("gemma3-270m")


def registered(name: str) -> Path:
    """The path of a registered model, downloaded the first time; skips where it cannot be."""
    try:
        return resolve(name)
    except SourceError as error:
        # Anything else, such as a wrong checksum, is a failure.
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of Hugging Face's form, to be read alone."""
    return tiny_llama_dir(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """The modules that protoc writes for gRPC clients, by the names of the files."""
    from pronk.serve.grpc import generate as generated

    out = tmp_path_factory.mktemp("stubs")
    generated.generate(out, [f"--grpc_python_out={out}"])
    for name in generated.PROTOS:  # what is kept is what the files say
        fresh = (out / f"pronk/serve/grpc/{name}_pb2.py").read_text()
        assert fresh == (generated.HERE / f"{name}_pb2.py").read_text()
    sys.path.insert(0, str(out / "pronk/serve/grpc"))
    try:
        return {name: importlib.import_module(f"{name}_pb2_grpc") for name in generated.PROTOS}
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: tests run side by side, and tiny models gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    folder = tmp_path / "home"
    monkeypatch.setenv("PRONK_HOME", str(folder))
    return folder
