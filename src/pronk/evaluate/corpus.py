"""The texts that models are measured on."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pronk.errors import RequestError

__all__ = ["Corpus", "default_corpus", "encode", "load_corpus"]

_MOST_BYTES = 256 << 20


class _Encoder(Protocol):
    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text and the name it goes by in reports."""

    name: str
    text: str


def default_corpus() -> Corpus:
    """The topics of Python's own documentation, which every machine with Pronk has.

    In the order of their names. They differ a little between Python versions, so the name
    says which: compare figures of one name only.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key].strip() for key in sorted(topics))
    return Corpus(f"python-{sys.version_info[0]}.{sys.version_info[1]}-topics", text)


def load_corpus(path: str | os.PathLike[str] | None = None) -> Corpus:
    """The text of a UTF-8 file, or the default text without one.

    Raises
    ------
    RequestError
        If the file is missing, not a file, empty, larger than 256 MiB or not UTF-8.
    """
    if path is None:
        return default_corpus()
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise RequestError(f"the text {file} does not exist") from None
    except OSError as error:
        raise RequestError(f"the text {file} cannot be read: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise RequestError(f"the text {file} is larger than 256 MiB: give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the text {file} is not UTF-8 (byte {error.start}): convert it first"
        ) from None
    if not text.strip():
        raise RequestError(f"the text {file} is empty")
    return Corpus(file.name, text)


def encode(corpus: Corpus, tokenizer: _Encoder, most: int | None = None) -> list[int]:
    """The corpus as token ids, the first `most` of them.

    Special tokens are added as the tokenizer does, and not read out of the text.

    Raises
    ------
    RequestError
        If fewer than two tokens come out.
    """
    text = corpus.text
    # A token is rarely longer than 16 characters; where it is, encode all of it after all.
    head = text if most is None or len(text) <= 16 * most else text[: 16 * most]
    ids = tokenizer.encode(head, parse_special=False)
    if most is not None and len(ids) <= most and len(head) < len(text):
        ids = tokenizer.encode(text, parse_special=False)
    if most is not None:
        ids = ids[:most]
    if len(ids) < 2:
        raise RequestError(
            f"the text {corpus.name} is too short: {len(ids)} token(s), and 2 are needed"
        )
    return ids
