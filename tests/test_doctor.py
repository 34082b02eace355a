"""``pronk doctor`` on machines made of files, and once on this one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import pronk, sentence

from pronk import _native
from pronk.device.cpu import Cache, read_cpu
from pronk.device.doctor import Plan, examine, plan, warnings
from pronk.device.limits import MachineLimits, available_isas, known_limits, measure_limits
from pronk.device.versions import extras, read_versions

REGION = SimpleNamespace(address=0x7F0000000000, bytes=32 << 20)
STAT = "cpu  {busy} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n"
SMAPS = """\
7e0000000000-7e0000200000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
7f0000000000-7f0002000000 rw-p 00000000 00:00 0
Size:              32768 kB
AnonHugePages:     {granted} kB
VmFlags: rd wr hg
"""
LAPTOP = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-3,6\n",
    "proc/self/cgroup": "0::/user.slice/session\n",
    "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable:  8000000 kB\n",
    "proc/loadavg": "0.25 0.20 0.10 1/200 4242\n",
    "proc/stat": STAT.format(busy=1000, idle=9000, steal=0),
    "proc/self/smaps": SMAPS.format(granted=32768),
    "sys/devices/system/cpu/online": "0-7\n",
    **{
        f"sys/devices/system/cpu/cpu{i}/topology/{name}": f"{value}\n"
        for i in range(8)
        for name, value in (("physical_package_id", 0), ("core_id", i // 2))
    },
    "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
    "sys/devices/system/cpu/cpu0/cache/index0/type": "Data\n",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "48K\n",
    "sys/devices/system/cpu/cpu0/cache/index0/shared_cpu_list": "0-1\n",
    "sys/devices/system/cpu/cpu0/cache/index3/level": "3\n",
    "sys/devices/system/cpu/cpu0/cache/index3/type": "Unified\n",
    "sys/devices/system/cpu/cpu0/cache/index3/size": "16384K\n",
    "sys/devices/system/cpu/cpu0/cache/index3/shared_cpu_list": "0-7\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "2\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "3\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "intel_pstate\n",
    "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference": "balance_performance\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2100000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "4200000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "4200000\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/kernel/mm/transparent_hugepage/hpage_pmd_size": "2097152\n",
    "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone0/temp": "61000\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "95000\n",
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "1\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Charging\n",
    "sys/class/power_supply/BAT0/capacity": "80\n",
    "sys/class/power_supply/mouse/type": "Battery\n",
    "sys/class/power_supply/mouse/scope": "Device\n",
    "sys/class/power_supply/mouse/status": "Discharging\n",
}
HEALTHY = Plan(4, "avx512", "", ("avx512", "avx2", "generic"), None)


class Machine:
    """A root of files; what happens while the doctor waits is `meanwhile`."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.root = root
        self.write(files)

    def write(self, files):
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def examine(self, plan=HEALTHY, measure=None, **meanwhile):
        later = {"busy": 1000, "idle": 9100, "steal": 0, **meanwhile}
        later = {"proc/stat": STAT.format(**later)} if (self.root / "proc").exists() else {}
        return examine(
            plan, self.root / "cache", measure, self.root, REGION, lambda: self.write(later)
        )


@pytest.fixture
def laptop(tmp_path):
    return Machine(tmp_path, LAPTOP)


def ids(report):
    return {warning.id for warning in warnings(report)} - {"disk"}  # the test's own disk


def test_a_healthy_laptop(laptop):
    report = laptop.examine()
    cpu = report.cpu
    assert (cpu.model, cpu.logical, cpu.physical, cpu.affinity) == ("Some CPU", 8, 4, 5)
    assert cpu.features == ("avx2", "avx512_vnni")
    assert cpu.caches == (Cache(1, "data", 48 << 10, 2), Cache(3, "unified", 16 << 20, 8))
    assert (cpu.quota, cpu.virtual) == (None, False)
    memory = report.memory
    assert (memory.total, memory.available, memory.limit) == (16_384_000_000, 8_192_000_000, None)
    huge = report.huge_pages
    assert (huge.mode, huge.size, huge.asked, huge.granted) == (
        "madvise", 2 << 20, 32 << 20, 32 << 20)  # fmt: skip
    (zone,) = report.thermal.zones
    assert (zone.name, zone.celsius, zone.limit) == ("x86_pkg_temp", 61, 95)
    assert report.thermal.throttled == 5
    assert (report.power.on_battery, report.power.percent) == (False, 80)
    assert (report.frequency.current, report.frequency.governor) == (2_100_000_000, "powersave")
    assert (report.load.busy, report.load.steal, report.load.average) == (0, 0, 0.25)
    assert ids(report) == set()
    assert json.loads(json.dumps(report.to_dict()))["cpu"]["physical"] == 4


CPU0 = "sys/devices/system/cpu/cpu0"


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({"proc/self/smaps": SMAPS.format(granted=2048)}, "huge-pages", "2.1 MB of 33.6 MB"),
        (
            {
                "proc/self/smaps": SMAPS.format(granted=0),
                "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
            },
            "huge-pages",
            "turned off",
        ),
        ({f"{CPU0}/cpufreq/energy_performance_preference": "power\n"}, "governor", "powersave"),
        ({f"{CPU0}/cpufreq/scaling_driver": "acpi-cpufreq\n"}, "governor", "powersave"),
        ({f"{CPU0}/cpufreq/scaling_max_freq": "1400000\n"}, "clock-limit", "1.4 of 4.2 GHz"),
        ({"sys/class/thermal/thermal_zone0/temp": "93000\n"}, "hot", "93 degrees"),
        (
            {
                "sys/class/power_supply/AC/online": "0\n",
                "sys/class/power_supply/BAT0/status": "Discharging\n",
            },
            "battery",
            "80 % left",
        ),
        ({"sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n"}, "quota", "1.5 CPUs"),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            "quota",
            "2 CPUs",
        ),
    ],
)
def test_what_slows_it_down(laptop, files, name, words):
    laptop.write(files)
    report = laptop.examine()
    assert ids(report) == {name}
    (warning,) = (w for w in warnings(report) if w.id == name)
    assert words in warning.what
    assert warning.do


def test_company_on_the_machine(laptop):
    report = laptop.examine(busy=1060, idle=9000, steal=40)
    assert report.load.busy == pytest.approx(0.6)
    assert report.load.steal == pytest.approx(0.4)
    assert ids(report) == {"busy", "steal"}
    # What comes and goes does not hide what went on before.
    laptop.write({"proc/stat": STAT.format(busy=0, idle=500, steal=500)})
    assert ids(laptop.examine(busy=0, idle=600, steal=500)) == {"steal"}


def test_throttling_while_it_measures(laptop):
    def measure(cpu, busy):
        assert (cpu.model, busy) == ("Some CPU", False)
        laptop.write({f"{CPU0}/thermal_throttle/core_throttle_count": "9\n"})
        return MachineLimits(1e9, {"avx512": 1e12}, "avx512", 4, "2020-01-01T00:00:00+00:00")

    report = laptop.examine(measure=measure)
    assert report.throttled_meanwhile == 7
    assert not report.limits_unsure  # they come from a file
    assert ids(report) == {"throttled"}


def test_limits_measured_among_others_are_marked(laptop):
    def measure(cpu, busy):
        return MachineLimits(1e9, {"avx512": 1e12}, "avx512", 4, "2999-01-01T00:00:00+00:00")

    assert laptop.examine(measure=measure, busy=1100).limits_unsure
    assert not laptop.examine(measure=measure).limits_unsure


def test_the_plan_is_judged(laptop):
    old = Plan(4, "avx2", "", ("avx2", "generic"), None)
    assert ids(laptop.examine(old)) == {"dot-products"}
    assert ids(laptop.examine(Plan(4, "avx2", "", ("avx512", "avx2"), "avx2"))) == {"isa"}
    refused = Plan(4, None, None, ("avx512", "avx2"), "mmx")
    report = laptop.examine(refused, measure=lambda cpu, busy: pytest.fail("nothing to measure"))
    (warning,) = (w for w in warnings(report) if w.id == "isa")
    assert "'mmx'" in warning.what


def test_limits_of_memory_in_control_groups(laptop):
    laptop.write(
        {
            "sys/fs/cgroup/user.slice/session/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.max": "2000000000\n",
        }
    )
    assert laptop.examine().memory.limit == 2_000_000_000
    laptop.write(
        {
            "proc/self/cgroup": "4:memory:/../docker/abc\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "1000000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    assert laptop.examine().memory.limit == 1_000_000_000


def test_a_board_that_says_little(tmp_path):
    board = Machine(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n",
            "sys/firmware/devicetree/base/model": "Small Board 5\0",
            "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
            "sys/class/hwmon/hwmon0/temp1_input": "94000\n",
        },
    )
    report = board.examine(Plan(4, "neon", "", ("neon", "generic"), None))
    assert (report.cpu.model, report.cpu.features) == ("Small Board 5", ("asimd", "asimddp"))
    assert ids(report) == {"hot"}


def test_a_system_without_these_files(tmp_path):
    report = Machine(tmp_path, {}).examine()
    assert (report.cpu.logical, report.cpu.quota, report.memory.total) == (None, None, None)
    assert report.huge_pages.granted is None
    assert ids(report) == set()


@pytest.mark.parametrize("garbage", ["", "\0\xff", "cpu", "cpu a b", ":::", "-", "1 2\n3:4:5"])
def test_damaged_files_are_no_readings(tmp_path, garbage):
    machine = Machine(tmp_path, dict.fromkeys(LAPTOP, garbage))
    report = examine(HEALTHY, tmp_path, None, tmp_path, REGION, lambda: None)
    assert report.cpu.quota is None
    assert machine.root == tmp_path
    json.dumps(report.to_dict())


def test_limits_are_kept(tmp_path):
    path, asked = tmp_path / "new" / "limits.json", []

    def measure(threads):
        asked.append(threads)
        isa = _native.isa()
        return MachineLimits(len(asked) * 1e9, {isa: 1e12}, isa, threads, "2020-01-01")

    def known(cpu="A", threads=2, **options):
        return known_limits(path, cpu, threads, measure, **options).bandwidth

    assert [known(keep=False), known(), known()] == [2e9 / 2, 2e9, 2e9]
    assert known("B") == 3e9  # another CPU
    assert known(threads=1) == 4e9
    assert known(refresh=True) == 5e9
    assert [known(), known("B"), known(threads=1)] == [5e9, 3e9, 4e9]
    assert asked == [2, 2, 2, 1, 2]
    for damage in ("", "[]", "{", path.read_text().replace("5000000000.0", '"x"')):
        path.write_text(damage)
        asked.clear()
        known()
        assert asked == [2]
        known()
        assert asked == [2]
    assert [file.name for file in path.parent.iterdir()] == ["limits.json"]


def test_the_better_of_two_measurements():
    a = MachineLimits(1e9, {"amx": 9e12, "avx512": 1e12}, "amx", 2, "2020-01-01")
    b = MachineLimits(2e9, {"amx": 8e12, "avx512": 3e12}, "amx", 2, "2020-01-02")
    best = MachineLimits(2e9, {"amx": 9e12, "avx512": 3e12}, "amx", 2, "2020-01-02")
    assert a.or_better(b) == best
    assert b.or_better(a).int8_peaks == best.int8_peaks


def test_limits_that_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    limits = MachineLimits(1e9, {"generic": 1e9}, "generic", 1, "2020-01-01")
    assert known_limits(tmp_path / "file" / "x.json", "A", 1, lambda threads: limits) is limits


def test_the_kernels_that_run(monkeypatch):
    monkeypatch.setenv("PRONK_ISA", "generic")
    chosen = plan(3)
    assert (chosen.threads, chosen.isa, chosen.forced) == (3, "generic", "generic")
    assert chosen.available[-1] == "generic"
    monkeypatch.setenv("PRONK_ISA", "mmx")
    assert plan(3).isa is None
    monkeypatch.delenv("PRONK_ISA")
    assert plan(3).isa == plan(3).available[0] == _native.isa()


@pytest.mark.parametrize("isa", available_isas())
def test_every_peak_can_be_measured(isa, monkeypatch):
    assert _native.int8_peak(100, 2, isa) > 0
    monkeypatch.setenv("PRONK_ISA", isa)
    limits = measure_limits(2, runs=1, most=2, size=1 << 20)
    best_vectors = next(name for name in available_isas() if name != "amx")
    tiles = {"amx"} & set(available_isas())
    assert limits.int8_peaks.keys() == {isa, best_vectors} | tiles
    assert limits.int8_peak == limits.int8_peaks[isa] > 0 < limits.bandwidth


def test_a_region_of_ours_is_found_in_this_process():
    report = examine(plan(1), Path("/"), pause=lambda: None)
    assert 0 <= report.huge_pages.granted <= report.huge_pages.asked
    assert read_cpu().affinity >= 1


def test_versions_and_extras():
    versions = read_versions()
    assert versions["pronk"] and versions["numpy"]
    listed = ["numpy>=1.26", 'boto3>=1 ; extra == "s3"', "pytest ; extra == 'dev'",
              'pronk[s3] ; extra == "dev"', 'no-such-package>2; extra == "s3"']  # fmt: skip
    found = extras(listed)
    assert found.keys() == {"s3", "dev"}
    assert found["dev"] == {"pytest": pytest.__version__}
    assert found["s3"]["no-such-package"] is None


def test_the_verb(home):
    data = json.loads(pronk("doctor", "--json", "--threads", 1).stdout)
    assert data["plan"]["threads"] == data["limits"]["threads"] == 1
    assert data["plan"]["isa"] in data["limits"]["int8_peaks"]
    assert data["disk"]["cache"] == str(home)
    if not data["limits_unsure"]:
        assert (home / "limits.json").exists()
    lines = pronk("doctor", "--threads", 1).stdout.splitlines()
    for word in ("will use", "bandwidth", "int8 peak", "huge pages", "load", "versions"):
        assert any(line.startswith(word) for line in lines), word
    assert "threads" in sentence("doctor", "--threads", 0)


def test_the_verb_when_no_kernels_run(home, monkeypatch):
    monkeypatch.setenv("PRONK_ISA", "mmx")
    out = pronk("doctor").stdout
    assert "no kernels" in out
    assert "unset PRONK_ISA" in out
