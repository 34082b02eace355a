"""What `pronk fit` plans and measures under several budgets.

python benchmarks/fitting.py [MODEL] [--memory 200MB,180MB,170MB] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import output
from machine import describe


def fit(model: str, memory: str, context: int) -> dict[str, Any]:
    """One budget: what was planned and measured, or the sentence of the refusal."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pronk", "fit", model, "--memory", memory,
             "--context", str(context), "-o", str(Path(folder) / "fitted"), "--json"],
            capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"memory": memory, "refused": lines[-1] if lines else f"status {done.returncode}"}
    found = json.loads(done.stdout)
    bench, text = found["measurements"]["bench"], found["measurements"]["eval"]
    return {
        "memory": memory,
        "budget": found["budget"]["memory"],
        "formats": found["formats"],
        "planned": found["memory"]["total"],
        "peak": bench["peak_memory"],
        "prefill": bench["prefill"],
        "decode": bench["decode"],
        "perplexity": text["perplexity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--memory", default="200MB,180MB,170MB", metavar="SIZE,...")
    parser.add_argument("--context", type=int, default=1024)
    output.add_output(parser)
    args = parser.parse_args()
    rows = []
    for memory in args.memory.split(","):
        rows.append(fit(args.model, memory, args.context))
        print(f"{memory}: {rows[-1].get('refused', 'fitted')}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "fitting",
        "command": output.command(),
        "machine": describe(len(os.sched_getaffinity(0))),
        "model": Path(args.model).name,
        "context": args.context,
        "rows": rows,
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
