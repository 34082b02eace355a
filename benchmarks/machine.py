"""What the machine is, and what it can do at this moment: the limits that figures are held to."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pronk import _native

VECTOR_ISAS = ("avx512", "avx2", "neon", "generic")
TILE_ISAS = ("amx",)

Probe = dict[str, float]


def isas() -> list[str]:
    """The instruction sets that this build has and this machine runs, best first."""
    found = []
    for name in (*TILE_ISAS, *VECTOR_ISAS):
        try:
            found.append(_native.isa(name))
        except ValueError:
            continue
    return found


def probe(threads: int, tries: int = 3) -> Probe:
    """Bytes a second from memory, and int8 operations a second in vectors and in tiles.

    The best of a few short tries; 256 MB is more than small machines hold in their caches.
    """
    have = isas()
    vector = next(name for name in VECTOR_ISAS if name in have)
    result = {
        "bandwidth": max(_native.read_bandwidth(256 << 20, threads) for _ in range(tries)),
        "int8": max(_native.int8_peak(1_000_000, threads, vector) for _ in range(tries)),
    }
    for name in TILE_ISAS:
        if name in have:
            tiles = max(_native.int8_peak(1_000_000, threads, name) for _ in range(tries))
            result["int8_tiles"] = max(tiles, result["int8"])
    return result


@dataclass
class Best:
    """The best of every probe so far."""

    figures: Probe = field(default_factory=dict)

    def see(self, found: Probe) -> Probe:
        """Take a probe into account; returns it."""
        for name, value in found.items():
            self.figures[name] = max(value, self.figures.get(name, 0.0))
        return found


def _first(path: str, key: str) -> str:
    try:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:  # no Linux: the table has no such line
        pass
    return ""


def describe(threads: int) -> dict[str, Any]:
    """The machine and the versions, as they stand in a result."""
    flags = set(_first("/proc/cpuinfo", "flags").split())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    memory = _first("/proc/meminfo", "MemTotal").split()
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "isas": isas(),
        "flags": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
                                 "amx_bf16", "hypervisor"}),
        "memory": int(memory[0]) * 1024 if memory else 0,
        "huge_pages": pages.read_text().strip() if pages.exists() else "",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "pronk": metadata.version("pronk") if _installed() else "from source",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip


def _installed() -> bool:
    try:
        metadata.version("pronk")
    except metadata.PackageNotFoundError:
        return False
    return True
