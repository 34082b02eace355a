"""What a long context costs, and what attention policies and a rope scaling change.

python benchmarks/long_context.py [MODEL] [--context 8192] [--attention POLICY ...]
    [--rope-scaling yarn:2] [--runs 3] [--needles 2] [--out FILE.json]

Runs `pronk bench` and `pronk eval` as a user does; full attention is measured beside every policy.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import output
from machine import describe
from verb import pronk

POLICIES = ("window=512,global-every=4", "window=512,global-every=4,sinks=4")
GOALS = {"kv_saved": 0.4, "decode": 1.8}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the result."""
    model, context = args.model, str(args.context)
    policies = args.attention or POLICIES
    depths, variants, scaling = [], [], None
    for policy in policies:
        words = ("--context", context, "--attention", policy)
        found = pronk("bench", model, *words, "--runs", str(args.runs))
        depths.append(found["depth"])
        text = ("--max-tokens", str(args.tokens), "--needles", str(args.needles))
        plain, changed = pronk("eval", model, "--long", *words, *text)["variants"]
        if variants and plain != variants[0]:  # it has no reason to
            raise SystemExit("two runs with full attention differ")
        variants = [plain, *variants[1:], changed]
    if args.rope_scaling != "none":
        longer = 2 * args.context
        scaling = pronk(
            "eval", model, "--positions", "--rope-scaling", args.rope_scaling,
            "--context", str(longer), "--bucket", str(longer // 16), "--max-tokens", str(longer),
        )  # fmt: skip
        scaling = {"context": longer, "variants": scaling["variants"]}
    return {"goals": GOALS, "depths": depths, "variants": variants, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--attention", action="append", metavar="POLICY", help="repeatable")
    parser.add_argument("--rope-scaling", default="yarn:2", metavar="KIND:FACTOR",
                        help="at twice the context; none leaves it out")  # fmt: skip
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--needles", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, help="of text, for the perplexity")
    output.add_output(parser)
    args = parser.parse_args()
    result = {
        "benchmark": "long_context",
        "command": output.command(),
        "machine": describe(len(os.sched_getaffinity(0))),
        "model": Path(args.model).name,
        "context": args.context,
        **measure(args),
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
