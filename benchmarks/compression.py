"""Recipes of `pronk compress` beside llama.cpp's own types, of one model and by one protocol.

    python benchmarks/compression.py --text FILE [--recipes NAME,...] [--calibration FILE]
        [--exact NAME,...] [--variants NAME=PATH,...] [--fit 200MB,...] [--llama-python PATH]
        [--work DIR] [--out FILE.json]

The reference is the model's weights in float32. llama.cpp quantizes that file, without an
importance matrix; what Pronk runs as it is stored is run so, and of any other type the
dequantized values are, in float32; so are those of the recipes in --exact, to tell what their
weights lose from what activations do. The reference and one of llama.cpp's files are also scored
by llama.cpp itself. Everything is kept in --work: a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import output
from float_gguf import write_float
from machine import describe
from verb import pronk

from pronk import resolve
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.open import open_checkpoint
from pronk.errors import PronkError
from pronk.evaluate.corpus import encode, load_corpus
from pronk.evaluate.windows import windows
from pronk.graph.program import stored_dtypes

HERE = Path(__file__).parent
LLAMA = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
REFERENCE = "float32"
CHECKED = "Q4_K_M"


def llama(python: str, *words: str) -> dict[str, Any]:
    """The JSON of a verb of llama_worker.py."""
    command = [python, str(HERE / "llama_worker.py"), *words]
    print(shlex.join(["llama.cpp", *words]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def converted(checkpoint: Checkpoint) -> set[str]:
    """Types of a file's matrices that Pronk does not run as they are stored."""
    stored = {name: (info.dtype, info.cols) for name, info in checkpoint.tensors.items()}
    runs = stored_dtypes(stored)
    matrices = (name for name, info in checkpoint.tensors.items() if info.rows > 1)
    return {stored[name][0] for name in matrices if stored[name][0] != runs(name)}


class Work:
    """The files of a run, each made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.work
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = resolve(args.model)
        self.versions: dict[str, str] = {}

    def once(self, name: str, make: Any) -> Path:
        """A file or directory of this name, made unless it is there."""
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    def reference(self) -> Path:
        """The weights in float32."""
        return self.once("float32.gguf", lambda path: write_float(self.source, path))

    def quantized(self, kind: str) -> Path:
        """The weights in a type of llama.cpp's."""

        def make(path: Path) -> None:
            part = path.with_suffix(".part")
            llama(self.args.llama_python, "quantize", str(self.reference()), str(part), kind)
            part.replace(path)

        return self.once(f"{kind}.gguf", make)

    def fit(self, memory: str, path: Path) -> None:
        """What `pronk fit` makes of the model for this much memory."""
        pronk("fit", str(self.source), "--memory", memory,
              "--context", str(self.args.window), "-o", str(path))  # fmt: skip

    def variants(self) -> list[dict[str, Any]]:
        """Name, origin, the path that is measured, and the path whose bytes count."""
        found = [{"name": REFERENCE, "by": "reference", "run": self.reference()}]
        for recipe in filter(None, self.args.recipes.split(",")):
            name, *options = shlex.split(recipe)
            label = " ".join([name, *options]).replace(" --", " ").replace("--", "")
            file = "recipe-" + label.replace(" ", "-")
            make = partial(self.compress, name, *options)
            row = {"name": label, "by": "pronk compress", "run": self.once(file, make)}
            took = self.folder / f"{file}.json"
            if took.exists():
                row["seconds"] = json.loads(took.read_text())["seconds"]
            found.append(row)
            if label in self.args.exact.split(","):
                stored = self.once(f"{file}.gguf", make)
                to_float = partial(write_float, stored)
                found.append({
                    "name": f"{label}, float32 activations", "by": "pronk compress",
                    "run": self.once(f"{file}.float32.gguf", to_float), "stored": stored,
                })  # fmt: skip
        for memory in filter(None, self.args.fit.split(",")):
            path = self.once(f"fit-{memory}", partial(self.fit, memory))
            found.append({"name": f"fit {memory}", "by": "pronk fit", "run": path})
        for one in filter(None, self.args.variants.split(",")):
            name, _, path = one.partition("=")
            found.append({"name": name, "by": "given", "run": resolve(path)})
        for kind in filter(None, self.args.llama.split(",")):
            path = self.quantized(kind)
            with open_checkpoint(path) as checkpoint:
                others = converted(checkpoint)
            row = {"name": kind, "by": "llama.cpp", "run": path, "stored": path}
            if others:
                to_float = partial(write_float, path)
                row["run"] = self.once(f"{kind}.float32.gguf", to_float)
                row["dequantized"] = sorted(others)
            found.append(row)
        return found

    def compress(self, recipe: str, *options_path: Any) -> None:
        """Make a recipe's output, the last argument; how long it took is kept beside."""
        *options, path = options_path
        words = ["compress", str(self.source), "--recipe", recipe, *options, "-o", str(path)]
        words += ["--threads", str(self.args.threads)]
        if self.args.calibration:
            words += ["--calibration", self.args.calibration]
        done = pronk(*words)
        path.with_name(path.name + ".json").write_text(json.dumps({"seconds": done["seconds"]}))

    def compare(self, variants: list[dict[str, Any]]) -> dict[str, Any]:
        """The report of `pronk compare` on all of them."""
        a = self.args
        words = ["compare", *(f"{v['name']}={v['run']}" for v in variants)]
        words += ["--text", a.text, "--window", str(a.window), "--rounds", str(a.rounds)]
        words += ["--threads", str(a.threads), "--tasks", a.tasks]
        words += ["--report", str(self.folder / "report")]
        for name in ("stride", "max_tokens", "task_dir", "limit"):
            if getattr(a, name) is not None:
                words += [f"--{name.replace('_', '-')}", str(getattr(a, name))]
        return pronk(*words)

    def check(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Files scored by llama.cpp too, on the same windows of the same tokens."""
        names = [r["name"] for r in report["variants"] if r["name"] in (REFERENCE, CHECKED)]
        if CHECKED not in names or not self.args.check_windows:
            return []
        with open_checkpoint(self.reference()) as checkpoint:
            words = checkpoint.load_tokenizer()
        ids = encode(load_corpus(self.args.text), words, self.args.max_tokens)
        plan = list(windows(ids, self.args.window, self.args.stride, words.bos_id))
        plan = plan[: self.args.check_windows]
        file = self.folder / "windows.json"
        file.write_text(json.dumps(
            [{"ids": w.ids, "first": w.first, "targets": w.targets} for w in plan]))  # fmt: skip
        count = sum(len(w.targets) for w in plan)

        def ours(path: Path) -> float:
            done = pronk("eval", str(path), "--text", self.args.text, "--window",
                         str(self.args.window), "--stride", str(report["protocol"]["stride"]),
                         "--max-tokens", str(count + 1))  # fmt: skip
            if done["tokens"] != count:
                raise SystemExit("the two engines did not score the same tokens")
            return float(done["nll"])

        found = []
        for name in names:
            path = self.reference() if name == REFERENCE else self.quantized(name)
            theirs = llama(self.args.llama_python, "score", str(path), str(file), "--threads",
                           str(self.args.threads))  # fmt: skip
            self.versions["llama_cpp_python"] = theirs["version"]
            nll = {"pronk": ours(path), "llama_cpp": theirs["nll"]}
            if name == CHECKED:
                # What both would give, were activations not rounded to multiply with.
                to_float = partial(write_float, path)
                nll["dequantized"] = ours(self.once(f"{name}.float32.gguf", to_float))
            row = {engine: math.exp(value) for engine, value in nll.items()}
            apart = math.expm1(nll["pronk"] - nll["llama_cpp"])
            found.append({"name": name, "tokens": count, **row, "apart": apart})
        return found


KEPT = ("perplexity", "growth", "kl", "top1_agreement", "bytes", "bits", "formats", "speed")


def measure(work: Work) -> dict[str, Any]:
    """Every figure of the result."""
    variants = work.variants()
    report = work.compare(variants)
    rows = []
    for variant, measured in zip(variants, report["variants"], strict=True):
        row = {"name": variant["name"], "by": variant["by"]}
        row |= {key: measured[key] for key in KEPT if key in measured}
        if "seconds" in variant:
            row["seconds"] = variant["seconds"]
        row["tasks"] = {name: t["accuracy"]["value"] for name, t in measured["tasks"].items()}
        if variant["run"] != variant.get("stored", variant["run"]):
            # What was run is as good as the file, and neither as small nor as fast.
            if "dequantized" in variant:
                row["dequantized"] = variant["dequantized"]
            row.pop("speed", None)
            row |= sizes(variant["stored"])
        rows.append(row)
    tests = {metric: report["tests"][metric] for metric in ("perplexity", "kl")}
    return {
        "model": work.source.name,
        "protocol": report["protocol"],
        "tasks": report["tasks"],
        "resamples": report["resamples"],
        "alpha": report["alpha"],
        "check": work.check(report),
        "versions": {**report["versions"], **work.versions},
        "rows": rows,
        "tests": tests,
    }


def sizes(path: Path) -> dict[str, Any]:
    """Bytes and types of a file that was run dequantized."""
    from pronk.commands.compare import facts

    with open_checkpoint(path) as checkpoint:
        return {k: v for k, v in facts(checkpoint).items() if k in KEPT}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a GGUF file or a name")
    parser.add_argument("--recipes", default="", metavar="NAME,...",
                        help="of pronk compress; options may follow: 'auto --bits 4'")  # fmt: skip
    parser.add_argument("--calibration", metavar="FILE", help="text for recipes that look at any")
    parser.add_argument("--exact", default="", metavar="NAME,...",
                        help="recipes that are also measured with float32 activations")  # fmt: skip
    parser.add_argument("--fit", default="", metavar="SIZE,...", help="budgets of pronk fit")
    parser.add_argument("--variants", default="", metavar="NAME=PATH,...", help="others")
    parser.add_argument("--llama", default=",".join(LLAMA), metavar="TYPE,...")
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--tasks", default="facts,cloze", metavar="NAME,...")
    parser.add_argument("--task-dir", metavar="DIR")
    parser.add_argument("--limit", type=int, metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-windows", type=int, default=4, metavar="N",
                        help="windows that llama.cpp scores too; 0: none")  # fmt: skip
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--work", type=Path, default=Path("build/compression"), metavar="DIR")
    output.add_output(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    try:
        result = measure(Work(args))
    except PronkError as error:
        raise SystemExit(f"compression.py: {error}") from None
    about = {"benchmark": "compression", "command": output.command()}
    output.finish({**about, "machine": describe(args.threads), **result}, args)


if __name__ == "__main__":
    main()
