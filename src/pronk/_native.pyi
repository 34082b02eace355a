"""
Pronk's native core: packed weights, kernels per ISA, and the program executor.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


PANEL: int = 16

GROUP: int = 32

KV_BLOCK: int = 32

PART_TAIL: int = 16

def packed_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix."""

def act_row_bytes(cols: int, quantized: bool) -> int:
    """Bytes of a row of quantized activations."""

class Executor:
    """Runs a program of ops over one arena."""

    def __init__(self, *, threads: int, isa: str, weight_bytes: int, arena_bytes: int, max_tokens: int, max_rows: int, max_sequences: int, max_blocks: int, num_blocks: int, vocab: int, kv_heads: int, head_dim: int, kv_bf16: bool, kv_block_bytes: int) -> None: ...

    @property
    def isa(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def arena_bytes(self) -> int: ...

    @property
    def kv_bytes(self) -> int: ...

    def pack(self, format: str, offset: int, total_rows: int, cols: int, row0: int, rows: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

    def write(self, offset: int, values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def embed(self, table: tuple[str, int, int, int, int], cols: int, out: tuple[int, int], grain: int) -> None: ...

    def rope_table(self, frequencies: int, head_dim: int, out: tuple[int, int], grain: int) -> None: ...

    def rms_norm(self, x: tuple[int, int], weight: int, eps: float, cols: int, out: tuple[int, int], quantized: bool, head: bool, grain: int) -> None: ...

    def quantize(self, x: tuple[int, int], cols: int, out: tuple[int, int], quantized: bool, head: bool, grain: int) -> None: ...

    def matmul(self, x: tuple[int, int], parts: Sequence[tuple[str, int, int, int, int]], cols: int, quantized: bool, residual: tuple[int, int], out: tuple[int, int], head: bool, grain: int) -> None: ...

    def rope_store(self, qkv: tuple[int, int], table: tuple[int, int], heads: int, layer: int, grain: int) -> None: ...

    def attention(self, qkv: tuple[int, int], parts: tuple[int, int], heads: int, layer: int, scale: float, out: tuple[int, int], grain: int) -> None: ...

    def silu_mul(self, gate: tuple[int, int], up: tuple[int, int], cols: int, out: tuple[int, int], quantized: bool, grain: int) -> None: ...

    def add(self, a: tuple[int, int], b: tuple[int, int], cols: int, out: tuple[int, int], grain: int) -> None: ...

    def gather(self, x: tuple[int, int], cols: int, out: tuple[int, int], grain: int) -> None: ...

    def run(self, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], sequences: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

    def head(self, rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def view(self, source: tuple[int, int], rows: int, cols: int) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)]:
        """
        Float rows of the arena as a read-only array; the next step overwrites them.
        """

def isa(name: str = '') -> str:
    """The ISA whose kernels run: the best, or the one named."""

def read_bandwidth(bytes: int, threads: int, isa: str = '') -> float:
    """Bytes per second of one pass over fresh memory."""

def int8_peak(rounds: int, threads: int, isa: str = '') -> float:
    """int8 multiply and add operations per second."""

def trim() -> None:
    """Gives freed heap memory back to the system."""
