"""Every kernel over the shapes of real models: bytes and operations a second, and of the limit.

The limit is the roofline's: what the memory gives or what the int8 units do, whichever is nearer.
Each kernel runs alone, with the team's threads, over as many weights as a model streams.

    python benchmarks/kernels.py [--isa NAME] [--quick] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import output
import tables
from machine import TILE_ISAS, Best, describe, isas, probe
from one_op import BLOCKS, SHAPES, Bench, Shape, native_formats, seconds

from pronk.graph.pack import KV_BLOCK, kv_block_bytes

TOKENS = (1, 2, 4, 8, 16, 64, 512)
MANY = 64  # from here on a product is computing, not streaming: fewer copies do
CONTEXT = 2048
LAYERS = 8
COPIES = 128


class Kernels:
    """Yields one row a measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.threads, self.isa = args.threads, args.isa or isas()[0]
        self.tokens = tuple(t for t in TOKENS if not args.quick or t in (1, 16, 512))
        self.bench = Bench(self.threads, self.isa)
        self.best = Best()
        self.formats = native_formats()

    def clean(self, measure: Callable[[], float]) -> float:
        """A time with no slow spell beside it, or the best of a few tries."""
        found = []
        for _ in range(3):
            before = self.best.see(probe(self.threads, 1))
            found.append(measure())
            after = self.best.see(probe(self.threads, 1))
            if tables.share([before, after], self.best.figures) >= tables.SLOW:
                return float(found[-1])
        return float(min(found))

    def matmuls(self, shape: Shape) -> Iterator[dict[str, Any]]:
        for name, (rows, cols) in shape.matmuls().items():
            formats = [f for f in shape.formats if f in self.formats and cols % BLOCKS[f][0] == 0]
            for dtype in formats if name == "gate, up" else formats[:1]:
                yield from self.matmul(shape, name, rows, cols, dtype)

    def matmul(
        self, shape: Shape, name: str, rows: int, cols: int, dtype: str
    ) -> Iterator[dict[str, Any]]:
        few = [t for t in self.tokens if t < MANY]
        many = [t for t in self.tokens if t >= MANY and name != "head"]
        for group, streamed in ((few, True), (many, False)):
            if not group:
                continue
            runner, count, one = self.bench.matmul(rows, cols, dtype, max(group), streamed)
            for tokens in group:
                took = self.clean(partial(seconds, runner, tokens)) / count
                yield {
                    "kernel": "matmul", "model": shape.name, "what": name, "format": dtype,
                    "rows": rows, "cols": cols, "tokens": tokens, "seconds": took,
                    "bytes": one, "ops": 2 * rows * cols * tokens,
                }  # fmt: skip

    def alone(self, work: Callable[[], float], rest: Callable[[], float]) -> float | None:
        """Seconds of a step less those of the same without the op; None if noise hides them."""

        def difference() -> float:
            whole = work()
            found = whole - rest()
            return found if found > 0.05 * whole else 0.0

        return self.clean(difference) or None

    def rowwise(self, shape: Shape) -> Iterator[dict[str, Any]]:
        kinds = {"rms_norm": (shape.hidden, 2), "add": (shape.hidden, 3),
                 "activate": (shape.intermediate, 3)}  # fmt: skip
        for kind, (width, passes) in kinds.items():
            tokens = [t for t in self.tokens if t in (1, 16, 512)]
            loaded = self.bench.rowwise(kind, width, max(tokens), COPIES)
            empty = self.bench.rowwise(kind, width, max(tokens), 0)
            for t in tokens:
                took = self.alone(partial(seconds, loaded, t), partial(seconds, empty, t))
                yield {
                    "kernel": kind, "model": shape.name, "what": kind, "format": "f32",
                    "rows": 1, "cols": width, "tokens": t,
                    "seconds": took and took / COPIES,
                    "bytes": passes * width * 4 * t, "ops": 0,
                }  # fmt: skip

    def attention(self, shape: Shape) -> Iterator[dict[str, Any]]:
        past = kv_block_bytes(1, shape.kv_heads, shape.head_dim, "bf16") * CONTEXT // KV_BLOCK
        tokens = [t for t in self.tokens if t in (1, 8, 64)] or [1]
        runner = self.bench.attention(shape, CONTEXT + max(tokens), LAYERS, max(tokens))
        for t in tokens:
            took = self.alone(partial(seconds, runner, t, CONTEXT), partial(seconds, runner, t))
            yield {
                "kernel": "attention", "model": shape.name, "what": f"attention at {CONTEXT:,}",
                "format": "bf16", "rows": shape.heads, "cols": shape.head_dim, "tokens": t,
                "seconds": took and took / LAYERS, "bytes": past,
                "ops": 4 * shape.heads * shape.head_dim * CONTEXT * t,
            }  # fmt: skip

    def run(self) -> list[dict[str, Any]]:
        rows = []
        for shape in SHAPES:
            for group in (self.matmuls, self.rowwise, self.attention):
                for row in group(shape):
                    rows.append(row)
                    took = "too short" if not row["seconds"] else f"{row['seconds'] * 1e6:.1f} us"
                    what = f"{row['model']}: {row['what']}, {row['format']}, {row['tokens']} tokens"
                    print(f"{what}: {took}", file=sys.stderr, flush=True)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default="", help="kernels to use (default: the best)")
    parser.add_argument("--quick", action="store_true", help="three token counts only")
    output.add_output(parser)
    args = parser.parse_args()
    if args.isa and args.isa not in isas():
        raise SystemExit(f"kernels.py: this machine runs {', '.join(isas())}, not {args.isa}")
    kernels = Kernels(args)
    rows = kernels.run()
    result = {
        "benchmark": "kernels",
        "command": output.command(),
        "machine": describe(args.threads),
        "isa": kernels.isa,
        "limits": kernels.best.figures,
        "peak": "int8_tiles" if kernels.isa in TILE_ISAS else "int8",
        "rows": rows,
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
