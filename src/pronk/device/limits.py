"""What this machine can do at best, measured: the roofline (Williams et al. 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from pronk import _native

__all__ = ["MachineLimits", "measure_limits"]


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Memory bytes per second, and int8 multiply and add operations per second."""

    bandwidth: float
    int8_peak: float


def measure_limits(threads: int, runs: int = 5) -> MachineLimits:
    """Measure the limits with a number of threads: the best of several short probes.

    The bandwidth is that of reading 256 MB, more than caches hold on small machines.
    """
    bandwidth = max(_native.read_bandwidth(256 << 20, threads) for _ in range(runs))
    peak = max(_native.int8_peak(2_000_000, threads) for _ in range(runs))
    return MachineLimits(bandwidth, peak)
