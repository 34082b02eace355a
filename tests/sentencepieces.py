"""A SentencePiece model written out, so that the ``sentencepiece`` package runs it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

__all__ = ["processor"]

_BPE = 2


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _block(field: int, raw: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(raw)) + raw


def processor(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], prefix: bool
) -> Any:
    """A processor of the BPE kind; of the kinds, numbered as in GGUF, one must be unknown (2).

    Only the fields that matter are written: sentencepiece_model.proto has their numbers.
    """
    import sentencepiece

    raw = bytearray()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        fields = _block(1, piece.encode()) + struct.pack("<Bf", 2 << 3 | 5, score)
        raw += _block(1, fields + _number(3, kind))
    trainer = _number(3, _BPE) + _number(35, True)  # byte_fallback
    names = {piece: id for id, piece in enumerate(pieces)}
    for field, id in ((40, kinds.index(2)), (41, names["<bos>"]), (42, names["<eos>"])):
        trainer += _number(field, id)
    # The normalizer: add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces.
    normalizer = _block(1, b"identity") + _number(3, prefix) + _number(4, False) + _number(5, True)
    raw += _block(2, trainer) + _block(3, normalizer)
    return sentencepiece.SentencePieceProcessor(model_proto=bytes(raw))
