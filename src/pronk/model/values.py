"""What a model gives: the pieces of its answers, and what drafting did for them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Piece", "Speculation"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token.

    Parameters
    ----------
    token : int
        Its id.
    text : str
        Text that is certain since the piece before; may be empty while a character or a
        possible stop string is incomplete.
    logprob : float or None
        Natural logarithm of its probability, when asked for.
    top_logprobs : tuple of (int, float)
        The most likely tokens, when asked for.
    finish_reason : {None, "stop", "length"}
        Set on the last piece.
    """

    token: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Speculation:
    """Tokens that were drafted from earlier text, and those of them that proved right."""

    drafted: int = 0
    accepted: int = 0

    def since(self, earlier: Speculation) -> Speculation:
        """What has come to it since an earlier reading."""
        return Speculation(self.drafted - earlier.drafted, self.accepted - earlier.accepted)
