"""The public face of checkpoint, graph and engine: `load` gives a `Model`."""

from pronk.model.loading import choose_threads, compile_checkpoint, load
from pronk.model.model import Model
from pronk.model.values import Piece, Speculation

__all__ = [
    "Model",
    "Piece",
    "Speculation",
    "choose_threads",
    "compile_checkpoint",
    "load",
]
