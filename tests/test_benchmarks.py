"""The benchmarks: their arithmetic, their workers, and the page made from their results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import tiny_llama_dir

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_page_is_made_from_the_results():
    import report

    assert report.load(), "there are no results"
    for path, text in report.pages().items():
        assert path.read_text() == text, path


def a_task(**changes):
    fast, slow = {"bandwidth": 40e9, "int8": 1e12}, {"bandwidth": 10e9, "int8": 1e12}

    def a_round(pronk, peer, probe):
        return {"values": {"pronk": pronk, "llama_cpp": peer}, "probes": [fast, probe]}

    task = {
        "title": "decode", "model": "m.gguf", "kind": "decode", "limit": "bandwidth",
        "cost": 100e6, "goals": {"llama_cpp": 2.0, "limit": 0.9}, "variants": {},
        "rounds": [a_round(300, 100, fast), a_round(320, 160, fast), a_round(310, 100, fast),
                   a_round(50, 100, slow)],
    }  # fmt: skip
    return {**task, **changes}, {"bandwidth": 40e9, "int8": 1e12}


def test_rounds_beside_a_slow_spell_do_not_count():
    import tables

    task, limits = a_task()
    found = tables.summary(task, limits)
    assert (found["rounds"], found["repeated"]) == (3, 1)
    assert found["medians"] == {"pronk": 310, "llama_cpp": 100}
    assert found["ratios"] == {"llama_cpp": 3.0}  # of 3.0, 2.0 and 3.1: round by round
    assert found["fractions"] == {"bandwidth": pytest.approx(310 * 100e6 / 40e9)}
    assert found["spreads"]["pronk"] == pytest.approx(10 / 310)


def test_the_table_says_which_goals_are_reached():
    import tables

    task, limits = a_task()
    starts = {"model": "m.gguf", "rounds": [{
        "pronk": {"load_time": 0.2, "import_time": 0.1, "peak_memory": 190_000_000,
                  "planned": {"weights": 100_000_000, "kv": 30_000_000}},
        "llama_cpp": {"load_time": 0.4, "import_time": 0.1, "peak_memory": 380_000_000},
    }]}  # fmt: skip
    text = tables.peers(
        {"tasks": {"decode": task}, "limits": limits, "starts": starts, "failures": {}}
    )
    assert "3.00 ≥ 2" in text
    assert "78% < 90%" in text
    assert "≤ 200 planned" in text
    load = next(line for line in text.splitlines() if "first step" in line)
    assert "0.20" in load
    assert "2.00" in load


def ask(engine: str, model: str, *tasks: dict) -> tuple[list[dict], int]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "engines.py"), engine, model, "--threads", "2",
         "--context", "64", "--first", "5"],
        input="".join(json.dumps(task) + "\n" for task in tasks),
        capture_output=True, text=True, check=False)  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def test_a_worker_measures_pronk(tmp_path):
    model = tiny_llama_dir(tmp_path / "tiny")
    prompt = list(range(3, 13))
    loaded, *answers = ask(
        "pronk", str(model),
        {"kind": "prefill", "prompt": prompt},
        {"kind": "decode", "prompt": prompt, "tokens": 4},
        {"kind": "decode", "prompt": prompt, "tokens": 4},
        {"kind": "together", "prompts": [prompt[:5], prompt[5:]], "tokens": 3},
        {"kind": "memory"},
    )[0]  # fmt: skip
    assert loaded["load_time"] > 0
    assert loaded["versions"]["pronk"]
    assert loaded["about"]["memory"]["total"] > 0
    assert len(answers) == 5
    assert all(a["value"] > 0 for a in answers)


def test_a_worker_that_cannot_load_says_so_in_a_sentence():
    (answer,), status = ask("pronk", "/nonexistent/model")
    assert status == 0
    assert "model" in answer["error"]
    assert "\n" not in answer["error"]


def test_a_missing_or_crashing_peer_is_one_sentence(tmp_path):
    import peers

    absent = peers.Peer("openvino", sys.executable, "model.gguf", 2, 64)
    with pytest.raises(peers.PeerError, match=r"^loading: \S+Error: .*$"):
        absent.start()
    script = tmp_path / "crash"
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    crashing = peers.Peer("llama_cpp", str(script), "model.gguf", 2, 64)
    with pytest.raises(peers.PeerError, match="ended with signal 11"):
        crashing.start()


def test_what_a_token_costs_comes_from_the_file(tmp_path):
    import peers

    from pronk.checkpoint.open import open_checkpoint

    path = tiny_llama_dir(tmp_path / "tiny")
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
    known = peers.facts(path)
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (2 * q + 2 * kv + 3 * spec.intermediate_size)
    assert known["parameters"] == spec.num_layers * layer
    assert known["head"] == spec.vocab_size * spec.hidden_size
    assert known["kv_bytes"] == spec.num_layers * 2 * kv * 2


@pytest.mark.parametrize("dtype", ["q8_0", "q4_1", "q6_k"])
def test_a_program_of_one_kind_of_op_runs(dtype):
    import one_op

    bench = one_op.Bench(2, "")
    runner, count, size = bench.matmul(48, 256, dtype, 4, streamed=False)
    assert count == 4
    assert size > 0
    assert one_op.seconds(runner, 3, least=0.001) > 0


def test_kernels_in_rows_and_attention_run():
    import one_op

    bench = one_op.Bench(2, "")
    for kind in ("rms_norm", "add", "activate"):
        assert one_op.seconds(bench.rowwise(kind, 64, 4, 3), 4, least=0.001) > 0
    runner = bench.attention(one_op.SHAPES[0], 128, 2, 4)
    assert one_op.seconds(runner, 4, 100, least=0.001) > 0


def test_a_command_names_no_place(monkeypatch):
    import output

    monkeypatch.setattr(sys, "argv", [
        "benchmarks/peers.py", "/some/where/model.gguf", "--out", "/x/y.json", "--rounds", "3",
        "--llama-python=/a/b", "--openvino-python", "/c/d", "--json"])  # fmt: skip
    assert output.command() == "python benchmarks/peers.py model.gguf --rounds 3"


def test_results_are_compact_and_whole():
    import output

    data = {"a": {"b": [1.23456, {"c": "d"}]}, "rows": [{"x": 1}, {"x": 2}], "n": 3, "e": {}}
    text = output.compact(data)
    assert json.loads(text) == {**data, "a": {"b": [1.235, {"c": "d"}]}}
    assert len(text.splitlines()) < 12


def test_long_contexts_are_measured_shown_and_drawn(tmp_path, monkeypatch):
    """The script on a tiny model: every figure of the page comes from its runs."""
    import long_context
    import output
    import report
    import tables

    model = tiny_llama_dir(tmp_path / "tiny", num_hidden_layers=4)
    out = tmp_path / "long_context.json"
    monkeypatch.setattr(sys, "argv", [
        "long_context.py", str(model), "--context", "256", "--attention", "window=64",
        "--attention", "window=64,global-every=2,sinks=4", "--runs", "1", "--needles", "1",
        "--tokens", "300", "--rope-scaling", "yarn:4", "--out", str(out)])  # fmt: skip
    long_context.main()
    result = json.loads(out.read_text())
    assert [v["name"] for v in result["variants"]] == [
        "as it is", "window=64", "window=64,global-every=2,sinks=4"]  # fmt: skip
    assert result["scaling"]["context"] == 512
    text = tables.show(result)
    for depth in result["depths"]:
        row = next(line for line in text.splitlines() if f"`{depth['attention']}`" in line)
        saved = 1 - depth["ratios"]["kv"]
        assert f"{saved:.0%} {'≥' if saved >= 0.4 else '<'} 40%" in row
        assert f"{depth['quality']['kl']:.4f}" in row
    results = {"long_context": result}
    page = report.with_end("# Words\n\nmore\n", results, {"long_context"})
    assert page.startswith("# Words\n\nmore\n\n## Measured\n")
    assert text in page
    # Written over itself it stays, and without results it ends after the words.
    assert report.with_end(page, results, {"long_context"}) == page
    assert report.with_end(page, {}, set()) == "# Words\n\nmore\n"
    assert out.with_suffix(".svg").exists()
    for name in ("one.svg", "two.svg"):
        output.draw(result, tmp_path / name)
    assert b"window=64" in (tmp_path / "one.svg").read_bytes()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_mixture_is_compared_with_a_dense_model_that_reads_as_much():
    import moe
    import tables

    sizes = {spec.name: moe.figures(moe.compiled(spec, "q4_0")) for spec in (moe.MOE, moe.DENSE)}
    assert sizes["moe"]["read"] == pytest.approx(sizes["dense"]["read"], rel=0.01)
    assert 0.8e9 < sizes["moe"]["parameters"] < 1.2e9
    good, slow = {"bandwidth": 40e9}, {"bandwidth": 10e9}
    rounds = [{"values": {"moe": 90.0, "dense": 100.0}, "probes": [good]},
              {"values": {"moe": 50.0, "dense": 51.0}, "probes": [good, slow]}]  # fmt: skip
    result = {"format": "q4_0", "models": sizes, "ratio": 0.9, "rounds": rounds,
              "limits": {"bandwidth": 40e9, "int8": 1e12}}  # fmt: skip
    for r in rounds:
        for found in r["probes"]:
            found["int8"] = 1e12
    text = tables.moe(result)
    assert "| 90.0 " in text
    assert "| 100.0 " in text
    assert "at 90% of the dense" in text


def test_less_memory_for_experts_is_measured_and_shown(tmp_path, monkeypatch):
    """The script on a tiny mixture: every figure of the page comes from its runs."""
    import experts
    import report
    import tables

    small = {"LAYERS": 2, "EXPERTS": 16, "CHOSEN": 2, "SHARES": (1.0, 0.6), "PROMPT": 32,
             "ANSWER": 4, "THRESHOLDS": ("", "0.4:1")}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(experts, name, value)
    layers = experts.SPEC.layers[:2]
    moe = replace(experts.SPEC.moe, experts=16, top_k=2, intermediate_size=32)
    spec = replace(experts.SPEC, hidden_size=64, head_dim=16, num_heads=4, num_kv_heads=2,
                   intermediate_size=32, layers=layers, moe=moe)  # fmt: skip
    monkeypatch.setattr(experts, "SPEC", spec)
    monkeypatch.setattr(experts, "probe", lambda *_: {"bandwidth": 40e9, "int8": 1e12})
    out = tmp_path / "experts.json"
    monkeypatch.setattr(
        sys, "argv", ["experts.py", "--rounds", "1", "--threads", "1", "--out", str(out)]
    )
    experts.main()
    result = json.loads(out.read_text())
    (turn,) = result["rounds"]
    assert turn["hit_rates"]["1"] == 1 > turn["hit_rates"]["0.6"] > 0
    assert turn["read"]["1"] == 0 < turn["read"]["0.6"]
    assert result["memory"]["0.6"] == 19 * result["sizes"]["expert"]
    all_of_them, fewer = result["fewer"]
    assert all_of_them["experts"] == 2 > fewer["experts"] >= 1
    assert all_of_them["kl"] == 0 < fewer["kl"]
    text = tables.show(result)
    row = next(line for line in text.splitlines() if line.startswith("| 60% of the experts"))
    assert f"{turn['hit_rates']['0.6']:.1%}" in row
    page = report.with_end("# Words\n", {"experts": result}, set())
    assert "**synthetic**" in page
    assert text in page


def test_variants_are_compared_beside_a_float_twin(tmp_path, monkeypatch):
    """The script on a tiny model: its own steps, but for what llama.cpp does."""
    import compression
    import output
    import tables
    from checkpoints import tiny_gguf

    model = tiny_gguf(tmp_path / "tiny.gguf", tiny_llama_dir(tmp_path / "tiny"), "q4_1")
    other = tiny_llama_dir(tmp_path / "other", seed=1)
    out, text = tmp_path / "compression.json", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    monkeypatch.setattr(sys, "argv", [
        "compression.py", str(model), "--text", str(text), "--window", "64", "--max-tokens", "150",
        "--variants", f"same={model},other={other}", "--recipes", "int8", "--exact", "int8",
        "--calibration", str(text), "--llama", "", "--tasks", "none", "--rounds",
        "0", "--threads", "1", "--work", str(tmp_path / "work"), "--out", str(out)])  # fmt: skip
    compression.main()
    result = json.loads(out.read_text())
    reference, rounded, exact, same, different = result["rows"]
    assert reference["by"] == "reference"
    assert rounded["seconds"] > 0
    # Nothing but the precision of activations tells these apart.
    assert exact["name"] == "int8, float32 activations"
    assert abs(exact["growth"]["value"] - rounded["growth"]["value"]) < 1e-3
    assert exact["kl"]["value"] != rounded["kl"]["value"]
    assert exact["bits"] == pytest.approx(rounded["bits"], rel=0.1)
    assert reference["bits"] == 32
    assert same["bits"] < 8
    # The twin holds the values that the quantized file stands for.
    assert same["kl"]["value"] < 1e-3 < different["kl"]["value"]
    assert abs(same["growth"]["value"]) < 0.01
    assert str(tmp_path) not in out.read_text()
    table = tables.show(result)
    assert f"{same['bytes'] / 1e6:.1f}" in table
    assert "llama.cpp" not in table
    # Beside llama.cpp's files: the smallest that is no smaller, as the paired test sees it.
    different |= {"by": "llama.cpp", "dequantized": ["q3_k"]}
    result["check"] = [{"name": "other", "tokens": 9, "pronk": 7.0, "llama_cpp": 7.007,
                        "dequantized": 6.999, "apart": -0.001}]  # fmt: skip
    table = tables.show(result)
    test = next(t for t in result["tests"]["perplexity"] if {t["a"], t["b"]} == {"same", "other"})
    assert test["adjusted"] < 0.05
    said = "better" if (test["value"] < 0) == (test["b"] == "same") else "worse"
    (line,) = (line for line in table.splitlines() if line.startswith("| same ") and "p " in line)
    assert f"| {said} " in line
    assert "| other* " in table
    assert "(-0.10%); with its values dequantized" in table
    output.draw(result, tmp_path / "one.svg")
    assert b"same" in (tmp_path / "one.svg").read_bytes()


def test_pruning_is_measured_shown_and_drawn(tmp_path, monkeypatch):
    """The script on a tiny model; a second run makes nothing again."""
    import output
    import pruning
    import report
    from checkpoints import mixed_lines

    model, text = tiny_llama_dir(tmp_path / "tiny", num_hidden_layers=4), tmp_path / "text"
    text.write_text("\n".join(mixed_lines(300)), encoding="utf-8")
    out, work = tmp_path / "pruning.json", tmp_path / "work"
    argv = ["pruning.py", str(model), "--calibration", str(text), "--text", str(text),
            "--removed", "20", "--methods", "wanda", "--grids", "int3-g32", "--steps", "2",
            "--grid-steps", "2", "--window", "32", "--samples", "2", "--recipes", "int4-rtn",
            "--work", str(work), "--out", str(out)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    pruning.main()
    result = json.loads(out.read_text())
    assert result["rows"][0]["recovered"]["kl"] > 0
    assert str(tmp_path) not in out.read_text()
    shown = output.show(result)
    assert "after 2 steps: perplexity" in shown
    assert "| wanda" in shown
    assert [one["name"] for one in result["compared"]] == [
        "as it is", "pruned-20", "sparse-wanda", "qat-int3-g32", "packed-int4-rtn",
        "packed-2-4-wanda",
    ]  # fmt: skip
    assert result["compared"][0]["kl"] == 0 < result["compared"][4]["kl"]
    assert "| 2:4 int4, wanda  | 3.5 " in shown
    assert "of the perplexity that rounding to nearest loses" in shown
    page = report.with_end("# Words\n", {"pruning": result}, {"pruning"})
    assert shown in page
    for name in ("one.svg", "two.svg"):
        output.draw(result, tmp_path / name)
    assert b"parameters removed" in (tmp_path / "one.svg").read_bytes()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    monkeypatch.setattr(pruning, "pronk", None)  # what is there is not made again
    pruning.main()


def test_sparse_int4_is_told_from_dense_that_is_smaller():
    import pruned_tables

    def row(name, kl):
        judged = {"kl": kl, "perplexity": 20.0, "top1_agreement": 0.5, "accuracy": {"piqa": 0.5}}
        return {"name": name, **judged}

    packed = [{"name": "packed-int3-gptq", "bits": 3.25}, {"name": "packed-2-4-wanda", "bits": 3.5}]
    result = {
        "rows": [], "zeros": [], "grids": [], "claims": {}, "steps": 2, "benchmark": "pruning",
        "judged": 64, "questions": 5, "packed": packed,
        "compared": [row("as it is", 0.0), row("packed-int3-gptq", 0.3),
                     row("packed-2-4-wanda", 0.7)],
    }  # fmt: skip
    assert "Dense int3-gptq takes 3.25 at 0.300: it is both smaller" in pruned_tables.pruning(
        result
    )
    result["compared"][1]["kl"] = 0.9
    assert "no dense model of that size or less is as near" in pruned_tables.pruning(result)


def test_rounding_is_measured_and_shown(tmp_path, monkeypatch):
    """The scripts of caches and of static ranges, on a tiny model."""
    import kv_cache
    import output
    import static_activations
    from checkpoints import mixed_lines

    model, text = tiny_llama_dir(tmp_path / "tiny", num_hidden_layers=2), tmp_path / "text"
    text.write_text("\n".join(mixed_lines(300)), encoding="utf-8")
    out = tmp_path / "out.json"
    monkeypatch.setattr(kv_cache, "PASTS", (64, 256))
    words = {
        kv_cache: ["--text", str(text), "--tokens", "200", "--window", "64", "--rounds", "1"],
        static_activations: ["--calibration", str(text), "--text", str(text), "--samples", "1",
                             "--judged", "1"],
    }  # fmt: skip
    shown = {}
    for script, options in words.items():
        name = f"{script.__name__}.py"
        monkeypatch.setattr(sys, "argv", [name, str(model), *options, "--out", str(out)])
        script.main()
        result = json.loads(out.read_text())
        assert str(tmp_path) not in out.read_text()
        shown[script] = output.show(result)
    assert "| int4, not rotated" in shown[kv_cache]
    assert "decode at 256" in shown[kv_cache]
    assert "| int8, static: `entropy`" in shown[static_activations]
