"""The committed stub of the native module is what nanobind writes."""

import subprocess
import sys
from pathlib import Path


def test_stub_is_current(tmp_path: Path) -> None:
    fresh = tmp_path / "_native.pyi"
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-m", "pronk._native", "-o", str(fresh)],
        capture_output=True,
        check=True,
    )
    committed = Path(__file__).parent.parent / "src" / "pronk" / "_native.pyi"
    assert fresh.read_text() == committed.read_text()
