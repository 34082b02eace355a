"""What pruning costs and what distillation gives back: quality against parameters.

python benchmarks/pruning.py --calibration FILE --text FILE [MODEL] [--steps 50]
    [--grids int3-g64 ...] [--recipes int3-gptq ...] [--task-dir DIR] [--work DIR]
    [--out FILE.json]

Runs `pronk prune`, `qat` and `compress` as a user does, judged on a text that they did not learn
from, and `compare` on all that came of it. What is in --work already is not made again, so a run
that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import output
from machine import describe
from verb import pronk

REMOVED = (10, 20, 35, 60)
# What the project's brief claims such methods reach, in points of accuracy lost or kept.
CLAIMS = {
    "35 % fewer parameters": "1.2 % of accuracy lost",
    "60 to 80 % fewer, distilled": "under 3 % lost",
    "sparse and int4": "98 % kept",
}


# Bits a weight of a format and its scales, in groups of 32, or 64 below int4.
BITS = {"int4": 4.5, "int3": 3.25, "int2": 2.25, "2:4": 3.5}


def compared_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a report of `pronk compare`, a row for each model."""
    return [
        {
            "name": one["name"],
            "perplexity": one["perplexity"]["value"],
            "kl": one["kl"]["value"],
            "top1_agreement": one["top1_agreement"]["value"],
            "accuracy": {name: task["accuracy"]["value"] for name, task in one["tasks"].items()},
        }
        for one in report["variants"]
    ]


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
        """2:4 sparsity by each method, as it is and as recovered."""
        args, rows = self.args, []
        for method in self.args.methods:
            words = ("--samples", str(args.samples), "--distill", str(args.steps))
            made = self.make(
                f"sparse-{method}", "prune", "--pattern", "2:4", "--method", method, *words
            )
            rows.append({"method": method, **made["sparse"], **made["measured"]})
        return rows

    def packed(self) -> list[dict[str, Any]]:
        """Dense matrices in few bits, trained so or not, and sparse ones in int4, zeros kept."""
        args = self.args
        rows = [
            {"name": f"qat-{one['format']}", "bits": one["bits"]["packed"]} for one in self.grids()
        ]
        for recipe in args.recipes:
            rows.append(self._pack(f"packed-{recipe}", args.model, recipe))
        for method in args.methods:
            rows.append(self._pack(f"packed-2-4-{method}", str(self.work / f"sparse-{method}")))
        return rows

    def _pack(self, name: str, source: str, recipe: str = "int4-rtn") -> dict[str, Any]:
        target, args = self.work / name, self.args
        if not target.exists():
            words = () if recipe.endswith("-rtn") else ("--calibration", args.calibration)
            pronk(
                "compress", source, "--recipe", recipe, *words, "--samples", str(2 * args.samples),
                "--threads", str(args.threads), "-o", str(target),
            )  # fmt: skip
        kind = recipe.partition("-")[0] if source == args.model else "2:4"
        return {"name": name, "bits": BITS[kind]}

    def compared(self, packed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All models on the text and, where there are tasks, on their first questions."""
        args = self.args
        names = [f"pruned-{percent}" for percent in args.removed]
        names += [f"sparse-{method}" for method in args.methods] + [one["name"] for one in packed]
        file = self.work / "compared.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        if kept.get("names") == names:
            rows: list[dict[str, Any]] = kept["rows"]
            return rows
        tasks = ("--tasks", args.tasks, "--task-dir", args.task_dir, "--limit", str(args.limit))
        report = pronk(
            "compare", f"as it is={args.model}", *(f"{name}={self.work / name}" for name in names),
            "--text", args.text, "--window", str(args.window), "--max-tokens", str(args.judged),
            *(tasks if args.task_dir else ("--tasks", "none")), "--rounds", "0",
            "--threads", str(args.threads), "--report", str(self.work / "compared"),
        )  # fmt: skip
        rows = compared_rows(report)
        file.write_text(json.dumps({"names": names, "rows": rows}))
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
    parser.add_argument(
        "--recipes", nargs="*", default=("int4-rtn", "int4-gptq", "int3-gptq", "int2-gptq"),
        help="of dense models to put sparse ones beside",
    )  # fmt: skip
    parser.add_argument("--task-dir", metavar="DIR", help="where NAME.jsonl of tasks are")
    parser.add_argument("--tasks", default="arc_easy,piqa")
    parser.add_argument("--limit", type=int, default=150, help="questions of each task")
    parser.add_argument("--judged", type=int, default=2048, help="tokens of the text to compare on")
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
        made = {"rows": bench.rows(), "zeros": bench.zeros(), "grids": bench.grids()}
        packed = bench.packed()
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
            "questions": args.limit if args.task_dir else 0,
            "judged": args.judged,
            **made,
            "packed": packed,
            "compared": bench.compared(packed),
        }
    output.finish(result, args)


if __name__ == "__main__":
    main()
