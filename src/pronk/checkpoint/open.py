"""From a path to the reader that understands it."""

from __future__ import annotations

import os
from pathlib import Path

from pronk.checkpoint.base import Checkpoint
from pronk.errors import CheckpointError

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory or a bundle; only headers are read.

    Raises
    ------
    CheckpointError
        If it is none of these, is damaged, or holds a model Pronk does not know.
    """
    path = Path(path)
    try:
        if path.is_dir():
            from pronk.checkpoint.safetensors import SafetensorsCheckpoint

            return SafetensorsCheckpoint(path)
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path} is one weight file: give the directory that holds its config.json"
            )
        from pronk.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
