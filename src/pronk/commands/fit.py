"""``pronk fit``: the best variant of a model that holds a budget, written and measured."""

from __future__ import annotations

import argparse

from pronk.commands import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    common.add_model(parser)
    parser.add_argument(
        "--memory", required=True, metavar="SIZE",
        help="peak resident memory of the whole process, such as 200MB")  # fmt: skip
    parser.add_argument("--context", type=int, metavar="N", help="tokens that must fit at once")
    parser.add_argument("-o", "--output", metavar="DIR", help="where the bundle goes")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure perplexity on")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: all cores)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pathlib import Path

    from pronk.checkpoint.sources import resolve
    from pronk.commands.progress import Progress
    from pronk.compress.fit import fit
    from pronk.compress.fit_view import print_report
    from pronk.evaluate.corpus import load_corpus
    from pronk.model import choose_threads
    from pronk.units import parse_size

    # What is wrong with a request is said before the weights are quantized, not after.
    memory = parse_size(args.memory)
    load_corpus(args.text)
    choose_threads(args.threads)
    source = resolve(args.model)
    output = Path(args.output or f"{source.stem}-{args.memory}")
    with Progress("fitting") as progress:
        report = fit(
            source, memory, args.context, output,
            text=args.text, threads=args.threads, progress=progress.stage)  # fmt: skip
    if args.json:
        common.print_json(report.to_dict())
    else:
        print_report(report)
