"""What surrounds the processor: memory, huge pages, heat, clocks, power, and who else is busy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pronk.device.files import control_groups, fields, number, text

__all__ = [
    "Frequency",
    "HugePages",
    "Load",
    "Memory",
    "Power",
    "Thermal",
    "Ticks",
    "Zone",
    "load_between",
    "read_frequency",
    "read_huge_pages",
    "read_memory",
    "read_power",
    "read_thermal",
    "read_ticks",
]

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ", re.ASCII)
_HUGE = re.compile(r"AnonHugePages:\s*([0-9]+) kB", re.ASCII)
_UNLIMITED = 1 << 60  # what version 1 of control groups says when there is no limit


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; ``limit`` is that of the control groups of this process."""

    total: int | None
    available: int | None
    limit: int | None


def read_memory(root: Path = Path("/")) -> Memory:
    """Read it from /proc and /sys below `root`."""
    info = fields(root / "proc/meminfo")

    def size(key: str) -> int | None:
        value = info.get(key, "").split()
        return int(value[0]) * 1024 if value and value[0].isdecimal() else None

    limits = [
        limit
        for folder in control_groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := number(folder / name)) is not None and limit < _UNLIMITED
    ]
    return Memory(size("MemTotal"), size("MemAvailable"), min(limits, default=None))


class _Region(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class HugePages:
    """Transparent huge pages: the mode chosen, and what a region of ours really got, in bytes."""

    mode: str | None
    size: int | None
    asked: int | None
    granted: int | None


def read_huge_pages(root: Path = Path("/"), region: _Region | None = None) -> HugePages:
    """Read the mode, and how much of a region that is in memory lies on huge pages."""
    folder = root / "sys/kernel/mm/transparent_hugepage"
    modes = text(folder / "enabled") or ""
    chosen = next((m[1:-1] for m in modes.split() if m.startswith("[")), None)
    granted = None
    if region is not None:
        smaps = text(root / "proc/self/smaps")
        granted = None if smaps is None else _granted(smaps, region.address, region.bytes)
    asked = None if region is None else region.bytes
    return HugePages(chosen, number(folder / "hpage_pmd_size"), asked, granted)


def _granted(smaps: str, start: int, size: int) -> int | None:
    """AnonHugePages of the mappings that overlap a range, at most its size."""
    inside, found = False, None
    for line in smaps.splitlines():
        if mapping := _MAPPING.match(line):
            inside = int(mapping[1], 16) < start + size and start < int(mapping[2], 16)
        elif inside and (huge := _HUGE.match(line)):
            found = (found or 0) + int(huge[1]) * 1024
    return None if found is None else min(found, size)


@dataclass(frozen=True, slots=True)
class Zone:
    """A temperature, and the one at which the system begins to slow down, in degrees Celsius."""

    name: str
    celsius: float
    limit: float | None


@dataclass(frozen=True, slots=True)
class Thermal:
    """Temperatures, and how often cores were throttled for heat since the system started."""

    zones: tuple[Zone, ...]
    throttled: int | None


def read_thermal(root: Path = Path("/")) -> Thermal:
    """Read thermal zones, or where there are none the sensors of the processor."""
    zones = []
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        heat = number(folder / "temp")
        if heat is None:
            continue
        limits = [
            value / 1000
            for kind in folder.glob("trip_point_*_type")
            if text(kind) in ("passive", "hot", "critical")
            and (value := number(kind.with_name(kind.name.replace("_type", "_temp")))) is not None
            and value > 0
        ]
        name = text(folder / "type") or folder.name
        zones.append(Zone(name, heat / 1000, min(limits, default=None)))
    for folder in [] if zones else sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = text(folder / "name") or ""
        if name not in ("coretemp", "k10temp", "zenpower", "cpu_thermal"):
            continue
        for sensor in sorted(folder.glob("temp*_input")):
            heat = number(sensor)
            limit = number(sensor.with_name(sensor.name.replace("_input", "_max")))
            if heat is not None:
                zones.append(Zone(name, heat / 1000, limit / 1000 if limit else None))
    # Cores of a package share its counter, so the counts of cores alone are added.
    counts = [
        count
        for path in (root / "sys/devices/system/cpu").glob(
            "cpu[0-9]*/thermal_throttle/core_throttle_count"
        )
        if (count := number(path)) is not None
    ]
    return Thermal(tuple(zones), sum(counts) if counts else None)


@dataclass(frozen=True, slots=True)
class Frequency:
    """Clocks of CPU 0 in Hz: now, allowed, and of the hardware; and who chooses them."""

    governor: str | None
    driver: str | None
    preference: str | None
    current: int | None
    allowed: int | None
    hardware: int | None


def read_frequency(root: Path = Path("/")) -> Frequency:
    """Read it from /sys below `root`."""
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"

    def hertz(name: str) -> int | None:
        value = number(folder / name)
        return None if value is None else value * 1000

    return Frequency(
        text(folder / "scaling_governor"),
        text(folder / "scaling_driver"),
        text(folder / "energy_performance_preference"),
        hertz("scaling_cur_freq"),
        hertz("scaling_max_freq"),
        hertz("cpuinfo_max_freq"),
    )


@dataclass(frozen=True, slots=True)
class Power:
    """Whether the machine runs on its battery, and how full that is; None where there is none."""

    on_battery: bool | None
    percent: int | None


def read_power(root: Path = Path("/")) -> Power:
    """Read the power supplies of the machine, not those of its mouse."""
    discharging = plugged = None
    percent = None
    for folder in sorted((root / "sys/class/power_supply").glob("*")):
        kind = text(folder / "type")
        if kind == "Battery" and text(folder / "scope") != "Device":
            discharging = bool(discharging) or text(folder / "status") == "Discharging"
            percent = number(folder / "capacity") if percent is None else percent
        elif kind in ("Mains", "USB") and (online := number(folder / "online")) is not None:
            plugged = bool(plugged) or online > 0
    if discharging is None:
        return Power(None, None)
    return Power(discharging and not plugged, percent)


@dataclass(frozen=True, slots=True)
class Ticks:
    """Time of all CPUs since the system started, in ticks."""

    total: int
    idle: int
    steal: int


def read_ticks(root: Path = Path("/")) -> Ticks | None:
    """Read it from /proc/stat below `root`."""
    words = (text(root / "proc/stat") or "").split("\n", 1)[0].split()
    if len(words) < 9 or words[0] != "cpu":
        return None
    # user nice system idle iowait irq softirq steal; guests are counted in user already
    numbers = [int(word) for word in words[1:9] if word.isdecimal()]
    if len(numbers) < 8:
        return None
    return Ticks(sum(numbers), numbers[3] + numbers[4], numbers[7])


@dataclass(frozen=True, slots=True)
class Load:
    """Fractions of the CPUs' time while this process slept: used here, and taken by other guests.

    ``steal_since_start`` is the latter since the system started; ``average`` counts the processes
    that ran or waited to, over the last minute.
    """

    average: float | None
    busy: float | None
    steal: float | None
    steal_since_start: float | None


def load_between(before: Ticks | None, after: Ticks | None, root: Path = Path("/")) -> Load:
    """The load between two readings."""
    try:
        average = float((text(root / "proc/loadavg") or "").split(" ")[0])
    except ValueError:
        average = None
    since = after.steal / after.total if after and after.total else None
    if before is None or after is None or after.total <= before.total:
        return Load(average, None, None, since)
    total = after.total - before.total
    steal = (after.steal - before.steal) / total
    return Load(average, 1 - (after.idle - before.idle) / total - steal, steal, since)
