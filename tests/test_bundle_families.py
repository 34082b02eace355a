"""Bundles of every family that has them: `transformers` reads them and computes what Pronk does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_dir, tiny_gguf
from engines import engine_step
from family_cases import CASES

from pronk.checkpoint.bundle import write_bundle
from pronk.checkpoint.families import family_of
from pronk.checkpoint.kinds import KINDS
from pronk.checkpoint.open import open_checkpoint
from pronk.compress.compress import compress
from pronk.compress.fit import fit
from pronk.compress.quantize import RoundToNearest
from pronk.compress.recipes import RECIPES
from pronk.device.plan import candidates
from pronk.errors import RequestError
from pronk.graph.attention import adapted

FORMATS = dict(zip(KINDS, ("q8_0", "q4_1", "q4_0", "q8_0"), strict=True))
EXPERTS = dict(zip(KINDS, ("q8_0", "q8_0", "q4_0", "q4_0"), strict=True))
"""What experts may have: one format, without minima."""
IDS = [int(i) for i in np.random.default_rng(1).integers(0, 320, 60)]
BUNDLED = [
    name
    for name, case in CASES.items()
    if family_of(case.family).bundles and "layer_weights" not in case.config
]
ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}


def bundle(source: Path, target: Path) -> Path:
    with open_checkpoint(source) as ckpt:
        formats = FORMATS if ckpt.spec.moe is None else EXPERTS
        return write_bundle(ckpt, formats, target, quantize=RoundToNearest(), meta={})


def check(source: Path, target: Path) -> None:
    """The bundle says what the source says, and both programs compute the same from it."""
    import torch
    from transformers import AutoModelForCausalLM

    with open_checkpoint(source) as ours, open_checkpoint(target) as theirs:
        assert replace(theirs.spec, name=ours.spec.name) == ours.spec
    model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    with torch.no_grad():
        want = model(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    got = engine_step("graph", target)(IDS, list(range(60)), [0] * 60, list(range(60)))
    # transformers' embedding is rounded to float16, which may decide between two experts.
    far = np.abs(got - want).max(axis=1) > 2e-3 * np.abs(want).max()
    assert far.sum() <= (0 if ours.spec.moe is None else 1)


@pytest.mark.parametrize("name", BUNDLED)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = tiny_dir(tmp_path / "hf", case.family, **case.config)
    check(source, bundle(source, tmp_path / "out"))


@pytest.mark.parametrize("rope", ROPES)
def test_ropes(rope: str, tmp_path: Path) -> None:
    source = tiny_dir(tmp_path / "hf", "llama", rope_parameters=ROPES[rope])
    check(source, bundle(source, tmp_path / "out"))


@pytest.mark.parametrize("recipe", ["int8", "int4-rtn", "bf16"])
@pytest.mark.parametrize("name", [n for n in BUNDLED if family_of(CASES[n].family).experts])
def test_experts_are_compressed(name: str, recipe: str, tmp_path: Path) -> None:
    source = tiny_dir(tmp_path / "hf", CASES[name].family, **CASES[name].config)
    report = compress(source, RECIPES[recipe], tmp_path / "out")
    routed = [error for tensor, error in report.errors.items() if ".experts." in tensor]
    assert routed and all(0 < error["weights"] < 0.2 for error in routed)
    check(source, tmp_path / "out")


def test_experts_of_a_gguf_file(tmp_path: Path) -> None:
    source = tiny_dir(tmp_path / "hf", "mixtral", **CASES["mixtral"].config)
    file = tiny_gguf(tmp_path / "m.gguf", source)
    check(file, bundle(file, tmp_path / "out"))


def test_experts_of_several_formats_are_refused(tmp_path: Path) -> None:
    source = tiny_dir(tmp_path / "hf", "mixtral", **CASES["mixtral"].config)
    with open_checkpoint(source) as ckpt:
        for formats in (FORMATS, {**EXPERTS, "gate_up": "q4_1", "down": "q4_1"}):
            with pytest.raises(RequestError, match="experts of one format alone"):
                write_bundle(ckpt, formats, tmp_path / "out", quantize=RoundToNearest(), meta={})
        found = candidates(ckpt.spec, 128, 0)
    assert {c.variant.formats["down"] for c in found} == {"q8_0", "q4_0"}
    assert all(c.variant.formats["gate_up"] == c.variant.formats["down"] for c in found)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mpt", "llama4_text", "llama-shared"])
def test_others_are_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config = {key: value for key, value in case.config.items() if key != "layer_weights"}
    source = tiny_dir(tmp_path / "hf", case.family, **config)
    with open_checkpoint(source) as ckpt:
        spec = ckpt.spec
        if "layer_weights" in case.config:
            layers = (spec.layers[0], *(replace(spec.layers[0], weights=0),) * 3)
            ckpt.spec = replace(spec, layers=layers)
        with pytest.raises(RequestError, match="cannot be written as a bundle"):
            write_bundle(ckpt, FORMATS, tmp_path / "out", quantize=RoundToNearest(), meta={})
    assert not (tmp_path / "out").exists()


def test_what_a_config_cannot_say_is_refused(tmp_path: Path) -> None:
    source = tiny_dir(tmp_path / "hf", "llama", num_hidden_layers=3)
    with open_checkpoint(source) as ckpt:
        ckpt.spec = adapted(ckpt.spec, "window=16,global-every=2,sinks=4", None)
        with pytest.raises(RequestError, match="windows or ropes"):
            write_bundle(ckpt, FORMATS, tmp_path / "out", quantize=RoundToNearest(), meta={})


def test_fitting_refuses_before_it_writes(tmp_path: Path) -> None:
    source = tiny_dir(tmp_path / "hf", "mpt", **CASES["mpt"].config)
    with pytest.raises(RequestError, match="a mpt model cannot be written as a bundle: Pronk fits"):
        fit(source, 10**9, 128, tmp_path / "out")
    assert not (tmp_path / "out").exists()
