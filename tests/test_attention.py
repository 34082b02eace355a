"""Attention and rope as the user wants them: policies parsed, and specs they make."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pronk.errors import RequestError
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


@pytest.mark.parametrize("text", ["", "yarn", "yarn:", "yarn:x", "yarn:1", "yarn:nan", "yarn:inf",
                                  "llama3:2", "linear:-2", "dynamic:1e9"])  # fmt: skip
def test_what_is_no_scaling_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="rope scaling must be yarn, linear or dynamic"):
        apply_rope_scaling(SPEC, text)


def test_a_rope_is_scaled_once() -> None:
    with pytest.raises(RequestError, match="scaled already \\(yarn\\)"):
        apply_rope_scaling(apply_rope_scaling(SPEC, "yarn:4"), "linear:2")
    with pytest.raises(RequestError, match="no rope"):
        apply_rope_scaling(dataclasses.replace(SPEC, layers=(LayerSpec(rope=None),)), "yarn:4")
