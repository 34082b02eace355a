"""``pronk bench --context N``: what a whole context costs, with and without ``--attention``.

``python -m pronk.commands.depth JSON`` measures one run, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from pronk.commands import common
from pronk.device.child import run_json
from pronk.device.memory import peak_memory
from pronk.errors import PronkError

if TYPE_CHECKING:
    from pronk.model import Model

__all__ = ["measure"]

_WARM = 64  # tokens: what a process does slowly the first time needs no whole context


def measure(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Rounds in which full attention and the policy (if there is one) take turns.

    Parameters
    ----------
    args : argparse.Namespace
        Of ``pronk bench``, with a context.
    path : str
        The model's path.

    Returns
    -------
    dict
        ``depth`` of ``pronk bench --json``.
    """
    from pronk.commands.progress import Progress
    from pronk.evaluate.depth import summarize

    policy = getattr(args, "attention", None)
    policies = {"full": None} | ({"policy": policy} if policy else {})
    # What a child needs to load the model alike, whatever options there are.
    options = {
        name: value
        for name, value in vars(args).items()
        if value is None or isinstance(value, str | int | float)
    }
    rounds = []
    with Progress(f"measuring at {args.context} tokens") as progress:
        for turn in range(args.runs):
            one: dict[str, dict[str, Any]] = {}
            for i, (name, attention) in enumerate(policies.items()):
                progress(turn * len(policies) + i, args.runs * len(policies))
                asked = options | {"model": path, "attention": attention}
                one[name] = run_json("pronk.commands.depth", [json.dumps(asked)])
            rounds.append(one)
    first = rounds[0]["full"]
    result: dict[str, Any] = {
        "context": args.context,
        "attention": policy,
        "prompt_tokens": first["prompt_tokens"],
        "tokens": first["tokens"],
        **summarize(rounds),
    }
    if policy:
        result["quality"] = _compare(args, path)
    return result


def _compare(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """What the policy changes on the last quarter of a context."""
    from pronk.commands.progress import Progress
    from pronk.evaluate.depth import compare

    without = argparse.Namespace(**{**vars(args), "attention": None})
    reference, _ = common.open_model(path, without, args.context)
    with reference:
        model, _ = common.open_model(path, args, args.context)
        with model, Progress("comparing") as progress:
            ids = _text(model, args.context)
            first = max(1, len(ids) - max(1, len(ids) // 4))
            return compare(reference, model, ids, first, progress).to_dict()


def _text(model: Model, tokens: int) -> list[int]:
    from pronk.evaluate.corpus import default_corpus, encode
    from pronk.evaluate.depth import fill

    return fill(encode(default_corpus(), model.tokenizer, max(tokens, 2)), tokens)


def _one(args: argparse.Namespace) -> dict[str, Any]:
    """Read a prompt that leaves room for the answer alone, and answer."""
    from pronk.evaluate.latency import latency

    model, _ = common.open_model(args.model, args, args.context)
    with model:
        prompt = _text(model, args.context - args.tokens)
        latency(model, prompt[:_WARM], min(2, args.tokens), runs=1, warmup=0)
        figures = latency(model, prompt, args.tokens, runs=1, warmup=0)
        return {
            **figures.to_dict(),
            "kv": model.memory.kv,
            "memory": model.memory.to_dict(),
            "peak_memory": peak_memory(),
        }


def _main(arguments: list[str]) -> int:
    try:
        print(json.dumps(_one(argparse.Namespace(**json.loads(arguments[0])))))
    except PronkError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
