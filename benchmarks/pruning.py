"""What pruning costs and what distillation gives back: quality against parameters.

python benchmarks/pruning.py --calibration FILE --text FILE [MODEL] [--steps 50]
    [--grids int3-g64 ...] [--work DIR] [--out FILE.json]

Runs `pronk prune` and `qat` as a user does, judged on a text that they did not learn from. What is
in --work already is not made again, so a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import output
from machine import describe

REMOVED = (10, 20, 35, 60)
# What the project's brief claims such methods reach, in points of accuracy lost or kept.
CLAIMS = {
    "35 % fewer parameters": "1.2 % of accuracy lost",
    "60 to 80 % fewer, distilled": "under 3 % lost",
    "sparse and int4": "98 % kept",
}


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


class Bench:
    """Verbs with the options that all runs share; each report is kept beside its model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, Path(args.work)

    def make(self, name: str, verb: str, *words: str) -> dict[str, Any]:
        """The report of a verb whose model goes to a directory of this name."""
        kept, args = self.work / f"{name}.json", self.args
        if not kept.exists():
            report = pronk(
                verb, args.model, *words, "--calibration", args.calibration, "--judge", args.text,
                "--window", str(args.window), "--threads", str(args.threads),
                "-o", str(self.work / name),
            )  # fmt: skip
            for long in ("kept", "losses", "directory"):
                report.pop(long, None)
            kept.write_text(json.dumps(report))
        found: dict[str, Any] = json.loads(kept.read_text())
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The curve: models as pruned, and as recovered."""
        args = self.args
        words = ("--samples", str(args.samples), "--distill", str(args.steps))
        rows = []
        for percent in args.removed:
            made = self.make(f"pruned-{percent}", "prune", "--parameters", f"-{percent}%", *words)
            rows.append({
                "asked": percent / 100,
                **{key: made["parameters"][key] for key in ("after", "removed")},
                "shape": made["shape"]["after"],
                **made["measured"],
            })  # fmt: skip
        return rows

    def zeros(self) -> list[dict[str, Any]]:
        """2:4 sparsity by each method, as it is."""
        rows = []
        for method in self.args.methods:
            words = ("--pattern", "2:4", "--method", method, "--samples", str(self.args.samples))
            made = self.make(f"sparse-{method}", "prune", *words)
            rows.append({"method": method, **made["sparse"], **made["measured"]["pruned"]})
        return rows

    def grids(self) -> list[dict[str, Any]]:
        """Training on grids."""
        rows = []
        for grid in self.args.grids:
            words = ("--format", grid, "--steps", str(self.args.grid_steps))
            made = self.make(f"qat-{grid}", "qat", *words)
            rows.append({key: made[key] for key in ("format", "bits", "measured")})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="to learn from")
    parser.add_argument("--text", required=True, metavar="FILE", help="to judge on")
    parser.add_argument("--removed", type=int, nargs="*", default=REMOVED, metavar="PERCENT")
    parser.add_argument("--methods", nargs="*", default=("magnitude", "wanda", "sparsegpt"))
    parser.add_argument("--steps", type=int, default=50, help="of distillation")
    parser.add_argument("--grids", nargs="*", default=("int3-g64",), help="of qat")
    parser.add_argument("--grid-steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", metavar="DIR", help="where models go (default: a temporary one)")
    output.add_output(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        args.work = args.work or scratch
        Path(args.work).mkdir(parents=True, exist_ok=True)
        bench = Bench(args)
        result = {
            "benchmark": "pruning",
            "command": output.command(),
            "machine": describe(args.threads),
            "model": Path(args.model).name,
            "steps": args.steps,
            "grid_steps": args.grid_steps,
            "window": args.window,
            "samples": args.samples,
            "claims": CLAIMS,
            "rows": bench.rows(),
            "zeros": bench.zeros(),
            "grids": bench.grids(),
        }
    output.finish(result, args)


if __name__ == "__main__":
    main()
