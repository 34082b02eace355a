"""The errors a user can cause, each one sentence: what was wrong, where, what to do."""

from __future__ import annotations

__all__ = ["BudgetError", "CheckpointError", "PronkError", "RequestError", "SourceError"]


class PronkError(Exception):
    """Base of every error that the command line prints as one sentence with exit code 2."""


class CheckpointError(PronkError):
    """A model file is damaged, unsupported or not a model file."""


class SourceError(PronkError):
    """A model name or address cannot be resolved, fetched or verified."""


class RequestError(PronkError):
    """A prompt, a sampling parameter or another input value is out of range."""


class BudgetError(PronkError):
    """No variant of the model holds the stated budget."""
