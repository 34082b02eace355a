"""Measurements that need a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from pronk.errors import PronkError

__all__ = ["run_json"]


def run_json(module: str, arguments: Sequence[str], timeout: float = 3600.0) -> dict[str, Any]:
    """Run ``python -m module arguments`` in a fresh process and return the JSON it prints.

    Raises
    ------
    PronkError
        If it fails, takes longer than `timeout` seconds, or prints something else; with the
        last line it wrote to standard error.
    """
    what = f"python -m {module}"
    try:
        # -P: modules are not looked for in the current directory, as they are not by `pronk`.
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            # What is measured depends on nothing that an earlier process has left behind.
            env={**os.environ, "PRONK_PACKED_CACHE": "0"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PronkError(f"{what} took longer than {timeout:g} seconds") from None
    except OSError as error:
        raise PronkError(f"{what} cannot be run: {error.strerror or error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1][:500] if lines else f"it ended with status {done.returncode}"
        raise PronkError(f"{what} failed: {why}")
    try:
        result = json.loads(done.stdout)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise PronkError(f"{what} did not print a JSON object")
    return result
