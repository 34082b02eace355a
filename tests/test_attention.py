"""Attention and rope as the user wants them: policies parsed, and specs they make."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_llama_dir
from test_cli import pronk, sentence

from pronk import load
from pronk.errors import RequestError
from pronk.evaluate.attention import choose_global, window_divergence
from pronk.graph.attention import (
    AttentionPolicy,
    apply_policy,
    apply_rope_scaling,
    parse_policy,
)
from pronk.graph.rope import rope_frequencies
from pronk.spec import LayerSpec, ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama", name="", vocab_size=320, hidden_size=64, intermediate_size=160, num_heads=4,
    num_kv_heads=2, head_dim=16, norm_eps=1e-5, context_length=512, tie_embeddings=True,
    layers=(LayerSpec(),) * 9)  # fmt: skip


def test_policies_are_read() -> None:
    assert parse_policy("window=512,global-every=4") == AttentionPolicy(512, every=4)
    assert parse_policy(" window = 8 , sinks=4") == AttentionPolicy(8, 4)
    assert parse_policy("window=512,global=8:0:4:0") == AttentionPolicy(512, layers=(0, 4, 8))
    assert parse_policy("sinks=0,global=auto:8,window=1") == AttentionPolicy(1, auto=8)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "has ''"),
        ("512", "has '512'"),
        ("window=512,every=4", "has 'every=4'"),
        ("global-every=4", "has no window"),
        ("window=512,window=4", "says window twice"),
        ("window=512,global=0,global-every=4", "both"),
        ("window=0", "window of the attention policy must be a whole number from 1"),
        ("window=-1", "not '-1'"),
        ("window=1e3", "not '1e3'"),
        ("window=٣", "not '٣'"),
        ("window=" + "9" * 5000, "not '9999"),
        ("window=512,sinks=x", "sinks of"),
        ("window=512,global-every=0", "global-every of"),
        ("window=512,global=", "global of"),
        ("window=512,global=1:x", "not 'x'"),
        ("window=512,global=auto", "global=auto of"),
        ("window=512,global=auto:0", "from 1"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, match: str) -> None:
    with pytest.raises(RequestError, match=match) as refused:
        parse_policy(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


def test_every_fourth_layer_stays_global() -> None:
    spec = apply_policy(SPEC, parse_policy("window=64,global-every=4,sinks=4"))
    assert [i for i, layer in enumerate(spec.layers) if layer.attention == "global"] == [3, 7]
    assert spec.layers[0] == LayerSpec("window", 64, 4)
    assert dataclasses.replace(spec, layers=SPEC.layers) == SPEC  # nothing else changes


def test_listed_layers_stay_and_narrow_ones_keep_their_window() -> None:
    narrow, wide = LayerSpec("window", 32, rope=None), LayerSpec("window", 128, qk_norm="head")
    chunked = LayerSpec("chunked", 4096)
    layers = (LayerSpec(), LayerSpec(mlp="plain"), narrow, wide, wide, chunked)
    spec = apply_policy(
        dataclasses.replace(SPEC, layers=layers), parse_policy("window=64,global=0:4,sinks=2")
    )
    assert spec.layers == (
        LayerSpec(),
        LayerSpec("window", 64, 2, mlp="plain"),
        narrow,
        LayerSpec("window", 64, 2, qk_norm="head"),
        wide,
        chunked,
    )


def test_a_policy_must_fit_the_model() -> None:
    with pytest.raises(RequestError, match="names layer 9, but the model's layers are 0 to 8"):
        apply_policy(SPEC, parse_policy("window=64,global=1:9"))
    with pytest.raises(RequestError, match="not been chosen"):
        apply_policy(SPEC, parse_policy("window=64,global=auto:2"))


def test_rope_reaches_further() -> None:
    spec = apply_rope_scaling(SPEC, "yarn:4")
    assert spec.context_length == 2048
    (rope,) = spec.ropes
    assert (rope.kind, rope.factor, rope.original_context) == ("yarn", 4, 512)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    kept, slowed = rope_frequencies(SPEC.ropes[0], 16), rope_frequencies(rope, 16)
    assert slowed[0] == kept[0]
    assert slowed[-1] == pytest.approx(kept[-1] / 4)
    assert apply_rope_scaling(SPEC, "linear:2").ropes[0] == RopeSpec(
        kind="linear", factor=2, original_context=512
    )
    assert apply_rope_scaling(SPEC, "dynamic:1.5").context_length == 768


def test_only_what_reaches_far_is_scaled() -> None:
    local = LayerSpec("window", 64, rope=1)
    ropes = (RopeSpec(1e6), RopeSpec())
    spec = apply_rope_scaling(
        dataclasses.replace(SPEC, layers=(LayerSpec(), local), ropes=ropes), "linear:2"
    )
    assert [rope.kind for rope in spec.ropes] == ["linear", "default"]
    spec = apply_rope_scaling(dataclasses.replace(SPEC, layers=(local,), ropes=ropes), "linear:2")
    assert [rope.kind for rope in spec.ropes] == ["default", "linear"]


def test_a_model_may_go_past_its_context_as_it_is() -> None:
    spec = apply_rope_scaling(SPEC, "none:4")
    assert spec == dataclasses.replace(SPEC, context_length=4 * SPEC.context_length)
    again = apply_rope_scaling(apply_rope_scaling(SPEC, "yarn:2"), "none:2")
    assert again.ropes[0].kind == "yarn"  # what is scaled already is left alone


@pytest.mark.parametrize("text", ["", "yarn", "yarn:", "yarn:x", "yarn:1", "yarn:nan", "yarn:inf",
                                  "llama3:2", "linear:-2", "dynamic:1e9"])  # fmt: skip
def test_what_is_no_scaling_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="rope scaling must be yarn, linear, dynamic or none"):
        apply_rope_scaling(SPEC, text)


def test_a_rope_is_scaled_once() -> None:
    with pytest.raises(RequestError, match="scaled already \\(yarn\\)"):
        apply_rope_scaling(apply_rope_scaling(SPEC, "yarn:4"), "linear:2")
    with pytest.raises(RequestError, match="no rope"):
        apply_rope_scaling(dataclasses.replace(SPEC, layers=(LayerSpec(rope=None),)), "yarn:4")


class Tampered:
    """Gives predictions that are off by an amount."""

    def __init__(self, off: float) -> None:
        self.off = off

    def logits(self, ids: Sequence[int], /, *, last: int) -> np.ndarray:
        rows = np.zeros((len(ids), 8), np.float32)
        rows[:, 3] = self.off
        return rows[-last:]


def test_the_layers_that_matter_most_are_chosen() -> None:
    offs = {0: 0.5, 2: 2.0, 3: 0.0, 7: 1.0}
    told: list[tuple[int, int]] = []
    found = window_divergence(
        Tampered(0),
        lambda layer: contextlib.nullcontext(Tampered(offs[layer])),
        offs,
        range(50),
        rows=20,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # KL of the uniform distribution over 8 from one whose fourth logit is raised.
    expected = math.log((7 + math.exp(2.0)) / 8) - 2.0 / 8
    assert found[2] == pytest.approx(expected, rel=1e-6)
    assert found[3] == 0
    assert choose_global(found, 2) == (2, 7)
    assert choose_global(found, 3) == (0, 2, 7)
    with pytest.raises(RequestError, match="5 layers global, but only 4"):
        choose_global(found, 5)


def test_layers_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRONK_HOME", str(tmp_path / "home"))
    model = tiny_llama_dir(tmp_path / "hf", num_hidden_layers=3)
    policy = ("--attention", "window=64,sinks=2,global=auto:1", "--context", 512)
    first = pronk("inspect", model, *policy, "--json")
    (chosen,) = [p["layers"] for p in json.loads(first.stdout)["kv"] if p["window"] == 0]
    assert f"layers {chosen[0]} stay global" in first.stderr
    (kept,) = (tmp_path / "home" / "attention").iterdir()
    divergence = {int(layer): value for layer, value in json.loads(kept.read_text()).items()}
    assert sorted(divergence) == [0, 1, 2]
    assert min(divergence.values()) > 0
    assert chosen == [max(divergence, key=lambda layer: divergence[layer])]
    # What is remembered is used: another choice follows from other figures.
    kept.write_text(json.dumps(dict.fromkeys(range(3), 0.0) | {(chosen[0] + 1) % 3: 1.0}))
    again = json.loads(pronk("inspect", model, *policy, "--json").stdout)
    assert [(chosen[0] + 1) % 3] in [p["layers"] for p in again["kv"]]
    kept.write_text("{damaged")
    repaired = json.loads(pronk("inspect", model, *policy, "--json").stdout)
    assert chosen in [p["layers"] for p in repaired["kv"]]
    assert "only 3 could" in sentence("inspect", model, "--attention", "window=64,global=auto:4")
    assert "no less than" in sentence("inspect", model, "--attention", "window=512,global=auto:1")


def test_the_last_logits_alone(tmp_path: Path) -> None:
    with load(tiny_llama_dir(tmp_path / "hf"), context=512) as model:
        ids = list(range(3, 203))
        whole = model.logits(ids)
        for last in (1, 70, 130, 200):
            np.testing.assert_array_equal(model.logits(ids, last=last), whole[-last:])
        for last in (0, -1, 201):
            with pytest.raises(RequestError, match="last must be in"):
                model.logits(ids, last=last)
