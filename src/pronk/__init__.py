"""Llama-family models on the device you have, under a budget you state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pronk.checkpoint.sources import resolve
    from pronk.errors import (
        BudgetError,
        CheckpointError,
        PronkError,
        RequestError,
        SourceError,
    )
    from pronk.model import Model, Piece, load
    from pronk.spec import SamplingParams

__all__ = [
    "BudgetError",
    "CheckpointError",
    "Model",
    "Piece",
    "PronkError",
    "RequestError",
    "SamplingParams",
    "SourceError",
    "__version__",
    "load",
    "resolve",
]

__version__ = "0.1.0"

# Imported when first used: `import pronk` costs nothing but this table.
_HOMES = {
    "BudgetError": "pronk.errors",
    "CheckpointError": "pronk.errors",
    "Model": "pronk.model",
    "Piece": "pronk.model",
    "PronkError": "pronk.errors",
    "RequestError": "pronk.errors",
    "SamplingParams": "pronk.spec",
    "SourceError": "pronk.errors",
    "load": "pronk.model",
    "resolve": "pronk.checkpoint.sources",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'pronk' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
