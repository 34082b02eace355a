"""Fitting: what is chosen, measured, kept and refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from pronk.checkpoint.bundle import is_bundle
from pronk.checkpoint.kinds import KINDS
from pronk.checkpoint.open import open_checkpoint
from pronk.compress.fit import FitReport, Tools, fit, source_formats
from pronk.compress.fit_view import print_report
from pronk.device import child, footprint
from pronk.device.plan import candidates
from pronk.errors import BudgetError, PronkError, RequestError

FIT = (sys.executable, "-m", "pronk", "fit", "--context", "64")
OVERHEAD, CONTEXT = 50_000_000, 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama_dir(tmp_path_factory.mktemp("fit") / "hf")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def totals(source: Path) -> list[int]:
    with open_checkpoint(source) as ckpt:
        found = candidates(ckpt.spec, CONTEXT, OVERHEAD, source_formats(ckpt))
    return sorted(one.plan.total for one in found)


def planned(path: Path) -> int:
    plan: dict[str, int] = json.loads((path / "pronk.json").read_text())["plan"]
    return plan["total"]


class Bench:
    """Measures a peak that is `extra` bytes over the plan in the bundle."""

    def __init__(self, extra: Callable[[int], int] = lambda run: 0) -> None:
        self.extra, self.runs, self.texts = extra, 0, []

    def bench(self, path: Path, context: int, threads: int | None) -> dict[str, Any]:
        assert (context, threads) == (CONTEXT, 2)
        assert path.name.startswith(".out.tmp-")
        assert not (path.parent / "out").exists()
        self.runs += 1
        peak = planned(path) + self.extra(self.runs)
        return {"peak_memory": peak, "ttft": 0.1, "decode": 300.0, "load_time": 0.2}

    def evaluate(
        self, path: Path, text: str | None, context: int, threads: int | None
    ) -> dict[str, Any]:
        self.texts.append(text)
        return {"perplexity": 13.0, "tokens": 99}

    def tools(self) -> Tools:
        return Tools(lambda path: OVERHEAD, self.bench, self.evaluate)


def run(source: Path, memory: int, out: Path, bench: Bench, **extra: Any) -> FitReport:
    return fit(
        source,
        memory,
        CONTEXT,
        out,
        threads=2,
        tools=bench.tools(),
        **extra,
    )


def test_the_best_that_fits(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    bench, stages = Bench(), []
    budget = totals(source)[-1]
    report = run(
        source, budget, tmp_path / "out", bench, text=text,
        progress=lambda what, done, total: stages.append((what, done == total)),
    )  # fmt: skip
    assert dict(report.chosen.variant.formats) == dict.fromkeys(KINDS, "q8_0")
    assert report.chosen.plan.total == budget
    assert bench.texts == [str(text)]
    assert ("quantizing", True) in stages and ("measuring", True) in stages
    manifest = json.loads((tmp_path / "out" / "pronk.json").read_text())
    assert manifest["budget"] == {"memory": budget, "context": CONTEXT}
    assert manifest["measurements"] == {
        "bench": {"peak_memory": budget, "ttft": 0.1, "decode": 300.0, "load_time": 0.2},
        "eval": {"perplexity": 13.0, "tokens": 99},
    }
    assert set(manifest["quantization_error"]) == set(KINDS)
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["memory"] == manifest["plan"]
    assert as_json["formats"] == manifest["formats"]
    assert len(as_json["considered"]) >= 5


def test_measured_over_the_budget_gives_way(source: Path, tmp_path: Path) -> None:
    budget = totals(source)[-1]
    # The first variant takes 1,000 bytes more than planned, as do those after it.
    report = run(source, budget, tmp_path / "out", Bench(lambda run: 1000))
    assert len(report.rejected) == 1
    assert report.rejected[0][1] == budget + 1000
    assert report.measurements["bench"]["peak_memory"] <= budget
    hashes = json.loads((tmp_path / "out" / "pronk.json").read_text())["sha256"]
    assert set(hashes) == set(names(tmp_path / "out")) - {"pronk.json"}
    # The next is the best of those that are smaller by the excess.
    within = [one for one in report.considered if one.plan.total <= budget - 1000]
    assert report.chosen.variant == within[0].variant


def test_nothing_measured_within_the_budget(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="measured"):
        run(source, totals(source)[-1], tmp_path / "out", Bench(lambda run: 10**7))
    assert names(tmp_path) == []


def test_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    bench, smallest = Bench(), totals(source)[0]
    with pytest.raises(BudgetError, match=f"--memory {smallest} "):
        run(source, 20_000_000, tmp_path / "out", bench)
    assert bench.runs == 0
    assert names(tmp_path) == []


def test_a_failing_measurement_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def fail(path: Path, context: int, threads: int | None) -> dict[str, Any]:
        raise KeyboardInterrupt

    bench = Bench()
    bench.bench = fail
    with pytest.raises(KeyboardInterrupt):
        run(source, totals(source)[-1], tmp_path / "out", bench)
    bench.bench = lambda path, context, threads: {}
    with pytest.raises(PronkError, match="peak_memory"):
        run(source, totals(source)[-1], tmp_path / "out", bench)
    assert names(tmp_path) == []


def test_requests_that_cannot_be_met(source: Path, tmp_path: Path) -> None:
    for context in (1, 513):
        with pytest.raises(RequestError, match="context"):
            fit(source, 10**9, context, tmp_path / "out")
    # Without a context it is the model's own, here shorter than the default.
    bench = Bench()
    bench.bench = lambda path, context, threads: {"peak_memory": context}
    report = fit(source, 10**9, None, tmp_path / "any", tools=bench.tools())
    assert report.context == report.measurements["bench"]["peak_memory"] == 512
    assert report.chosen.plan.arena > 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(RequestError, match="not a bundle"):
        run(source, 10**9, tmp_path / "out", Bench())


def test_the_source_formats_are_found(source: Path, tmp_path: Path) -> None:
    file = checkpoints.tiny_gguf(tmp_path / "tiny.gguf", source, "q4_1")
    with open_checkpoint(file) as ckpt:
        assert source_formats(ckpt) == {kind: {"q4_1": 1.0} for kind in KINDS}
    report = run(file, totals(file)[-1], tmp_path / "out", Bench())
    assert dict(report.chosen.variant.formats) == dict.fromkeys(KINDS, "q4_1")
    assert set(report.quantization_error.values()) == {0.0}
    assert is_bundle(tmp_path / "out")


def test_the_report_is_printed(source: Path, tmp_path: Path) -> None:
    from rich.console import Console

    report = run(source, totals(source)[-1], tmp_path / "out", Bench(lambda run: 1000))
    console = Console(width=160, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    for part in ("weights", "overhead", "50.0", "rejected", "perplexity 13.00", "300 tokens/s"):
        assert part in text


def test_children_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child_fails.py").write_text("import sys; sys.exit('first\\nthe reason')")
    (tmp_path / "child_talks.py").write_text("print('hello')")
    (tmp_path / "child_counts.py").write_text("import sys; print('{\"n\": %s}' % len(sys.argv))")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(PronkError, match="child_fails failed: the reason"):
        child.run_json("child_fails", [])
    with pytest.raises(PronkError, match="JSON"):
        child.run_json("child_talks", [])
    assert child.run_json("child_counts", ["a", "b"]) == {"n": 3}
    # A file in the directory one works in is no module of Pronk's.
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PronkError, match="No module named"):
        child.run_json("child_counts", [])


def test_footprint_of_a_fresh_process(source: Path) -> None:
    first, second = footprint.measure(source), footprint.measure(source)
    assert 15 << 20 < first < 150 << 20
    assert abs(first - second) < 0.05 * first
    with pytest.raises(PronkError, match=r"footprint failed"):
        footprint.measure(source / "none")


def test_fit_from_end_to_end(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*FIT, str(source), "--memory", "200MB", "-o", str(tmp_path / "out"), "--json"],
        capture_output=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["measurements"]["bench"]["peak_memory"] <= 200_000_000
    assert report["measurements"]["eval"]["perplexity"] > 1
    # No longer than the context fitted to: more would need more memory.
    assert report["measurements"]["eval"]["window"] == 64
    # Not in this process, which may hold more than the budget already.
    ran = subprocess.run(
        [*FIT[:3], "run", str(tmp_path / "out"), "once", "--json", "--max-tokens", "4"],
        capture_output=True,
        check=True,
    )
    assert json.loads(ran.stdout)["tokens"] >= 1
    refused = subprocess.run(
        [*FIT, str(source), "--memory", "2MB", "-o", str(tmp_path / "none")],
        capture_output=True,
        check=False,
    )
    assert refused.returncode == 2
    assert b"--memory" in refused.stderr
    assert not (tmp_path / "none").exists()
