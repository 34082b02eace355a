"""What writing weights in fewer bits loses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ErrorSum", "square"]


@dataclass(slots=True)
class ErrorSum:
    """Squared error and squared norm, added up over the chunks of one or more tensors."""

    error: float = 0.0
    norm: float = 0.0

    def add(self, difference: NDArray[np.float32], exact: NDArray[np.float32]) -> None:
        """Count rows, given their exact values and what the others differ from them by."""
        self.error += square(difference)
        self.norm += square(exact)

    @property
    def relative_rms(self) -> float:
        """Root of the squared error over the squared norm; 0 for nothing or all zeros."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def square(x: NDArray[np.float32]) -> float:
    """The sum of squares of a matrix."""
    # Row by row in float32 (a BLAS dot), then in float64: no float64 copy of the chunk.
    return float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64))
