"""``--sparse-mlp kl=0.01``: thresholds calibrated once for a model, and kept in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronk.graph.attention import AttentionPolicy
    from pronk.graph.sparse import SparseMlp
    from pronk.model import Model

__all__ = ["choose_sparse", "measure"]

_BEFORE = 256  # tokens that are read before those compared
_ROWS = 512  # positions compared, as far as ...
_LOGITS = 128 << 20  # ... their logits take no more bytes


def choose_sparse(
    path: Path, args: argparse.Namespace, attention: AttentionPolicy | None
) -> SparseMlp | None:
    """What ``--sparse-mlp`` asks for, with its thresholds: calibrated where it leaves them open.

    Parameters
    ----------
    path : Path
        The checkpoint.
    args : Namespace
        What `common.add_runtime` declares.
    attention : AttentionPolicy or None
        What ``--attention`` came to (see `pronk.commands.choice.choose`).

    Raises
    ------
    RequestError
        If the model has no MLP for it, or the option is not understood.
    """
    asked = getattr(args, "sparse_mlp", None)
    if asked is None:
        return None
    from pronk.checkpoint.open import open_checkpoint
    from pronk.checkpoint.packed_cache import content_hash
    from pronk.commands import common
    from pronk.commands.kept import file_of, keep
    from pronk.evaluate.corpus import default_corpus
    from pronk.graph.sparse import SparseMlp, has_mlp, parse_sparse

    policy = parse_sparse(asked)
    with open_checkpoint(path) as checkpoint:
        has_mlp(checkpoint.spec)
        if policy.thresholds:
            return policy
        key = [content_hash(checkpoint.files), default_corpus().name, policy.kl, policy.keep]
    file = file_of("sparse", [*key, args.attention, args.rope_scaling])
    thresholds = _remembered(file)
    if thresholds is None:
        data = _calibrate(path, args, policy, attention)
        keep(file, data)
        thresholds = tuple(data["thresholds"])
        common.note(
            f"pronk: {data['skipped']:.1%} of the MLPs' activations are zero, KL {data['kl']:.4f} "
            f"nats a token on {data['text']}; thresholds are in {file}"
        )
    return SparseMlp(thresholds)


def _remembered(file: Path) -> tuple[float, ...] | None:
    from pronk.commands.kept import kept

    try:
        return tuple(map(float, kept(file)["thresholds"])) or None
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def _calibrate(
    path: Path, args: argparse.Namespace, policy: SparseMlp, attention: AttentionPolicy | None
) -> dict[str, Any]:
    from pronk.commands.progress import Progress
    from pronk.evaluate.corpus import default_corpus, encode
    from pronk.evaluate.sparsity import calibrate
    from pronk.model import load

    corpus = default_corpus()
    with (
        load(
            path, getattr(args, "threads", None), attention=attention,
            rope_scaling=args.rope_scaling, speculate=False,
        ) as model,
        Progress("calibrating MLPs") as progress,
    ):  # fmt: skip
        rows = max(1, min(_ROWS, _LOGITS // (4 * model.spec.vocab_size), model.context // 2))
        ids = encode(corpus, model.tokenizer, min(_BEFORE + rows, model.context))
        found = calibrate(
            model, ids, min(rows, len(ids) - 1), kl=policy.kl, keep=policy.keep, progress=progress
        )
        return {"model": model.spec.name, "text": corpus.name, **found.to_dict()}


def measure(
    args: argparse.Namespace, path: str, sparse: Model, prompt: list[int]
) -> dict[str, Any]:
    """``sparse`` of ``pronk bench --json``: how much was zero, and the speed with and without.

    Parameters
    ----------
    args : Namespace
        Of ``pronk bench``.
    path : str
        The model's path.
    sparse : Model
        As `args` ask for it.
    prompt : list of int
        Both read it, in turns.
    """
    from statistics import median

    from pronk.commands import common
    from pronk.evaluate.latency import latency
    from pronk.evaluate.sparsity import activity

    sparse.watch()
    latency(sparse, prompt, args.tokens, runs=1, warmup=0)
    shares = activity(sparse.activity())
    sparse.watch(False)
    dense, _ = common.open_model(path, argparse.Namespace(**{**vars(args), "sparse_mlp": None}),
                                 args.context)  # fmt: skip
    with dense:
        rounds = [
            [latency(model, prompt, args.tokens, runs=1, warmup=turn == 0)
             for model in (dense, sparse)]
            for turn in range(args.runs)
        ]  # fmt: skip
    speeds = {
        key: {
            "without": median(getattr(a, key) for a, _ in rounds),
            "with": median(getattr(b, key) for _, b in rounds),
            "ratio": median(getattr(b, key) / getattr(a, key) for a, b in rounds),
        }
        for key in ("prefill", "decode")
    }
    return {"asked": args.sparse_mlp, **shares.to_dict(), **speeds}
