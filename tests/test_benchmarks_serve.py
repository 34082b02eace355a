"""The benchmarks of serving: what they sum up, and what a soak must tell."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_load_is_summed_up():
    import clients
    import tables

    words = clients.words(None)
    texts = clients.prompts(words, 20)
    assert len(set(texts)) == 20 and texts == clients.prompts(words, 20)
    others = clients.prompts(words, 20, seed=1) + clients.prompts(words, 20, to="b")
    starts = {text.partition(" Go on: ")[0] for text in (*texts, *others)}
    assert len(starts) == 60  # nothing is found in a server's cache
    assert clients.percentiles(range(100)) == {"p50": 50, "p90": 90, "p99": 99}
    assert clients.percentiles([]) == {}
    seen = [
        clients.Seen(0.0, [1.0, 1.5, 2.0], "abc", 3, end=2.0),
        clients.Seen(0.0, [3.0], "a", 1, end=3.0),
        clients.Seen(0.0, refused=503, end=0.1),
    ]
    run = clients.summary(seen, 2.0)
    assert run["requests"] == 2 and run["tokens_per_second"] == 2
    assert run["ttft"]["p99"] == 3 and run["tpot"]["p50"] == 0.5 and run["e2e"]["p50"] == 3
    trip = {"p50": 0.0042, "p90": 0.005, "p99": 0.006}
    peer = {**run, "tokens_per_second": 0.25, "ttft": {**run["ttft"], "p90": 15.0}}
    result = {"benchmark": "serve", "overhead": {"4": 0.25}, "runs": [
        {"side": "pronk", "round": 0, "clients": 16, **run},
        {"side": "llama_cpp.server", "round": 0, "clients": 16, **peer},
        {"side": "engine", "round": 0, "clients": 16, "tokens_per_second": 8.0}],
        "prefix": {"tokens": 2000, "cold": [1.0, 1.2], "warm": [0.1, 0.2], "ratio": 8.0},
        "open": [{"side": "pronk", "load": 0.5, **run}], "round_trip": {"pronk gRPC": trip},
        "grpc": {"rate": {"4": 1.1}, "ttft": {"4": 0.9}}}  # fmt: skip
    shown = tables.show(result)
    assert "| 16      | pronk            | 2 " in shown and "| 50%  | pronk" in shown
    assert "25% at 4" in shown
    assert "8.0 ≥ 4 at 16" in shown and "5.0 ≥ 4 at 16" in shown
    assert "after 1,100 ms" in shown and "8.0 < 10 times sooner" in shown
    assert "1.10 at 4" in shown and "| pronk gRPC       | 4.2 " in shown


def test_an_overload_is_told():
    import overload
    import tables
    from clients import Seen, summary

    done = [Seen(0.0, [1.0], "a", 1, end=2.0), *(Seen(0.0, refused=503, end=0.02),) * 3]
    assert overload.refusals(done)["refused"] == {"503": 3}
    near = {"load": 0.9, "target": None, **summary(done[:1], 1), **overload.refusals(done[:1])}
    held = {"load": 10.0, "target": 1.0, **summary(done, 1), **overload.refusals(done)}
    shown = tables.show({"benchmark": "overload", "carried": 2.5, "runs": [near, held]})
    assert "3 (503)" in shown and "20, 20" in shown and "1.00 (to the first token)" in shown


@pytest.fixture
def soaked():
    """A result of `soak.py` in which nothing is wrong."""
    rows = [
        {"time": 2.0 * i, "rss": 3e8 if i > 3 else 2e8 + 2e7 * i, "threads": 9.0, "files": 30.0,
         "running": 4.0, "waiting": 1.0, "preempted": 2.0, "generated": 100.0 * i,
         "held": 10.0, "cached": 20.0, "free": 34.0}
        for i in range(40)
    ]  # fmt: skip
    after = {**rows[-1], "running": 0.0, "waiting": 0.0, "held": 0.0, "free": 44.0}
    return {
        "benchmark": "soak", "bound": 60.0, "bound_growth": 5e5, "warm": 0.2, "printed": "",
        "seconds": 78.0, "counts": {"chat": {"ok": 9, "refused": 1}, "bad request": {"refused": 3}},
        "longest": 12.0, "hung": [], "wrong": [], "growth": 0.0, "after": after, "samples": rows,
        "audit": {"files": 2, "lines": 40, "error": ""},
    }  # fmt: skip


def test_a_soak_tells_what_must_not_be(soaked, tmp_path):
    import output
    import soak
    import tables

    assert soak.faults(soaked) == [] and abs(soak.growth(soaked["samples"])) < 1e-6
    shown = tables.show(soaked)
    assert "13 requests in 1 minutes" in shown and "| chat        | 9  | 1 " in shown
    for row in soaked["samples"]:
        row["rss"] += 1e6 * row["time"] / 60
    assert soak.growth(soaked["samples"]) == pytest.approx(1e6)
    for changes, said in (
        ({"growth": 1e6}, "grows by 1.00 MB"),
        ({"hung": ["chat"]}, "hung: chat"),
        ({"wrong": ["500"]}, "wrong: 500"),
        ({"printed": "Traceback"}, "printed: Traceback"),
        ({"audit": {"files": 1, "lines": 0, "error": "line 2"}}, "does not hold: line 2"),
        ({"after": {**soaked["after"], "held": 3.0}}, "3 KV blocks"),
        ({"after": {**soaked["after"], "waiting": 1.0}}, "requests are left"),
    ):
        (fault,) = soak.faults({**soaked, **changes})
        assert said in fault
    output.draw(soaked, tmp_path / "soak.svg")
    assert "KV blocks" in (tmp_path / "soak.svg").read_text()


def test_sleep_is_no_time(monkeypatch):
    import soak

    monkeypatch.setattr(soak, "TICK", 0.01)
    now = [0.0]
    monkeypatch.setattr(soak.time, "monotonic", lambda: now[0])
    awake = soak.Awake()
    now[0] = 0.015
    assert awake.now() == 0.015
    now[0] = 600
    assert awake.now() == 0.02

    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    monkeypatch.undo()
    monkeypatch.setattr(soak, "TICK", 0.01)

    async def both() -> None:
        awake = soak.Awake()
        counting = asyncio.create_task(awake.run())
        assert await awake.within(60, work(0.05)) == "done"
        with pytest.raises(TimeoutError):
            await awake.within(0.05, work(60))
        counting.cancel()

    asyncio.run(both())


def test_the_server_s_notes_are_no_faults():
    import soak

    assert not soak._is_fault("pronk: it: 98.0 MB, loaded in 0.3 s")
    assert not soak._is_fault("pronk: ttft of it changed from 0.1 to 3")
    assert soak._is_fault("Traceback (most recent call last):")
    assert soak._is_fault("pronk: a gRPC call failed")
