"""``bench --profile``: what is recorded, how it adds up, and what is drawn."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from checkpoints import tiny_gguf, tiny_llama_dir
from test_cli import pronk, sentence

from pronk import load
from pronk.evaluate.profile import profile
from pronk.evaluate.profile_view import format_phase, plot
from pronk.graph.cost import Step, program_costs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    return tiny_gguf(folder / "tiny.gguf", tiny_llama_dir(folder / "hf"), "q4_1")


@pytest.fixture(scope="module")
def model(tiny):
    with load(tiny, threads=2, context=512) as model:
        yield model


@pytest.fixture(scope="module")
def phases(model):
    ticks = iter(range(1000))  # every phase takes one second
    return profile(model, list(range(3, 203)), tokens=6, runs=2, clock=lambda: next(ticks))


def test_nothing_is_recorded_unless_asked(model):
    list(zip(range(3), model.generate("the quick"), strict=False))
    recording = model.recording()
    assert not recording.steps
    assert not any(spent.calls or spent.seconds for spent in recording.times)


def test_steps_and_calls_are_those_that_ran(model):
    prompt = list(range(3, 203))
    model.record()
    next(pieces := model.generate(prompt))
    recording = model.recording()
    at_once = model.program.limits.max_tokens
    assert recording.steps == (
        Step.of(range(at_once), [0] * at_once),
        Step.of(range(at_once, 200), [0] * (200 - at_once), [1]),
    )
    ran = {"T": 2, "R": 1}
    ops = model.program.graph.ops
    chained = [before for before, op in pairwise(ops) if op.attrs.get("chained")]
    for op, spent in zip(ops, recording.times, strict=True):
        calls = 0 if op.kind == "workspace" else ran[model.program.graph.values[op.output].rows]
        assert spent.calls == calls, op
        assert 0 <= spent.wait <= spent.seconds
        # A thread that got no rows saw no time of any but the last of a chain.
        assert calls or not spent.seconds
        assert spent.seconds or not calls or op in chained
    model.record()
    next(pieces)
    assert model.recording().steps == (Step.of([200], [0], [1]),)
    model.record(False)
    next(pieces)
    assert not model.recording().steps


def test_recording_changes_no_bit(model):
    before = model.logits(range(3, 60))
    model.record()
    during = model.logits(range(3, 60))
    model.record(False)
    assert (before == during).all()


def test_phases_cost_what_their_steps_do(model, phases):
    prefill, decode = phases
    assert (prefill.name, prefill.tokens, prefill.context) == ("prefill", 200, 200)
    assert (decode.name, decode.tokens, decode.context, decode.steps) == ("decode", 5, 200, 5)
    steps = [Step.of([position], [0], [1]) for position in range(200, 205)]
    expected = sum((cost.macs for cost in program_costs(model.program, steps)), 0)
    assert decode.cost.macs == expected
    for phase in phases:
        assert phase.seconds == 1
        assert phase.outside == pytest.approx(1 - sum(row.seconds for row in phase.rows))
        assert [row.seconds for row in phase.rows] == sorted(
            (row.seconds for row in phase.rows), reverse=True
        )
    labels = {row.label for row in decode.rows}
    assert {"matmul gate|up q4_1", "matmul head q4_1", "attend", "rms_norm"} <= labels


def test_fractions_are_of_the_limits(phases):
    data = phases[1].to_dict(bandwidth=1e9, peak=1e12)
    assert data["tokens_per_second"] == 5
    assert data["fraction_of_bandwidth"] == pytest.approx(data["bytes"] / 1e9)
    assert data["fraction_of_peak"] == pytest.approx(2 * data["multiply_adds"] / 1e12)
    shares = sum(op["share"] for op in data["ops"])
    assert shares + data["outside"] == pytest.approx(1)
    for key in ("bytes", "multiply_adds", "weight_bytes", "kv_bytes", "activation_bytes"):
        assert data[key] == sum(op[key] for op in data["ops"]), key


def test_the_table_names_every_op(phases):
    data = phases[0].to_dict(1e9, 1e12)
    lines = format_phase("prefill", data, "peak")
    assert "200 tokens in 2 steps" in lines[0]
    for op in data["ops"]:
        assert any(line.startswith(f"  {op['op']} ") for line in lines)
    assert "outside the ops" in lines[-2]


@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_plots(phases, tmp_path, suffix):
    path = tmp_path / f"profile.{suffix}"
    plot(path, "tiny", {phase.name: phase.to_dict(1e9, 1e12) for phase in phases})
    start = {"svg": b"<?xml", "png": b"\x89PNG", "html": b"<!doctype html>"}[suffix]
    written = path.read_bytes()
    assert written.startswith(start)
    assert suffix == "png" or b"</svg>" in written
    assert list(tmp_path.iterdir()) == [path]


def test_the_verb(tiny, tmp_path):
    arguments = ("bench", tiny, "--prompt-tokens", 40, "--tokens", 4, "--runs", 1, "--profile")
    data = json.loads(pronk(*arguments, "--json").stdout)
    assert data["isa"] in data["int8_peaks"]
    assert data["bandwidth"] > 0
    assert data["prefill"]["tokens"] == data["decode"]["context"] == 40
    assert data["decode"]["ops"][0]["fraction_of_bandwidth"] > 0
    assert "decode: 3 tokens after 40 in 3 steps" in pronk(*arguments).stdout


def test_plots_that_cannot_be_drawn(tiny, tmp_path):
    assert "--profile" in sentence("bench", tiny, "--plot", tmp_path / "a.svg")
    assert "a.pdf" in sentence("bench", tiny, "--profile", "--plot", tmp_path / "a.pdf")
    nowhere = tmp_path / "none" / "a.svg"
    assert "not there" in sentence("bench", tiny, "--profile", "--plot", nowhere)
