"""What a process of Pronk takes before any weights: interpreter, libraries and tokenizer.

``python -m pronk.device.footprint PATH`` measures it in the process it runs in; `measure`
starts that as a fresh process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TYPE_CHECKING

from pronk.device.child import run_json
from pronk.device.memory import peak_memory, resident_memory, trim
from pronk.errors import PronkError

if TYPE_CHECKING:
    from pronk.checkpoint.tokenizer import Tokenizer

__all__ = ["RUN_MODULES", "measure"]

RUN_MODULES = (
    "numpy",
    "jinja2.sandbox",
    "pronk.cli",
    "pronk.commands.run",
    "pronk.model",
    "pronk._native",
    "pronk.engine.sampler",
    "pronk.serve.chat",
    "pronk.serve.stream",
)
"""What ``pronk run`` imports."""

ALLOWANCE = 3_000_000
"""Bytes allowed for temporaries: buffers of weights being read, rows of logits, the allocator."""


def measure(path: str | os.PathLike[str]) -> int:
    """Resident bytes of a fresh process that does all of ``pronk run`` but the model.

    With `ALLOWANCE` on top, for what comes and goes while weights are read and tokens are made.
    What reading the tokenizer needed for a moment is not in it: that is given back before the
    weights come, and they take its place. Where the model is smaller than that, the peak of
    the process is this moment's and not the sum of the plan.

    Raises
    ------
    PronkError
        If the process fails.
    """
    overhead = run_json("pronk.device.footprint", [os.fspath(path)], timeout=600).get("overhead")
    if type(overhead) is not int or overhead <= 0:
        raise PronkError("python -m pronk.device.footprint did not print its overhead")
    return overhead + ALLOWANCE


def _exercise(path: str) -> Tokenizer:
    modules = {name: importlib.import_module(name) for name in RUN_MODULES}
    from pronk.checkpoint.open import open_checkpoint
    from pronk.checkpoint.sources import resolve

    with open_checkpoint(resolve(path)) as ckpt:
        tokenizer = ckpt.load_tokenizer()
    text = "Explain why the sky is blue, in two sentences that a child would understand."
    if tokenizer.chat_template:
        text = modules["pronk.serve.chat"].render(
            tokenizer.chat_template,
            [{"role": "user", "content": text}],
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )
    tokenizer.decode(tokenizer.encode(text))
    return tokenizer


def _main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m pronk.device.footprint PATH", file=sys.stderr)
        return 2
    try:
        # Held until the memory is read: it stays as long as a model does.
        tokenizer = _exercise(arguments[0])
    except PronkError as error:
        print(error, file=sys.stderr)
        return 2
    trim()
    now, peak = resident_memory(), peak_memory()
    del tokenizer
    print(json.dumps({"overhead": now, "peak": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
