"""The processor: its cores, those this process may use, its instruction sets and caches."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from pronk.device.files import control_groups, cpu_list, fields, number, text

__all__ = ["Cache", "Cpu", "read_cpu"]

_CPUS = "sys/devices/system/cpu"
# What kernels are made of, as Linux names it on x86 and on ARM.
_FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache that CPU 0 has, in bytes, and how many CPUs share it."""

    level: int
    kind: str
    bytes: int
    shared_by: int | None


@dataclass(frozen=True, slots=True)
class Cpu:
    """What is known of the processor; None where the system does not say.

    Attributes
    ----------
    logical, physical : int or None
        CPUs that are online, and the cores they are threads of.
    affinity : int or None
        CPUs that this process may run on.
    quota : float or None
        CPUs' worth of time that the control groups of this process allow it.
    features : tuple of str
        Instruction sets that kernels are made of.
    virtual : bool
        Whether this is a virtual machine.
    """

    model: str
    architecture: str
    logical: int | None
    physical: int | None
    affinity: int | None
    quota: float | None
    features: tuple[str, ...]
    virtual: bool
    caches: tuple[Cache, ...]


def read_cpu(root: Path = Path("/")) -> Cpu:
    """Read it from /proc and /sys below `root`."""
    info = fields(root / "proc/cpuinfo")
    flags = (info.get("flags") or info.get("Features") or "").split()
    allowed = fields(root / "proc/self/status").get("Cpus_allowed_list")
    return Cpu(
        model=_model(root, info),
        architecture=platform.machine(),
        logical=cpu_list(text(root / _CPUS / "online")),
        physical=_physical(root),
        affinity=cpu_list(allowed),
        quota=_quota(root),
        features=tuple(name for name in _FEATURES if name in flags),
        virtual="hypervisor" in flags or (root / "sys/hypervisor/type").exists(),
        caches=_caches(root),
    )


def _model(root: Path, info: dict[str, str]) -> str:
    named = info.get("model name") or info.get("Model") or info.get("Hardware")
    board = text(root / "sys/firmware/devicetree/base/model")
    return named or board or platform.processor() or "unknown"


def _physical(root: Path) -> int | None:
    cores = set()
    for folder in (root / _CPUS).glob("cpu[0-9]*/topology"):
        package, core = text(folder / "physical_package_id"), text(folder / "core_id")
        if core is not None:
            cores.add((package, core))
    return len(cores) or None


def _quota(root: Path) -> float | None:
    shares = []
    for folder in control_groups(root, "cpu"):
        quota, _, period = (text(folder / "cpu.max") or "").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            shares.append(int(quota) / int(period))
        old, every = number(folder / "cpu.cfs_quota_us"), number(folder / "cpu.cfs_period_us")
        if old is not None and old > 0 and every:
            shares.append(old / every)
    return min(shares, default=None)


def _caches(root: Path) -> tuple[Cache, ...]:
    caches = []
    for folder in (root / _CPUS / "cpu0/cache").glob("index*"):
        level, size = number(folder / "level"), text(folder / "size") or ""
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:])
        if level is None or unit is None or not size[:-1].isdecimal():
            continue
        kind = (text(folder / "type") or "").lower()
        shared = cpu_list(text(folder / "shared_cpu_list"))
        caches.append(Cache(level, kind, int(size[:-1]) * unit, shared))
    return tuple(sorted(caches, key=lambda cache: (cache.level, cache.kind)))
