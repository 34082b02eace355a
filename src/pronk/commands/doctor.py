"""``pronk doctor``: what this machine is, what Pronk will use of it, and what slows it down."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pronk.commands import common
from pronk.units import format_bytes

if TYPE_CHECKING:
    from pronk.device.cpu import Cpu
    from pronk.device.doctor import Report
    from pronk.device.limits import MachineLimits

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: all cores)")
    parser.add_argument(
        "--refresh", action="store_true", help="measure the machine's limits again, now"
    )
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.cache import home
    from pronk.commands.progress import Progress
    from pronk.device.doctor import examine, plan, warnings
    from pronk.device.limits import known_limits, measure_limits
    from pronk.model import choose_threads

    chosen = plan(choose_threads(args.threads))

    def measure(cpu: Cpu, busy: bool) -> MachineLimits:
        with Progress("measuring") as progress:
            return known_limits(
                home() / "limits.json", cpu.model, chosen.threads,
                lambda threads: measure_limits(threads, progress=progress),
                refresh=args.refresh, keep=not busy)  # fmt: skip

    report = examine(chosen, home(), measure)
    if args.json:
        common.print_json(report.to_dict())
        return
    for name, text in _lines(report):
        print(f"{name:<12} {text}")
    found = warnings(report)
    print()
    if not found:
        print("nothing slows Pronk down here")
    for warning in found:
        print(f"! {warning.what}\n  {warning.do}")


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    plan, cpu = report.plan, report.cpu
    kernels = f"{plan.isa}: {plan.kernels}" if plan.isa else "no kernels"
    yield "will use", f"{plan.threads} threads, {kernels}"
    others = ", ".join(plan.available)
    forced = f"; PRONK_ISA={plan.forced}" if plan.forced else ""
    yield "kernels", f"{others}, best first{forced}"
    machine = "virtual machine" if cpu.virtual else ""
    yield "cpu", ", ".join(part for part in (cpu.model, cpu.architecture, machine) if part)
    if cpu.features:
        yield "", " ".join(cpu.features)
    quota = "no quota" if cpu.quota is None else f"a quota of {cpu.quota:g}"
    yield (
        "cores",
        f"{_or(cpu.physical)} of {_or(cpu.logical)} CPUs, {_or(cpu.affinity)} to run on, {quota}",
    )
    if cpu.caches:
        yield (
            "caches",
            ", ".join(
                f"L{c.level}{'' if c.kind == 'unified' else c.kind[:1]} {_cache(c.bytes)}"
                + (f" for {c.shared_by}" if c.shared_by and c.shared_by > 1 else "")
                for c in cpu.caches
            ),
        )
    memory = report.memory
    limit = "no limit" if memory.limit is None else f"a limit of {format_bytes(memory.limit)}"
    yield "memory", f"{_size(memory.available)} of {_size(memory.total)} available, {limit}"
    huge = report.huge_pages
    yield (
        "huge pages",
        f"{huge.mode or 'unknown'}; {_size(huge.granted)} of {_size(huge.asked)} asked for",
    )
    if report.limits:
        limits = report.limits
        yield "bandwidth", f"{limits.bandwidth / 1e9:.1f} GB/s, {limits.threads} threads"
        peaks = limits.int8_peaks.items()
        yield "int8 peak", ", ".join(f"{isa} {peak / 1e12:.2f} Tera-op/s" for isa, peak in peaks)
        unsure = report.limits_unsure
        why = "while others were busy: not kept" if unsure else "--refresh measures again"
        yield "", f"measured {limits.measured} ({why})"
    yield from _weather(report)
    yield "cache", f"{report.disk.cache}, {_size(report.disk.free)} free"
    yield "versions", ", ".join(f"{k} {v or 'missing'}" for k, v in report.versions.items())
    for extra, packages in report.extras.items():
        there = [f"{k} {v}" for k, v in packages.items() if v]
        missing = [k for k, v in packages.items() if not v]
        words = ", ".join(there) + (f"; without {', '.join(missing)}" if missing else "")
        yield f"  [{extra}]", words.removeprefix("; ")


def _weather(report: Report) -> Iterator[tuple[str, str]]:
    """Heat, clocks, power and company."""
    thermal, frequency, power, load = report.thermal, report.frequency, report.power, report.load
    heat = [f"{zone.name} {zone.celsius:.0f} °C" for zone in thermal.zones]
    if thermal.throttled is not None:
        heat.append(f"throttled {thermal.throttled} times since the start")
    yield "heat", ", ".join(heat) or "no sensor"
    clock = f", {frequency.current / 1e9:.1f} GHz now" if frequency.current else ""
    yield "governor", f"{frequency.governor or 'unknown'}{clock}"
    if power.on_battery is None:
        yield "power", "no battery"
    else:
        left = "" if power.percent is None else f", {power.percent} %"
        yield "power", ("battery" if power.on_battery else "plugged in") + left
    yield (
        "load",
        (
            f"{_share(load.busy)} of the cores busy, {_share(load.steal)} stolen by the host "
            f"({_share(load.steal_since_start)} since the start), load average {_or(load.average)}"
        ),
    )


def _cache(size: int) -> str:
    return f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


def _or(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def _size(value: int | None) -> str:
    return "unknown" if value is None else format_bytes(value)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
