"""Pronk's verbs as the scripts call them: in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def pronk(*words: str) -> dict[str, Any]:
    """The JSON of a verb; ends the script with its sentence if it fails."""
    print("pronk " + " ".join(words), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pronk", *words, "--json"],
        stdout=subprocess.PIPE, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
