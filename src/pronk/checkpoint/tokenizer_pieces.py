"""The SentencePiece model in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronk._native import Pieces
from pronk.checkpoint.gguf_header import GgufHeader
from pronk.checkpoint.tokenizer_backends import (
    CONTROL,
    UNKNOWN,
    USER,
    PieceBackend,
    add_tokens,
    surround,
)
from pronk.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

__all__ = ["read_pieces"]

_NORMAL = 1
_SPACE = "\u2581"
# Phi-3's marks take the white space behind them, but for these; its GGUF files do not say so.
_PLAIN_MARKS = ("<unk>", "<s>", "<|endoftext|>")


def read_pieces(
    header: GgufHeader,
    kinds: NDArray[np.uint8],
    unknown: int | None,
    before: Sequence[int],
    after: Sequence[int],
) -> PieceBackend:
    """The pieces, and how texts begin and end.

    Raises
    ------
    CheckpointError
        If a piece is there twice or has no score.
    ValueError
        If the pieces are damaged.
    """
    path, meta = header.path, header.metadata
    raw, count = header.packed_strings("tokenizer.ggml.tokens") or (b"", 0)
    scores = header.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != count:
        raise CheckpointError(f"{path} holds a llama tokenizer without a score for each token")
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    unk = -1 if unknown is None else unknown

    def build(eat: list[int]) -> Pieces:
        return Pieces(raw, scores.astype(np.float32).tobytes(), kinds.tobytes(), prefix, unk, eat)

    pieces = build([])
    if pieces.twice >= 0:
        twice = pieces.piece(pieces.twice)
        raise CheckpointError(f"{path} holds the token {twice[:40]!r} twice")
    eat: list[int] = []
    if meta.get("general.architecture") == "phi3":
        marks = np.flatnonzero((kinds == CONTROL) | (kinds == UNKNOWN) | (kinds == USER)).tolist()
        eat = [id for id in marks if pieces.piece(id) not in _PLAIN_MARKS]
        pieces = build(eat)
    library = partial(_library, pieces, unknown, prefix, before, after, eat)
    return PieceBackend(pieces, prefix, before, after, library)


def _library(
    pieces: Pieces,
    unknown: int | None,
    prefix: bool,
    before: Sequence[int],
    after: Sequence[int],
    eat: Sequence[int],
) -> Library:
    """The same for the ``tokenizers`` package."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    tokens = [pieces.piece(id) for id in range(len(pieces))]
    kinds = [pieces.kind(id) for id in range(len(pieces))]
    library = Library(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=_merges(pieces, tokens, kinds),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    steps.append(normalizers.Replace(" ", _SPACE))
    library.normalizer = normalizers.Sequence(steps)
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        back.append(decoders.Strip(" ", 1, 0))
    library.decoder = decoders.Sequence(back)
    takers = frozenset(eat)
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER, False)):
        marked = [id for id, of in enumerate(kinds) if of == kind]
        for taking in (False, True):
            some = [tokens[id] for id in marked if (id in takers) == taking]
            add_tokens(library, some, special, taking)
    surround(library, [(tokens[id], id) for id in before], [(tokens[id], id) for id in after])
    return library


def _merges(pieces: Pieces, tokens: list[str], kinds: list[int]) -> list[tuple[str, str]]:
    """The pairs that join to a piece, the best score first."""
    plain = {token: id for id, token in enumerate(tokens) if kinds[id] == _NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for token, id in plain.items():
        for cut in range(1, len(token)):
            left = plain.get(token[:cut])
            if left is None:
                continue
            right = plain.get(token[cut:])
            if right is not None:
                found.append((-pieces.score(id), left, right, token[:cut], token[cut:]))
    found.sort()
    return [(left, right) for *_, left, right in found]
