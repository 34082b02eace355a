"""``pronk eval --positions`` and ``--long``: what a model makes of long texts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pronk.commands import common
from pronk.errors import RequestError

if TYPE_CHECKING:
    from pronk.evaluate.corpus import Corpus
    from pronk.evaluate.needle import Trial
    from pronk.model import Model

__all__ = ["configure", "run", "unscaled"]

_LONGEST = 8192  # tokens of a run unless the user says otherwise
_RUNS = 4  # contexts of text that are read unless the user says otherwise


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("long contexts")
    group.add_argument(
        "--positions", action="store_true",
        help="perplexity against position, with and without --attention and --rope-scaling",
    )  # fmt: skip
    group.add_argument(
        "--long", action="store_true",
        help="the same, and whether sentences hidden in long texts are found again",
    )  # fmt: skip
    group.add_argument(
        "--context", type=int, metavar="N",
        help=f"tokens read at once (default: the model's own context, at most {_LONGEST})",
    )  # fmt: skip
    group.add_argument(
        "--bucket", type=int, metavar="N", help="positions scored together (default: 256 or 512)"
    )
    group.add_argument(
        "--needles", type=int, default=2, metavar="N",
        help="hidden sentences for each length and depth (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed, same hidden sentences"
    )
    common.add_plot(group, "draw it")


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.open import open_checkpoint
    from pronk.checkpoint.sources import resolve
    from pronk.evaluate.corpus import load_corpus
    from pronk.evaluate.long_view import format_long, plot
    from pronk.evaluate.positions import default_bucket
    from pronk.graph.attention import adapted

    if args.needles < 1:
        raise RequestError(f"--needles must be at least 1, not {args.needles}")
    corpus = load_corpus(args.text)
    path = resolve(args.model)
    with open_checkpoint(path) as checkpoint:
        spec = adapted(checkpoint.spec, None, args.rope_scaling)
    context = min(spec.context_length, _LONGEST) if args.context is None else args.context
    if context < 2:
        raise RequestError(f"the context must be at least 2 tokens, not {context}")
    bucket = min(default_bucket(context), context) if args.bucket is None else args.bucket
    work = _Work(args, str(path), corpus, context, bucket)
    variants = [work.measure("as it is", None, unscaled(args.rope_scaling))]
    changes = [text for text in (args.attention, args.rope_scaling) if text]
    if changes:
        variants.append(work.measure(", ".join(changes), args.attention, args.rope_scaling))
    result: dict[str, Any] = {
        "model": str(path),
        "text": corpus.name,
        "context": context,
        "bucket": bucket,
        "seed": args.seed,
        "variants": variants,
    }
    if args.plot is not None:
        plot(args.plot, spec.name or path.name, result)
    if args.json:
        common.print_json(result)
    else:
        print(*format_long(result), sep="\n")


def unscaled(rope_scaling: str | None) -> str | None:
    """What runs a model as it was made, as far past its context as ``--rope-scaling`` goes."""
    return f"none:{rope_scaling.partition(':')[2]}" if rope_scaling else None


class _Work:
    """The text and the questions, which are the same for every variant of a model."""

    def __init__(
        self, args: argparse.Namespace, path: str, corpus: Corpus, context: int, bucket: int
    ) -> None:
        self.args, self.path, self.corpus = args, path, corpus
        self.context, self.bucket = context, bucket
        self._trials: list[Trial] | None = None

    def measure(self, name: str, attention: str | None, rope_scaling: str | None) -> dict[str, Any]:
        """The figures of the model loaded in one way."""
        from pronk.commands.progress import Progress
        from pronk.evaluate.corpus import encode
        from pronk.evaluate.needle import find_needles
        from pronk.evaluate.positions import by_position

        changes = {"attention": attention, "rope_scaling": rope_scaling}
        args = argparse.Namespace(**{**vars(self.args), **changes})
        model, _ = common.open_model(self.path, args, self.context)
        with model:
            words = model.tokenizer
            ids = encode(self.corpus, words, args.max_tokens or _RUNS * self.context)
            with Progress(f"positions, {name}") as progress:
                buckets = by_position(model, ids, self.context, self.bucket, words.bos_id, progress)
            result: dict[str, Any] = {
                "name": name,
                **changes,
                "kv": model.memory.kv,
                "positions": [one.to_dict() for one in buckets],
            }
            if args.long:
                with Progress(f"hidden sentences, {name}") as progress:
                    cells = find_needles(model, self._asked(model), words.eos_ids, progress)
                result["needles"] = [cell.to_dict() for cell in cells]
        return result

    def _asked(self, model: Model) -> list[Trial]:
        from pronk.evaluate.needle import Haystack, default_lengths, make_trials

        if self._trials is None:
            words = model.tokenizer
            ids = words.encode(self.corpus.text, add_special=False, parse_special=False)
            lengths = default_lengths(self.context)
            self._trials = list(
                make_trials(
                    model, Haystack(ids), lengths, needles=self.args.needles, seed=self.args.seed
                )
            )
        return self._trials
