"""Sparse activation: skipping changes no bit, and what is asked for is refused where it must be."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from engines import isas, run_whole
from test_cli import pronk, sentence
from test_graph import IDS
from test_rowwise import SPEC, random_weights

from pronk.engine.runner import Runner
from pronk.errors import RequestError
from pronk.evaluate.sparsity import activity
from pronk.graph.pack import ACTIVATIONS
from pronk.graph.passes import cpu_passes, skip_inactive
from pronk.graph.program import Limits, compile_program
from pronk.graph.sparse import apply_sparse
from pronk.spec import LayerSpec


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("mlp", ["gated", "plain"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_skipping_changes_no_bit(activations, mlp, threshold, isa):
    layer = LayerSpec(mlp=mlp, mlp_threshold=threshold)
    spec = replace(SPEC, activation="relu", layers=(layer,) * 2)
    found = []
    for skip, chunk in ((False, 32), (True, 32), (True, 1)):
        passes = [p for p in cpu_passes(activations) if skip or p is not skip_inactive]
        program = compile_program(spec, lambda _: "q8_0", Limits(256, max_tokens=32), tuple(passes))
        runner = Runner(program, 2, isa)
        random_weights(runner, "q8_0")
        runner.watch()
        found.append((run_whole(runner, IDS[:32], chunk), runner.activity()))
    for logits, counts in found[1:]:
        np.testing.assert_array_equal(logits, found[0][0])
        np.testing.assert_array_equal(counts, found[0][1])
    zeros = activity(found[0][1])
    assert min(zeros.zeros) == 1 if threshold == 1e9 else 0.2 < min(zeros.zeros) < 1


def test_what_cannot_be_is_refused(tmp_path):
    file = tmp_path / "t.json"
    for text, said in (
        ("kl=0", "kl of"), ("keep=2", "keep of"), ("threshold=-1", "threshold of"),
        ("kl=nan", "kl of"), ("often", "takes"), ("kl=0.01", "calibrated"),
        (str(tmp_path / "none.json"), "cannot be read"), (str(file), "thresholds"),
    ):  # fmt: skip
        file.write_text(json.dumps({"thresholds": []}))
        with pytest.raises(RequestError, match=said):
            apply_sparse(SPEC, text)
    with pytest.raises(RequestError, match="3 thresholds were given for 2"):
        apply_sparse(SPEC, [1, 2, 3])
    with pytest.raises(RequestError, match="experts in every layer"):
        apply_sparse(replace(SPEC, layers=(LayerSpec(mlp="moe"),) * 2), "threshold=1")
    file.write_text(json.dumps({"thresholds": [0.5, 0.25]}))
    assert [x.mlp_threshold for x in apply_sparse(SPEC, str(file)).layers] == [0.5, 0.25]


def test_thresholds_are_calibrated_once(tmp_path, home):
    model = tiny_llama_dir(tmp_path / "hf", num_hidden_layers=2)
    asked = ("eval", model, "--max-tokens", 200, "--reference", model, "--json", "--sparse-mlp")
    first = pronk(*asked, "keep=0.5")
    found = json.loads(first.stdout)
    assert found["sparse"]["skipped"] == pytest.approx(0.5, abs=0.1)
    assert 0 < found["kl"] < math.inf
    (kept,) = (home / "sparse").iterdir()
    assert str(kept) in first.stderr
    thresholds = json.loads(kept.read_text())["thresholds"]
    assert len(thresholds) == 2 and min(thresholds) > 0
    # What is kept is used, and can be named.
    for how in ("keep=0.5", str(kept)):
        again = pronk(*asked, how)
        assert json.loads(again.stdout) == found and "thresholds are in" not in again.stderr
    kept.write_text(json.dumps({"thresholds": [0.0, 1e9]}))
    layers = json.loads(pronk(*asked, "keep=0.5").stdout)["sparse"]["layers"]
    assert layers[0]["skipped"] < 0.1 and layers[1]["skipped"] == 1
    budget = json.loads(pronk(*asked, "kl=0.000001").stdout)
    assert budget["sparse"]["skipped"] < found["sparse"]["skipped"]
    # What nobody can use is measured again.
    for damaged in ('{"thresholds": ["x", "y"]}', '{"thresholds": 1}', "[]", "{"):
        kept.write_text(damaged)
        assert json.loads(pronk(*asked, "keep=0.5").stdout) == found


def test_thresholds_of_a_model_whose_layers_are_chosen_first(tmp_path, home):
    model = tiny_llama_dir(tmp_path / "hf", num_hidden_layers=2, max_position_embeddings=128)
    asked = ("eval", model, "--max-tokens", 100, "--window", 64, "--json")
    policy = ("--attention", "window=32,global=auto:1", "--sparse-mlp", "keep=0.5")
    found = json.loads(pronk(*asked, *policy).stdout)["sparse"]
    assert found["skipped"] == pytest.approx(0.5, abs=0.1)


def test_bench_shows_both_speeds(tmp_path, home):
    model = tiny_llama_dir(tmp_path / "hf")
    asked = ("bench", model, "--sparse-mlp", "threshold=1000", "--runs", 1, "--tokens", 4)
    sparse = json.loads(pronk(*asked, "--prompt-tokens", 8, "--json").stdout)["sparse"]
    assert sparse["skipped"] == sparse["skipped_groups"] == 1
    assert all(
        sparse[what][key] > 0 for what in ("prefill", "decode") for key in ("with", "without")
    )
    assert "100.0% of the activations zero" in pronk(*asked, "--prompt-tokens", 8).stdout
    assert "keep of --sparse-mlp" in sentence("run", model, "x", "--sparse-mlp", "keep=2")
