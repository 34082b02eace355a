"""Conversations that go on where an earlier run ended: ``--session FILE``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pronk.errors import CheckpointError, RequestError
from pronk.model import Model

__all__ = ["NAME", "Session", "add_session"]

NAME = "chat"  # of the engine's session
Messages = list[dict[str, str]]


def add_session(parser: argparse.ArgumentParser) -> None:
    """``--session``."""
    parser.add_argument(
        "--session", type=Path, metavar="FILE",
        help="go on with the conversation of this file, and keep it there with its KV cache",
    )  # fmt: skip


class Session:
    """What a file keeps of a conversation: its messages, or its raw text, and the cache.

    Parameters
    ----------
    path : Path or None
        None keeps nothing.

    Raises
    ------
    RequestError
        If no file can be written there: before anything is generated.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.messages: Messages = []
        self.text = ""
        self.tokens = 0  # that were there
        self.changed = False
        if path is None:
            return
        if path.exists() and not path.is_file():
            raise RequestError(f"the session {path} is no file: give the path of one")
        if not os.access(path.parent, os.W_OK):
            raise RequestError(f"no session can be written to {path.parent}: choose another place")

    def restore(self, model: Model, raw: bool, system: str | None) -> None:
        """Take what the file holds, if there is one; else begin.

        Raises
        ------
        CheckpointError
            If it is damaged, of another model, or of other options.
        RequestError
            If it is not of this kind, or has a system message already.
        """
        path = self._path
        if path is not None and path.exists():
            self.tokens = model.restore_session(NAME, path)
            about = model.session_about(path)
            self.text, self.messages = _text(about, path), _messages(about, path)
            if not self.text and not self.messages:
                raise RequestError(f"the session {path} tells of no text: only Python can use it")
            if raw != bool(self.text):
                kind = "raw text" if self.text else "a conversation"
                raise RequestError(f"the session {path} is of {kind}: go on with it as one")
            if system:
                raise RequestError(
                    f"the session {path} has begun already: --system comes with a new one"
                )
        elif system:
            self.messages = [{"role": "system", "content": system}]

    def said(self, text: str) -> Messages:
        """All messages, and the user's next."""
        return [*self.messages, {"role": "user", "content": text}]

    def answered(self, said: Messages, reply: str) -> None:
        """A turn is whole."""
        self.messages = [*said, {"role": "assistant", "content": reply}]
        self.changed = True

    def continued(self, text: str) -> None:
        """Raw text has come so far."""
        self.text, self.changed = text, True

    def save(self, model: Model) -> None:
        """Write the file, whole or not at all, if anything was said."""
        if self._path is not None and self.changed:
            model.save_session(NAME, self._path, {"messages": self.messages, "text": self.text})


def _text(about: dict[str, Any], path: Path) -> str:
    text = about.get("text", "")
    if not isinstance(text, str):
        raise CheckpointError(f"the session {path} is damaged: its text is none")
    return text


def _messages(about: dict[str, Any], path: Path) -> Messages:
    found = about.get("messages", [])
    right = isinstance(found, list) and all(
        isinstance(one, dict)
        and set(one) == {"role", "content"}
        and all(isinstance(value, str) for value in one.values())
        for one in found
    )
    if not right:
        raise CheckpointError(f"the session {path} is damaged: its messages are none")
    return [dict(one) for one in found]
