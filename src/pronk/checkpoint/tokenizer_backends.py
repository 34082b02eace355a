"""What does a tokenizer's work: the ``tokenizers`` package, or SentencePiece's pieces natively."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

    from pronk._native import Pieces

__all__ = [
    "CONTROL",
    "UNKNOWN",
    "USER",
    "Backend",
    "LibraryBackend",
    "PieceBackend",
    "add_tokens",
    "surround",
]

UNKNOWN, CONTROL, USER = 2, 3, 4
_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend(Protocol):
    """What a `Tokenizer` is made of. Ids given to it are within its range."""

    def size(self) -> int:
        """Tokens it knows, added ones included."""

    def find(self, token: str) -> int | None:
        """The id of a token."""

    def token(self, id: int) -> str:
        """The token of an id; empty where there is none."""

    def added(self) -> Sequence[int]:
        """The ids of added tokens, which may lie past the others."""

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of ids."""

    def token_bytes(self, id: int) -> bytes:
        """Exact bytes of a token; none for a special one."""

    def to_json(self) -> str:
        """It all as tokenizer.json."""


class LibraryBackend:
    """A tokenizer of the ``tokenizers`` package."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._lock = threading.Lock()
        tokens = library.get_added_tokens_decoder()
        self._added = {id: (token.content, token.special) for id, token in tokens.items()}
        self._decoder = _decoder_kinds(library)

    def size(self) -> int:
        """Tokens it knows, added ones included."""
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def find(self, token: str) -> int | None:
        """The id of a token."""
        return self._library.token_to_id(token)

    def token(self, id: int) -> str:
        """The token of an id; empty where there is none."""
        return self._library.id_to_token(id) or ""

    def added(self) -> Sequence[int]:
        """The ids of added tokens, which may lie past the others."""
        return list(self._added)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Ids of a text."""
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of ids."""
        return str(self._library.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, id: int) -> bytes:
        """Exact bytes of a token; none for a special one."""
        added = self._added.get(id)
        if added is not None:
            return b"" if added[1] else added[0].encode()
        token = self._library.id_to_token(id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoder:
            table = _byte_table()
            try:
                return bytes(table[char] for char in token)
            except KeyError:
                return token.encode()
        if "ByteFallback" in self._decoder:
            byte = _byte(token)
            if byte is not None:
                return byte
        if self._decoder & {"Replace", "Metaspace"}:
            token = token.replace(_SPACE, " ")
        return token.encode()

    def to_json(self) -> str:
        """It all as tokenizer.json."""
        with self._lock:
            self._library.encode_special_tokens = False
            return str(self._library.to_str())


class PieceBackend:
    """The pieces of a SentencePiece model.

    Parameters
    ----------
    pieces : Pieces
    prefix : bool
        Whether a space stands before every stretch of text.
    before, after : sequence of int
        Ids that every text begins and ends with.
    library : callable
        Builds the same for the ``tokenizers`` package, to be saved.
    """

    def __init__(
        self,
        pieces: Pieces,
        prefix: bool,
        before: Sequence[int],
        after: Sequence[int],
        library: Callable[[], Library],
    ) -> None:
        self._pieces, self._prefix = pieces, prefix
        self._before, self._after = list(before), list(after)
        self._library = library

    def size(self) -> int:
        """Tokens it knows."""
        return len(self._pieces)

    def find(self, token: str) -> int | None:
        """The id of a token."""
        id = self._pieces.find(token)
        return None if id < 0 else id

    def token(self, id: int) -> str:
        """The token of an id."""
        return self._pieces.piece(id)

    def added(self) -> Sequence[int]:
        """None that lie past the others."""
        return ()

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Ids of a text."""
        ids = self._pieces.encode(text, parse_special)
        return [*self._before, *ids, *self._after] if add_special else ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of ids."""
        parts: list[str] = []
        raw = b""
        for id in ids:
            if id >= len(self._pieces) or (skip_special and self._special(id)):
                continue
            token = self._pieces.piece(id)
            byte = _byte(token)
            if byte is not None:
                raw += byte
                continue
            parts += _characters(raw), token.replace(_SPACE, " ")
            raw = b""
        text = "".join([*parts, _characters(raw)])
        return text.removeprefix(" ") if self._prefix else text

    def token_bytes(self, id: int) -> bytes:
        """Exact bytes of a token; none for a special one."""
        if id >= len(self._pieces) or self._special(id):
            return b""
        token = self._pieces.piece(id)
        byte = _byte(token)
        return token.replace(_SPACE, " ").encode() if byte is None else byte

    def to_json(self) -> str:
        """It all as tokenizer.json."""
        return str(self._library().to_str())

    def _special(self, id: int) -> bool:
        return self._pieces.kind(id) in (CONTROL, UNKNOWN)


def add_tokens(
    library: Library, tokens: Sequence[str], special: bool = False, rstrip: bool = False
) -> None:
    """Have tokens stand wherever they are spelled; special ones are no text."""
    from tokenizers import AddedToken

    added = [AddedToken(t, special=special, normalized=False, rstrip=rstrip) for t in tokens if t]
    if special:
        library.add_special_tokens(added)
    else:
        library.add_tokens(added)


def surround(
    library: Library, first: Sequence[tuple[str, int]], last: Sequence[tuple[str, int]]
) -> None:
    """Have every text begin and end with the given tokens."""
    from tokenizers.processors import TemplateProcessing

    if not first and not last:
        return
    single = [f"{t}:0" for t, _ in first] + ["$A:0"] + [f"{t}:0" for t, _ in last]
    pair = [piece.replace("$A:0", "$B:1").removesuffix(":0") for piece in single]
    pair = [p if p == "$B:1" else f"{p}:1" for p in pair]
    library.post_processor = TemplateProcessing(
        single=single, pair=single + pair, special_tokens=list(dict.fromkeys([*first, *last]))
    )


def _byte(token: str) -> bytes | None:
    """The byte a token such as ``<0x0A>`` stands for."""
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else None


def _characters(raw: bytes) -> str:
    """The characters of some bytes; if they are none, a replacement for each byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(raw)


def _decoder_kinds(library: Library) -> frozenset[str]:
    """The types of the decoder's steps."""
    if library.decoder is None:
        return frozenset()
    state = json.loads(library.decoder.__getstate__())
    steps = state.get("decoders", [state])
    return frozenset(str(step.get("type")) for step in steps)


@lru_cache(maxsize=1)
def _byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes: the printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    table = {chr(byte): byte for byte in plain}
    table.update({chr(256 + at): byte for at, byte in enumerate(rest)})
    return table
