"""The choice of kernels: by name, by PRONK_ISA, or the best there is."""

import os
import subprocess
import sys

import pytest

from pronk import _native


def chosen(isa: str) -> str:
    code = "from pronk import _native; print(_native.isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PRONK_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_environment_selects() -> None:
    assert chosen("generic") == "generic"


def test_empty_environment_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRONK_ISA", raising=False)
    assert chosen("") == _native.isa()


def test_a_name_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRONK_ISA", "x")
    assert _native.isa("generic") == "generic"


@pytest.mark.parametrize("name", ["x", "AVX512", "generic "])
def test_unknown_names_those_available(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}'.* has: .*generic"):
        _native.isa(name)


def test_unknown_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRONK_ISA", "x")
    with pytest.raises(ValueError, match="PRONK_ISA is 'x'"):
        _native.isa()
