"""What this machine can do at best, measured: the roofline (Williams et al. 2009)."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pronk import __version__, _native
from pronk.device.files import text

__all__ = ["ISAS", "MachineLimits", "available_isas", "known_limits", "measure_limits"]

ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "neon", "generic")
"""Every instruction set that kernels are built for, best first."""

_KEPT = 32  # machines and settings in a file of limits
_SECONDS = 0.03  # of a probe of arithmetic


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Limits with a number of threads.

    Attributes
    ----------
    bandwidth : float
        Bytes per second of reading memory.
    int8_peaks : dict of str to float
        int8 multiply and add operations per second by instruction set: that of the kernels in
        use, that of the best vectors (``avx512`` and ``avx512_bf16`` are VNNI) and, where the CPU
        has them, of AMX's tiles.
    isa : str
        The instruction set of the kernels in use.
    threads : int
    measured : str
        When, in UTC.
    """

    bandwidth: float
    int8_peaks: dict[str, float]
    isa: str
    threads: int
    measured: str

    @property
    def int8_peak(self) -> float:
        """The peak of the kernels in use."""
        return self.int8_peaks[self.isa]

    def or_better(self, other: MachineLimits) -> MachineLimits:
        """The better of two measurements, limit by limit."""
        peaks = {isa: max(peak, other.int8_peaks[isa]) for isa, peak in self.int8_peaks.items()}
        return replace(other, bandwidth=max(self.bandwidth, other.bandwidth), int8_peaks=peaks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data under stable names."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MachineLimits:
        """What `to_dict` gave; raises ValueError, KeyError or TypeError if it is no such thing."""
        peaks = {str(isa): float(peak) for isa, peak in dict(data["int8_peaks"]).items()}
        limits = cls(float(data["bandwidth"]), peaks, str(data["isa"]), int(data["threads"]),
                     str(data["measured"]))  # fmt: skip
        if limits.isa not in peaks or min(limits.bandwidth, *peaks.values()) <= 0:
            raise ValueError("limits must be positive")
        return limits


def available_isas() -> list[str]:
    """The instruction sets that this build has and this CPU runs, best first."""
    found = []
    for name in ISAS:
        with contextlib.suppress(ValueError):  # this CPU or build lacks it
            found.append(_native.isa(name))
    return found


def measure_limits(
    threads: int,
    runs: int = 4,
    most: int = 20,
    size: int = 256 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> MachineLimits:
    """Measure the limits: the best of several probes each, in turns.

    A neighbour can only take from a probe, so the best is the nearest to the machine's own. On a
    noisy machine it takes more of them.

    Parameters
    ----------
    threads : int
    runs, most : int
        Turns that must go by without a gain before it ends, and turns at most.
    size : int
        Bytes that are read over and over, as weights are: more than caches hold on small machines.
    progress : callable, optional
        Called with (probes done, probes in all).
    """
    isa, found = _native.isa(), available_isas()
    best_vectors = next(name for name in found if name != "amx")
    names = dict.fromkeys((isa, best_vectors, *(["amx"] if "amx" in found else [])))
    rounds = {name: _rounds(name) for name in names}
    best = {"": 0.0, **dict.fromkeys(names, 0.0)}  # the bandwidth under no name
    idle = 0
    for turn in range(most):
        if progress:
            progress(turn, most)
        found_now = {"": _native.read_bandwidth(size, threads, passes=3)}
        found_now |= {name: _native.int8_peak(rounds[name], threads, name) for name in names}
        gained = any(found_now[name] > 1.01 * best[name] for name in best)
        idle = 0 if gained else idle + 1
        best = {name: max(best[name], found_now[name]) for name in best}
        if idle == runs:
            break
    bandwidth = best.pop("")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return MachineLimits(bandwidth, best, isa, threads, now)


def _rounds(isa: str) -> int:
    """Rounds that take long enough for the start of the threads not to count."""
    few, shortest = 2000, float("inf")
    for _ in range(3):
        start = time.perf_counter()
        _native.int8_peak(few, 1, isa)
        shortest = min(shortest, time.perf_counter() - start)
    return max(few, int(few * _SECONDS / shortest))


def known_limits(
    path: Path,
    cpu: str,
    threads: int,
    measure: Callable[[int], MachineLimits],
    *,
    refresh: bool = False,
    keep: bool = True,
) -> MachineLimits:
    """The limits kept in a file, or measured now and kept there.

    Parameters
    ----------
    path : Path
        A file of limits by CPU model, instruction set, threads and version; made if need be. One
        that is damaged is written anew, one that cannot be written does no harm.
    measure : callable
        Measures with so many threads.
    refresh : bool
        Measure whatever the file says.
    keep : bool
        Whether what is measured may be kept: not when others were busy.
    """
    key = f"{cpu} | {_native.isa()} | {threads} threads | {__version__}"
    kept: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # damaged: measured again
        loaded = json.loads(text(path) or "{}")
        kept = loaded if isinstance(loaded, dict) else {}
    if not refresh:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # not kept: measured
            return MachineLimits.from_dict(kept[key])
    limits = measure(threads)
    if not keep:
        return limits
    kept.pop(key, None)
    kept = dict([*kept.items(), (key, limits.to_dict())][-_KEPT:])
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # not kept: measured again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    return limits
