"""What static int8 ranges of activations cost, beside scales that are taken as tokens come.

In torch, on the weights as the checkpoint has them; only the inputs of matrices are rounded.

    python benchmarks/static_activations.py [MODEL] --calibration FILE --text FILE [--out FILE.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import output
from machine import describe

from pronk import resolve
from pronk.checkpoint.open import open_checkpoint
from pronk.compress import static
from pronk.compress.calibrate import read_calibration
from pronk.compress.forward import Decoder, set_threads
from pronk.errors import PronkError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--calibration", metavar="FILE", help="to set ranges on")
    parser.add_argument("--text", metavar="FILE", help="to judge on")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration")
    parser.add_argument("--judged", type=int, default=8, help="windows to judge on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    output.add_output(parser)
    args = parser.parse_args()
    try:
        set_threads(args.threads)
        with open_checkpoint(resolve(args.model)) as ckpt:
            text = read_calibration(ckpt, args.calibration, args.samples, args.seed)
            judged = read_calibration(ckpt, args.text, args.judged, args.seed)
            seen = static.observe(ckpt, Decoder(ckpt.spec), text.windows)
            roundings = {
                how: static.with_scales({name: one.scale(how) for name, one in seen.items()})
                for how in static.OBSERVERS
            }
            roundings |= {"by token": static.by_token, "by group": static.by_group}
            found = static.losses(ckpt, judged.windows, roundings)
    except PronkError as error:
        raise SystemExit(f"static_activations.py: {error}") from None
    result = {
        "benchmark": "static_activations",
        "command": output.command(),
        "machine": describe(args.threads),
        "model": Path(args.model).name,
        "tokens": judged.windows.size,
        "rows": [{"ranges": name, **row} for name, row in found.items()],
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
