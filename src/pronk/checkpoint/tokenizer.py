"""Text to token ids and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from pronk.checkpoint.io import open_file, read_exact, read_json
from pronk.checkpoint.tokenizer_backends import Backend, LibraryBackend
from pronk.errors import CheckpointError, RequestError

__all__ = ["Tokenizer", "from_directory", "guarded"]

_MAX_FILE = 1 << 28
_MAX_TEMPLATE = 1 << 20
_KNOWN = 4096  # tokens whose bytes are kept: nearly all of what a model writes


class Tokenizer:
    """A model's tokenizer.

    Attributes
    ----------
    vocab_size : int
        Tokens it knows, added ones included.
    bos_id : int or None
    eos_ids : frozenset of int
        Every token that ends a generation: end of sequence, end of turn.
    bos_token, eos_token : str
        Their strings, for chat templates; empty where there is none.
    chat_template : str or None
    """

    def __init__(
        self,
        backend: Backend,
        *,
        limit: int,
        bos_token: str = "",
        eos_token: str = "",
        unk_token: str = "",
        pad_token: str = "",
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        where: Path,
    ) -> None:
        self._backend = backend
        self._bytes = lru_cache(_KNOWN)(backend.token_bytes)
        self._limit = limit
        self._where = where
        self.bos_token, self.eos_token = bos_token, eos_token
        self._others = {"unk_token": unk_token, "pad_token": pad_token}
        self.chat_template = chat_template
        self.vocab_size: int = backend.size()
        self.bos_id: int | None = backend.find(bos_token) if bos_token else None
        ends = list(eos_ids)
        eos = backend.find(eos_token) if eos_token else None
        if eos is not None:
            ends.append(eos)
        known = [*ends, *backend.added(), *([] if self.bos_id is None else [self.bos_id])]
        for id in known:
            if type(id) is not int or not 0 <= id < limit:
                raise CheckpointError(
                    f"{where} gives a special token the id {str(id)[:40]}, but its model has "
                    f"{limit} tokens"
                )
        self.eos_ids = frozenset(ends)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Parameters
        ----------
        add_special : bool
            Add what the model wants around a text, such as a beginning of sequence.
        parse_special : bool
            Read special tokens written out in the text as such, not as plain text.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("the text holds a lone surrogate, which is no character") from None
        with guarded(f"{self._where} has a tokenizer that fails on the text"):
            ids = self._backend.encode(text, add_special, parse_special)
        if ids and max(ids) >= self._limit:
            raise CheckpointError(
                f"{self._where} gives a token the id {max(ids)}, but its model has "
                f"{self._limit} tokens"
            )
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out unless asked for."""
        for id in ids:
            if not 0 <= id < self._limit:
                raise RequestError(f"token id {id} is out of range 0 to {self._limit - 1}")
        with guarded(f"{self._where} has a tokenizer that fails on the ids"):
            return self._backend.decode(ids, skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes a token adds to a text; none for a special token.

        A character may be spread over several tokens, so these need not be UTF-8.
        """
        if not 0 <= id < self._limit:
            raise RequestError(f"token id {id} is out of range 0 to {self._limit - 1}")
        return self._bytes(id)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and the ends of a generation.

        ``transformers.AutoTokenizer`` loads the directory and gives the same ids.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = self._backend.to_json()
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, **self._others}
        config.update({key: token for key, token in names.items() if token})
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        generation: dict[str, Any] = {}
        if self.eos_ids:
            generation["eos_token_id"] = sorted(self.eos_ids)
        if self.bos_id is not None:
            generation["bos_token_id"] = self.bos_id
        _write(directory / "tokenizer.json", text)
        _write(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        _write(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")


@contextmanager
def guarded(sentence: str) -> Iterator[None]:
    """Turn a failure inside ``tokenizers``, a Rust panic included, into a CheckpointError."""
    try:
        yield
    except BaseException as error:
        # A panic is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, CheckpointError | MemoryError):
            raise
        raise CheckpointError(f"{sentence}: {' '.join(str(error).split())[:200]}") from None


def from_directory(path: Path, limit: int) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, for a model of `limit` tokens."""
    from tokenizers import Tokenizer as Load

    file = path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            f"{path} has no tokenizer.json: save the model's tokenizer there with transformers"
        )
    raw = _read(file, _MAX_FILE)
    with guarded(f"{file} holds no tokenizer that Pronk can load"):
        backend = Load.from_buffer(raw)
        # Padding or truncation saved with a tokenizer would change what a text encodes to.
        backend.no_padding()
        backend.no_truncation()
        wrapped = LibraryBackend(backend)
    config = _optional(path / "tokenizer_config.json")
    marks = _optional(path / "special_tokens_map.json")
    generation = _optional(path / "generation_config.json") or _optional(path / "config.json")
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key) or marks.get(key) or ""
        names[key] = value.get("content", "") if isinstance(value, dict) else value
        if not isinstance(names[key], str):
            raise CheckpointError(f"{path} gives {key} as something else than a string")
    ends = generation.get("eos_token_id")
    return Tokenizer(
        wrapped,
        limit=limit,
        eos_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
        chat_template=_template(path, config),
        where=path,
        **names,
    )


def _template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return _read(file, _MAX_TEMPLATE).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{file} is no UTF-8") from None
    value = config.get("chat_template")
    if isinstance(value, list):
        named = [t for t in value if isinstance(t, dict) and t.get("name") == "default"]
        value = named[-1].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{path} gives chat_template as something else than a string")
    return value


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, _MAX_FILE) if path.exists() else {}


def _read(path: Path, limit: int) -> bytes:
    fd, size = open_file(path)
    try:
        if size > limit:
            raise CheckpointError(f"{path} is {size} bytes long, above the limit of {limit}")
        return read_exact(fd, 0, size, path).tobytes()
    finally:
        os.close(fd)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
