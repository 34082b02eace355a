"""The memory of this process as the system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["peak_memory", "resident_memory", "trim"]


def _status(key: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:  # no Linux: others ask in another way
        pass
    return None


def peak_memory() -> int:
    """Peak resident set of this process so far, in bytes."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    # macOS counts bytes, the others kilobytes. A parent's size may be inherited here, which is
    # why /proc comes first.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Resident set of this process now, in bytes; the peak where the system tells no other."""
    now = _status("VmRSS")
    return peak_memory() if now is None else now


def trim() -> None:
    """Give freed heap memory back to the system, so that what loading needed is not kept."""
    from pronk import _native

    _native.trim()
