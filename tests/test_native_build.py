"""The native tests, built with sanitizers and for another architecture."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "neon", "generic")


def build(directory: Path, *options: str, target: str = "native_tests") -> Path:
    """Build a target and return where the program of the native tests is."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    configure = ["cmake", "-S", str(ROOT), "-B", str(directory), "-DPRONK_TESTS=ON", *options]
    make = ["cmake", "--build", str(directory), "--parallel", "2", "--target", target]
    for command in (configure, make):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory / "native_tests"


def passes(command: list[str], isa: str = "") -> str:
    """Run the program, require that it tested something and that all passed."""
    done = subprocess.run(
        command, env={**os.environ, "PRONK_ISA": isa}, capture_output=True, text=True
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    counts = re.fullmatch(r"(\d+) passed, 0 failed", done.stdout.splitlines()[-1])
    assert counts and int(counts[1]) > 500, report
    return done.stdout


def runnable() -> list[str]:
    """The instruction sets of this machine, the best first."""
    from pronk import _native

    found = []
    for isa in ISAS[ISAS.index(_native.isa("")) :]:
        try:
            found.append(_native.isa(isa))
        except ValueError:
            continue
    return found


def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    isas = runnable()
    program = build(tmp_path, "-DPRONK_SANITIZE=ON", f"-DPRONK_ISAS={';'.join(isas)}")
    for isa in isas:
        assert isa in passes([str(program)], isa)


def test_threads(tmp_path: Path) -> None:
    # Threads meet in the same places whatever the kernels.
    isa = runnable()[0]
    program = build(tmp_path, "-DPRONK_SANITIZE=thread", f"-DPRONK_ISAS={isa}")
    passes([str(program)], isa)


def test_arm(tmp_path: Path) -> None:
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    program = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    report = passes(["qemu-aarch64", str(program)], "neon")
    assert "neon     matmul" in report
    # A CPU without the dot product instructions falls back instead of faulting.
    report = passes(["qemu-aarch64", "-cpu", "cortex-a72", str(program)])
    assert "neon     skipped" in report


def test_no_code_is_shared_between_isas(tmp_path: Path) -> None:
    """The linker keeps one copy of a shared inline function: it must not be an AVX-512 one."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    build(tmp_path, target="pronk_core")
    objects = list(tmp_path.glob("CMakeFiles/pronk_*.dir/native/kernels/isa.cpp.o"))
    assert len(objects) >= 2
    for path in objects:
        isa = re.search(r"pronk_(\w+)\.dir", str(path))
        assert isa
        listing = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout
        # W alone: weak objects (V, u) are data, the same for every instruction set.
        weak = re.findall(r"^[0-9a-f]+ W (.*)$", listing, re.MULTILINE)
        assert weak
        assert [name for name in weak if f"pronk::{isa[1]}::" not in name] == []
