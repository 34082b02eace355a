"""The machine examined, and what about it slows Pronk down: readings first, then a verdict."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pronk import _native
from pronk.device import host
from pronk.device.cpu import Cpu, read_cpu
from pronk.device.limits import MachineLimits, available_isas
from pronk.device.versions import Versions, extras, read_versions
from pronk.units import format_bytes

__all__ = ["KERNELS", "Disk", "Finding", "Plan", "Report", "examine", "plan", "warnings"]

KERNELS = {
    "amx": "int8 in tiles (AMX), vectors of AVX-512 with VNNI",
    "avx512_bf16": "int8 dot products of AVX-512 VNNI, and of bf16 pairs",
    "avx512": "int8 dot products of AVX-512 VNNI",
    "avx2": "AVX2, int8 multiplied in 16 bits",
    "neon": "int8 dot products of NEON",
    "generic": "plain C++, no vectors of its own",
}

_SMALL_DISK = 2 * 10**9
_TEST_REGION = 32 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What Pronk will use unless told otherwise.

    ``available`` are the instruction sets that would run here; ``forced`` is what ``PRONK_ISA``
    asks for; ``isa`` is None where that cannot be had, and every load is refused.
    """

    threads: int
    isa: str | None
    kernels: str | None
    available: tuple[str, ...]
    forced: str | None


@dataclass(frozen=True, slots=True)
class Disk:
    """The cache of models: its folder, and the free bytes of its file system."""

    cache: str
    free: int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that costs speed: its name, what it is, and what to do."""

    id: str
    what: str
    do: str


@dataclass(frozen=True, slots=True)
class Report:
    """All readings; what the system does not say is None inside them.

    ``limits_unsure`` says that the limits were measured now, while others were busy.
    """

    plan: Plan
    cpu: Cpu
    memory: host.Memory
    huge_pages: host.HugePages
    limits: MachineLimits | None
    limits_unsure: bool
    thermal: host.Thermal
    throttled_meanwhile: int
    frequency: host.Frequency
    power: host.Power
    load: host.Load
    disk: Disk
    versions: Versions
    extras: dict[str, Versions]

    def to_dict(self) -> dict[str, Any]:
        """Plain data under the names of the fields, with the warnings."""
        return {**asdict(self), "warnings": [asdict(w) for w in warnings(self)]}


def plan(threads: int) -> Plan:
    """What runs with so many threads, under the environment's ``PRONK_ISA``."""
    forced = os.environ.get("PRONK_ISA") or None
    try:
        isa = _native.isa()
    except ValueError:
        isa = None
    return Plan(threads, isa, KERNELS.get(isa or ""), tuple(available_isas()), forced)


def examine(
    plan: Plan,
    cache: Path,
    measure: Callable[[Cpu, bool], MachineLimits] | None = None,
    root: Path = Path("/"),
    region: Any = None,
    pause: Callable[[], None] = lambda: time.sleep(0.5),
) -> Report:
    """Read everything below a root of the file system.

    Parameters
    ----------
    plan : Plan
    cache : Path
        The folder of the models' cache, wherever the root is.
    measure : callable, optional
        Gives the limits of a processor, told whether others are busy on it; they are left out
        unless given.
    root : Path
        Where ``proc`` and ``sys`` are.
    region : object with ``address`` and ``bytes``, optional
        Memory to look up in ``proc/self/smaps``; a fresh one like that of weights unless given.
    pause : callable
        Waits while the load of the machine is watched.
    """
    cpu = read_cpu(root)
    before, thermal = host.read_ticks(root), host.read_thermal(root)
    pause()
    load = host.load_between(before, host.read_ticks(root), root)
    region = _native.Region(_TEST_REGION) if region is None else region
    huge_pages = host.read_huge_pages(root, region)
    del region
    memory = host.read_memory(root)
    start = datetime.now(UTC).isoformat(timespec="seconds")
    limits = measure(cpu, _busy(load)) if measure and plan.isa else None
    after = host.read_thermal(root)
    return Report(
        plan=plan,
        cpu=cpu,
        memory=memory,
        huge_pages=huge_pages,
        limits=limits,
        limits_unsure=limits is not None and limits.measured >= start and _busy(load),
        thermal=after,
        throttled_meanwhile=max((after.throttled or 0) - (thermal.throttled or 0), 0),
        frequency=host.read_frequency(root),
        power=host.read_power(root),
        load=load,
        disk=Disk(str(cache), _free(cache)),
        versions=read_versions(),
        extras=extras(),
    )


def _busy(load: host.Load) -> bool:
    return load.busy is not None and load.busy > 0.2


def _free(folder: Path) -> int | None:
    """Free bytes where a folder is, or would be made."""
    for at in (folder, *folder.parents):
        try:
            return shutil.disk_usage(at).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def warnings(report: Report) -> list[Finding]:
    """What costs speed on this machine, in plain words, and what to do about each."""
    found = [*_of_the_processor(report), *_of_memory(report), *_of_power(report)]
    found += _of_company(report)
    return [Finding(*words) for words in found]


_Words = tuple[str, str, str]


def _of_the_processor(report: Report) -> Iterator[_Words]:
    plan, cpu = report.plan, report.cpu
    if plan.isa is None:
        yield (
            "isa",
            f"PRONK_ISA asks for {plan.forced!r}, which is not to be had here: nothing will load",
            f"unset PRONK_ISA, or choose from {', '.join(plan.available)}",
        )
    elif plan.forced and plan.isa != plan.available[0]:
        yield (
            "isa",
            f"PRONK_ISA={plan.forced} forces slower kernels than {plan.available[0]}",
            "unset PRONK_ISA unless you are comparing kernels",
        )
    if plan.available[0] in ("avx2", "generic"):
        yield (
            "dot-products",
            "this build finds no int8 dot products (AVX-512 VNNI, AMX, ARM's dotprod) in the CPU: "
            "prompts are read several times slower than a CPU with them would",
            "prefer shorter prompts and smaller models; on a virtual machine, ask for a newer CPU",
        )
    if cpu.quota is not None and cpu.quota < plan.threads:
        yield (
            "quota",
            f"a control group allows {cpu.quota:g} CPUs' worth of time to {plan.threads} threads: "
            "they will be stopped in the middle of steps",
            f"run with --threads {max(1, int(cpu.quota))}, or raise the limit of the container",
        )


def _of_memory(report: Report) -> Iterator[_Words]:
    huge = report.huge_pages
    if huge.granted is not None and huge.asked and huge.granted < huge.asked // 2:
        never = huge.mode == "never"
        reason = "they are turned off" if never else "memory may be in pieces"
        advice = (
            "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
            if never
            else "free memory, or as root: echo 1 > /proc/sys/vm/compact_memory"
        )
        yield (
            "huge-pages",
            f"{format_bytes(huge.granted)} of {format_bytes(huge.asked)} got the huge pages they "
            f"asked for ({reason}): reading weights is some percent slower",
            advice,
        )
    if report.disk.free is not None and report.disk.free < _SMALL_DISK:
        yield (
            "disk",
            f"{format_bytes(report.disk.free)} are free for models in {report.disk.cache}",
            "free some, or set PRONK_HOME to a folder on a larger disk",
        )


def _of_power(report: Report) -> Iterator[_Words]:
    frequency = report.frequency
    # These drivers call "powersave" what others call "schedutil"; the preference decides.
    own = frequency.driver in ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
    saving = frequency.preference in ("power", "balance_power") if own else True
    if frequency.governor == "powersave" and saving:
        yield (
            "governor",
            "the powersave governor keeps the clocks low",
            "as root: cpupower frequency-set -g performance (or choose it in the settings)",
        )
    elif frequency.allowed and frequency.hardware and frequency.allowed < 0.95 * frequency.hardware:
        yield (
            "clock-limit",
            f"clocks are limited to {frequency.allowed / 1e9:.1f} of "
            f"{frequency.hardware / 1e9:.1f} GHz",
            "raise scaling_max_freq, or choose the performance profile in the settings",
        )
    for zone in report.thermal.zones:
        limit = zone.limit or 95.0
        if zone.celsius >= limit - 5:
            yield (
                "hot",
                f"{zone.name} is at {zone.celsius:.0f} degrees, near its limit of {limit:.0f}: "
                "clocks fall",
                "let the machine cool, clear its vents, or run with fewer --threads",
            )
    if report.throttled_meanwhile:
        yield (
            "throttled",
            f"cores were throttled for heat {report.throttled_meanwhile} times while this ran",
            "let the machine cool, clear its vents, or run with fewer --threads",
        )
    if report.power.on_battery:
        left = "" if report.power.percent is None else f" ({report.power.percent} % left)"
        yield (
            "battery",
            f"the machine runs on its battery{left}: clocks are lower",
            "plug it in",
        )


def _of_company(report: Report) -> Iterator[_Words]:
    load = report.load
    if load.busy is not None and _busy(load):
        yield (
            "busy",
            f"other programs take {load.busy:.0%} of the cores: every step waits for the slowest "
            "thread",
            "stop them, or leave them cores of their own: run with fewer --threads",
        )
    steal = max(load.steal or 0.0, load.steal_since_start or 0.0)
    if steal > 0.02:
        yield (
            "steal",
            f"the host of this virtual machine gives {steal:.0%} of its time to others",
            "expect figures to vary; ask for dedicated cores",
        )
