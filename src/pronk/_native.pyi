"""
Pronk's native core: packed weights, kernels per ISA, and the program executor.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


PANEL: int = 16

class ExpertReadError(OSError):
    pass

GROUP: int = 32

KV_BLOCK: int = 32

KV_CHUNK: int = 512

PART_TAIL: int = 16

MOST_KEPT: int = 64

def bound_plan_bytes(rows: int, cols: int) -> int:
    """Bytes of a row of what bounded products need beside their logits."""

MAGNITUDE_SHIFT: int = 19

def packed_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix."""

def act_row_bytes(cols: int, precision: str) -> int:
    """Bytes of a row of activations."""

class Executor:
    """Runs a program of ops over one arena."""

    def __init__(self, *, threads: int, isa: str, weight_bytes: int, arena_bytes: int, max_tokens: int, max_rows: int, max_sequences: int, max_blocks: int, vocab: int, kv_heads: int, head_dim: int, kv_dtype: str, kv_groups: Sequence[tuple[int, int, int, int, bool]]) -> None:
        """kv_groups: (bytes of a block, blocks, window, sinks, chunked) of each."""

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

    @property
    def past_bytes(self) -> int: ...

    @property
    def op_count(self) -> int: ...

    def profile(self, on: bool) -> None:
        """Keeps times of ops from now on, from zero; or no longer."""

    @property
    def times(self) -> list[tuple[int, int, int]]:
        """
        Of each op, as one thread saw it: calls, nanoseconds, and those in the barrier.
        """

    def populate(self) -> None:
        """Makes the KV pool and the arena resident."""

    def pack(self, format: str, offset: int, total_rows: int, cols: int, row0: int, rows: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

    def write(self, offset: int, values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def embed(self, table: tuple[str, int, int, int, int], cols: int, scale: float, out: tuple[int, int], grain: int) -> None: ...

    def rope_table(self, frequencies: int, head_dim: int, scale: float, out: tuple[int, int], grain: int) -> None: ...

    def rms_norm(self, x: tuple[int, int], weight: int, eps: float, cols: int, residual: tuple[int, int], out: tuple[int, int], precision: str, head: bool, grain: int) -> None: ...

    def layer_norm(self, x: tuple[int, int], weight: int, eps: float, cols: int, out: tuple[int, int], precision: str, head: bool, grain: int) -> None: ...

    def quantize(self, x: tuple[int, int], cols: int, out: tuple[int, int], precision: str, head: bool, grain: int) -> None: ...

    def matmul(self, x: tuple[int, int], parts: Sequence[tuple[str, int, int, int, int]], cols: int, precision: str, scale: float, residual: tuple[int, int], out: tuple[int, int], head: bool, grain: int, gates: bool = False, sparse: bool = False) -> None:
        """
        gates: relu follows the first part, and closes the second. sparse: x is often zero.
        """

    def bounded_matmul(self, x: tuple[int, int], plan: tuple[int, int], part: tuple[str, int, int, int, int], cols: int, precision: str, scale: float, out: tuple[int, int], grain: int) -> None:
        """
        The product that ends a head, from which the largest logits may be asked for alone.
        """

    def rope_store(self, qkv: tuple[int, int], table: tuple[int, int], heads: int, group: int, layer: int, norm: str, weights: tuple[int, int], eps: float, center: int, grain: int) -> None:
        """Without a table, where its offset is -1, nothing is turned."""

    def attention(self, qkv: tuple[int, int], parts: tuple[int, int], heads: int, group: int, layer: int, scale: float, out: tuple[int, int], grain: int, *, softcap: float = 0.0, slopes: Sequence[float] = [], growth: float = 0.0, growth_span: int = 1) -> None: ...

    def activate(self, fn: str, gate: tuple[int, int], up: tuple[int, int], cols: int, out: tuple[int, int], precision: str, grain: int, threshold: float = 0.0) -> None: ...

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """
        Below which magnitude the activations of MLPs are zero: one for each `activate`.
        """

    def watch(self, on: bool) -> None:
        """Counts the activations of MLPs from now on, from zero; or no longer."""

    def activity(self) -> Annotated[NDArray[numpy.uint64], dict(shape=(None, None), device='cpu')]:
        """
        Of each `activate`: its results by magnitude (`MAGNITUDE_SHIFT` bits of a float less, so the first are zeros), the groups, and those that are zero throughout.
        """

    def softcap(self, x: tuple[int, int], cap: float, cols: int, out: tuple[int, int], grain: int) -> None: ...

    def chain(self) -> None:
        """
        Runs the last op on each row right after the one before it, without a barrier.
        """

    def add(self, a: tuple[int, int], b: tuple[int, int], cols: int, out: tuple[int, int], grain: int) -> None: ...

    def gather(self, x: tuple[int, int], cols: int, out: tuple[int, int], grain: int) -> None: ...

    def run(self, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], sequences: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)]) -> None: ...

    def head(self, rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], keep: Sequence[tuple[int, float]] = []) -> None:
        """
        keep: how many of a row's largest logits count, within what of the largest.
        """

    @property
    def planes(self) -> tuple[int, int, int]:
        """
        Calls of `head` with `keep`, bytes they read of the lower plane, and its bytes.
        """

    def view(self, source: tuple[int, int], rows: int, cols: int) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None), device='cpu', writable=False)]:
        """
        Float rows of the arena as a read-only array; the next step overwrites them.
        """

    def vector(self, offset: int, count: int) -> Annotated[NDArray[numpy.float32], dict(shape=(None,), device='cpu', writable=False)]:
        """A float vector among the weights, read-only."""

    def kv_block(self, group: int, block: int) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None), device='cpu')]:
        """
        The bytes of a KV block, a row of each plane; to be read and written between steps only.
        """

    def route(self, logits: tuple[int, int], sizes: tuple[int, int], softmax: bool, normalize: bool, threshold: float, least: int, set: int, out: tuple[int, int], plan: tuple[int, int], grain: int) -> None: ...

    def expert_gather(self, x: tuple[int, int], plan: tuple[int, int], sizes: tuple[int, int], cols: int, precision: str, out: tuple[int, int], grain: int) -> None: ...

    def expert_matmul(self, x: tuple[int, int], token: tuple[int, int], plan: tuple[int, int], sizes: tuple[int, int], parts: Sequence[tuple[str, int, int, int, int]], cols: int, precision: str, out: tuple[int, int], grain: int) -> None:
        """
        Products of rows with their experts; `token`: where a lone token's row is.
        """

    def expert_activate(self, fn: str, gate: tuple[int, int], up: tuple[int, int], routes: tuple[int, int], plan: tuple[int, int], sizes: tuple[int, int], cols: int, scales_input: bool, out: tuple[int, int], precision: str, grain: int) -> None: ...

    def combine(self, y: tuple[int, int], residual: tuple[int, int], routes: tuple[int, int], plan: tuple[int, int], sizes: tuple[int, int], cols: int, scales_input: bool, scale: float, out: tuple[int, int], grain: int) -> None: ...

    @property
    def expert_counts(self) -> list[list[int]]:
        """How often each expert was chosen, by layer."""

    @property
    def routed_tokens(self) -> int:
        """Tokens that chose experts, in each layer that has any."""

    def reset_experts(self) -> None:
        """Counts from zero."""

    def keep_experts(self, offset: int, slot_bytes: int, slots: int, sets: int, experts: int) -> None:
        """
        Experts lie in slots from an offset on, and in a file; `sets`: of a layer each.
        """

    def open_experts(self, fd: int, pieces: Sequence[tuple[int, int]], sums: Sequence[int]) -> None:
        """
        Experts are read from a file: (its place, bytes) of each piece, set by set.
        """

    @property
    def expert_reads(self) -> tuple[int, int, int]:
        """
        Experts that steps found in a slot, those they had to read, and the bytes of these.
        """

    @property
    def experts_held(self) -> list[int]:
        """What each slot holds, set * experts + expert, or -1."""

def isa(name: str = '') -> str:
    """The ISA whose kernels run: the best, or the one named."""

def read_bandwidth(bytes: int, threads: int, isa: str = '', passes: int = 1) -> float:
    """Bytes per second of reading memory, the best of several passes."""

def int8_peak(rounds: int, threads: int, isa: str = '') -> float:
    """int8 multiply and add operations per second."""

class Region:
    """Memory as weights get it, every page of it there."""

    def __init__(self, arg: int, /) -> None: ...

    @property
    def address(self) -> int: ...

    @property
    def bytes(self) -> int: ...

def trim() -> None:
    """Gives freed heap memory back to the system."""

PACK_VERSION: int = 2

def load_weights(executor: Executor, matrices: Sequence[tuple[str, int, int, int, int, int, int]]) -> tuple[int, float]:
    """
    Reads and packs matrices (format, offset, rows, cols, fd, at, pairs); gives the index of one that its file does not hold, or -1, and the processor seconds of packing.
    """

def save_weights(executor: Executor, fd: int, parts: Sequence[tuple[int, int, int]]) -> list[int]:
    """
    Writes parts of packed weights (offset, place in the file, bytes); gives their sums.
    """

def restore_weights(executor: Executor, fd: int, parts: Sequence[tuple[int, int, int]], sums: Sequence[int]) -> bool:
    """
    Reads parts that save_weights wrote; False, and no weights, if they are not those.
    """

def xxh64(data: bytes) -> int:
    """XXH64 of some bytes."""

def read_strings(raw: bytes, count: int) -> list[str]:
    """The strings of a GGUF array."""

def read_vocabulary(raw: bytes, count: int) -> tuple[list[str], dict[str, int]]:
    """The strings of a GGUF array, and the place of each."""

def read_pairs(raw: bytes, count: int) -> list[tuple[str, str]]:
    """
    The strings of a GGUF array, each cut at its first space after the first byte; IndexError, with its index, if one has none.
    """

def skip_strings(window: bytes, at: int, count: int, end: int) -> tuple[int, int]:
    """
    Passes over strings of a GGUF array that begin in a window; gives where the next one begins and how many are left. `end` is the end of the file, counted from the window's.
    """

class Pieces:
    """The pieces of a SentencePiece model of the BPE kind."""

    def __init__(self, raw: bytes, scores: bytes, kinds: bytes, prefix: bool, unknown: int, eat: Sequence[int]) -> None:
        """
        From the strings of a GGUF array, float32 scores and a byte per kind; `eat` are those that take the white space behind them.
        """

    def __len__(self) -> int: ...

    @property
    def twice(self) -> int:
        """A piece that is there before, or -1."""

    def piece(self, id: int) -> str:
        """The string of a piece."""

    def kind(self, id: int) -> int:
        """The kind of a piece, as GGUF counts them."""

    def score(self, id: int) -> float:
        """The score of a piece: the best are joined first."""

    def find(self, text: str) -> int:
        """The id of a piece, or -1."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text; special pieces are read in it only if asked."""
