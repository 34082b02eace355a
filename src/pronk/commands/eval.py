"""``pronk eval``: perplexity on a text, divergence from a reference, and long contexts."""

from __future__ import annotations

import argparse
from typing import Any

from pronk.commands import common, long
from pronk.errors import RequestError

__all__ = ["configure", "run"]


_MOST_OF_TOPICS = 4096


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    common.add_model(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: Python's topics)")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="also report KL from this model as made, its KV in bf16",
    )
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens at a time")
    parser.add_argument("--stride", type=int, metavar="N", help="default: half the window")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N",
        help="use the first N (default: all of FILE, or 4096 of Python's topics)",
    )  # fmt: skip
    long.configure(parser)
    common.add_runtime(parser)
    common.add_experts(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.commands.progress import Progress
    from pronk.evaluate.corpus import encode, load_corpus
    from pronk.evaluate.divergence import divergence
    from pronk.evaluate.perplexity import perplexity
    from pronk.evaluate.profile_view import check_plot
    from pronk.evaluate.sparsity import activity

    if args.max_tokens is not None and args.max_tokens < 2:
        raise RequestError(f"--max-tokens must be 2 or more, not {args.max_tokens}")
    if args.positions or args.long:
        if args.reference:
            raise RequestError("--reference compares windows: leave --positions and --long out")
        if args.plot is not None:
            check_plot(args.plot)
        long.run(args)
        return
    if args.context is not None or args.plot is not None:
        raise RequestError("--context and --plot are for long contexts: give --positions or --long")
    corpus = load_corpus(args.text)
    most = args.max_tokens or (_MOST_OF_TOPICS if args.text is None else None)
    model, _ = common.open_model(args.model, args, args.window)
    ids = encode(corpus, model.tokenizer, most)
    bos = model.tokenizer.bos_id
    if args.sparse_mlp is not None:
        model.watch()
    options = {"window": args.window, "stride": args.stride, "bos": bos}
    with Progress("perplexity") as progress:
        result: dict[str, Any] = {
            "model": str(model.path),
            "text": corpus.name,
            "window": args.window,
            "stride": args.stride or max(1, args.window // 2),
            **perplexity(model, ids, progress=progress, **options).to_dict(),
        }
    if args.sparse_mlp is not None:
        result["sparse"] = activity(model.activity()).to_dict()
        model.watch(False)
    if args.reference:
        as_made = {
            "kv": "bf16", "activations": "int12", "attention": None, "dynamic_experts": "",
            "sparse_mlp": None, "rope_scaling": long.unscaled(args.rope_scaling),
        }  # fmt: skip
        exact = argparse.Namespace(**{**vars(args), **as_made})
        reference, _ = common.open_model(args.reference, exact, args.window)
        with Progress("divergence") as progress:
            compared = divergence(reference, model, ids, progress=progress, **options)
        result |= {"reference": str(reference.path), **compared.to_dict()}
    if args.json:
        common.print_json(result)
        return
    print(f"{corpus.name}: {result['tokens']} tokens, window {args.window}, "
          f"stride {result['stride']}")  # fmt: skip
    print(f"perplexity {result['perplexity']:.4f}")
    if args.sparse_mlp is not None:
        print(f"{result['sparse']['skipped']:.1%} of the MLPs' activations were zero")
    if args.reference:
        print(f"KL {result['kl']:.6f} nats a token, top-1 agreement {result['top1_agreement']:.2%}")
