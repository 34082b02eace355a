"""What the scripts share: their output options, the command of a run, and its files."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pruned_tables
import rounding_tables
import tables

_PLACES = ("--out", "--json", "--work", "--llama-python", "--openvino-python")
PLOTTED = ("peers", "kernels", "scaling", "long_context", "compression", "pruning", "soak")


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--out`` and ``--json``."""
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="and FILE.svg beside it")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")


def show(result: dict[str, Any]) -> str:
    """The tables of any result."""
    own = {
        "kv_cache": rounding_tables.kv_cache,
        "pruning": pruned_tables.pruning,
        "sparse_mlp": rounding_tables.sparse_mlp,
        "static_activations": rounding_tables.static_activations,
    }
    return own.get(result["benchmark"], tables.show)(result)


def command() -> str:
    """The command of this run, without what only says where things are."""
    words, skip = [], False
    for word in sys.argv[1:]:
        name = word.partition("=")[0]
        if skip or name in _PLACES:
            skip = not skip and name != "--json" and "=" not in word
            continue
        words.append(Path(word).name if "/" in word else word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def finish(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a result, and write it as JSON (whole or not at all) with its plot as SVG."""
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".part")
        part.write_text(compact(result))
        part.replace(args.out)
        draw(result, args.out.with_suffix(".svg"))
    print(json.dumps(result, indent=2) if args.json else show(result))


def draw(result: dict[str, Any], path: Path) -> None:
    """The plot of a result, where it has one and matplotlib is installed."""
    if result["benchmark"] not in PLOTTED or result.get("rows") == []:
        return
    try:
        import plots
    except ModuleNotFoundError:
        print("no plot: install matplotlib (pip install '.[bench]')", file=sys.stderr)
        return
    plots.draw(result, path)


def compact(result: dict[str, Any]) -> str:
    """JSON with a line for each entry two levels down, and four significant digits."""

    def short(data: Any) -> Any:
        if isinstance(data, float):
            return float(f"{data:.4g}")
        if isinstance(data, dict):
            return {key: short(value) for key, value in data.items()}
        return [short(value) for value in data] if isinstance(data, list | tuple) else data

    def line(data: Any) -> str:
        return json.dumps(short(data), ensure_ascii=False)

    parts = []
    for key, value in result.items():
        if isinstance(value, dict) and value:
            inner = ",\n  ".join(f"{json.dumps(k)}: {line(v)}" for k, v in value.items())
            parts.append(f"{json.dumps(key)}: {{\n  {inner}\n }}")
        elif isinstance(value, list) and value:
            parts.append(f"{json.dumps(key)}: [\n  " + ",\n  ".join(map(line, value)) + "\n ]")
        else:
            parts.append(f"{json.dumps(key)}: {line(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"
