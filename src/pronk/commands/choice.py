"""``--attention window=512,global=auto:8``: the layers chosen once for a model, and remembered."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pronk.commands.kept import file_of, keep, kept
from pronk.errors import RequestError

if TYPE_CHECKING:
    from pronk.graph.attention import AttentionPolicy
    from pronk.model import Model

__all__ = ["choose"]

_LEAST_TOKENS = 1536  # of the text that layers are measured on
_ROWS = 256  # its last positions, which are compared


def choose(path: Path, args: argparse.Namespace) -> AttentionPolicy | None:
    """The policy of ``--attention`` with its layers, measured where it leaves them open.

    Parameters
    ----------
    path : Path
        The checkpoint.
    args : Namespace
        What `common.add_attention` declares, and perhaps ``threads``.

    Raises
    ------
    RequestError
        If the policy does not fit the model.
    """
    if args.attention is None:
        return None
    from pronk.graph.attention import parse_policy

    policy = parse_policy(args.attention)
    if not policy.auto:
        return policy
    from pronk.checkpoint.open import open_checkpoint
    from pronk.checkpoint.packed_cache import content_hash
    from pronk.commands import common
    from pronk.evaluate.attention import choose_global
    from pronk.evaluate.corpus import default_corpus

    corpus = default_corpus()
    with open_checkpoint(path) as checkpoint:
        key = [content_hash(checkpoint.files), corpus.name, policy.window, policy.sinks]
    file = file_of("attention", [*key, args.rope_scaling])
    divergence = _remembered(file)
    if divergence is None:
        divergence = _measure(path, args, policy)
        keep(file, divergence)
    layers = choose_global(divergence, policy.auto)
    common.note(f"pronk: layers {':'.join(map(str, layers))} stay global")
    return replace(policy, layers=layers, auto=0)


def _measure(path: Path, args: argparse.Namespace, policy: AttentionPolicy) -> dict[int, float]:
    from pronk.checkpoint.open import open_checkpoint
    from pronk.commands.progress import Progress
    from pronk.evaluate.attention import window_divergence
    from pronk.evaluate.corpus import default_corpus, encode
    from pronk.graph.attention import adapted, apply_policy
    from pronk.model import load

    with open_checkpoint(path) as checkpoint:
        spec = adapted(checkpoint.spec, None, args.rope_scaling)
    everywhere = apply_policy(spec, replace(policy, auto=0)).layers
    pairs = enumerate(zip(spec.layers, everywhere, strict=True))
    open_to_choice = [i for i, (before, after) in pairs if before != after]
    tokens = min(max(_LEAST_TOKENS, 2 * policy.window), spec.context_length)
    if tokens <= policy.window:
        raise RequestError(
            f"a window of {policy.window} positions is no less than the model's context of "
            f"{spec.context_length}: give a shorter one"
        )

    def loaded(attention: AttentionPolicy | None) -> Model:
        return load(
            path, getattr(args, "threads", None), tokens, attention=attention,
            rope_scaling=args.rope_scaling, speculate=False,
        )  # fmt: skip

    @contextlib.contextmanager
    def windowed(layer: int) -> Iterator[Model]:
        others = tuple(i for i in range(spec.num_layers) if i != layer)
        with loaded(replace(policy, layers=others, auto=0)) as model:
            yield model

    with loaded(None) as reference, Progress("measuring layers") as progress:
        ids = encode(default_corpus(), reference.tokenizer, tokens)
        rows = min(_ROWS, max(1, len(ids) - policy.window))
        return window_divergence(reference, windowed, open_to_choice, ids, rows, progress)


def _remembered(file: Path) -> dict[int, float] | None:
    try:
        return {int(layer): float(value) for layer, value in kept(file).items()}
    except (ValueError, TypeError, AttributeError):
        return None
