"""From tokens to text that can be shown at once: whole characters, never part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable

__all__ = ["TextStream"]


class TextStream:
    """Incremental decoder of one sequence, ended by the first stop string.

    Parameters
    ----------
    token_bytes : callable
        The exact bytes a token id contributes to the text.
    stop : tuple of str
        Strings that end the text. None of the one found, nor what follows it, is emitted.

    Attributes
    ----------
    stopped : bool
        Whether a stop string was found.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...] = ()) -> None:
        self._token_bytes = token_bytes
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token and give the text that is now certain.

        What is held back is the beginning of a character, or of a possible stop string.
        """
        if self.stopped:
            return ""
        return self._advance(self._decoder.decode(self._token_bytes(token)))

    def flush(self) -> str:
        """At the end of generation: everything held back, incomplete bytes as U+FFFD."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str) -> str:
        if not text or not self._stop:
            return text
        text = self._held + text
        found = self._first_stop(text)
        if found is not None:
            self.stopped = True
            self._held = ""
            return text[:found]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string that is complete first begins, the longest if several are."""
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(ends)[1] if ends else None

    def _possible_start(self, text: str) -> int:
        """Where the longest tail of `text` that begins a stop string starts."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            tail = text[at:]
            if any(stop.startswith(tail) for stop in self._stop):
                return at
        return len(text)
