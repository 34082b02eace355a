"""Every family, in every format, against transformers: one matrix, on every engine."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import pytest
from checkpoints import tiny_dir, tiny_gguf
from engines import engine_step
from family_cases import CASES

from pronk.checkpoint.families import FAMILIES
from pronk.checkpoint.open import open_checkpoint
from pronk.graph.rope import rope_frequencies

RNG = np.random.default_rng(0)
PROMPTS = [[int(i) for i in RNG.integers(0, 320, n)] for n in (40, 36)]
ENGINES = ("graph", "passes", "native")
MATRIX = [
    pytest.param(name, form, engine, id=f"{name}-{form}-{engine}")
    for name, case in CASES.items()
    for form in case.formats
    for engine in ENGINES
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A case's checkpoint in one format, and the logits that transformers gives for it."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def directory(name, dtype):
        case, path = CASES[name], root / f"{name}-{dtype}"
        tiny_dir(path, case.family, dtype=dtype, **case.config)
        if "layer_weights" in case.config:
            share(path, case.config["layer_weights"])
        return path

    @functools.cache
    def make(name, form):
        container, dtype = form.split("-")
        if container == "hf":
            path = directory(name, {"f32": "float32", "bf16": "bfloat16"}[dtype])
            return path, expected(path, "f32")
        source = directory(name, "float32")
        return tiny_gguf(root / f"{name}-{dtype}.gguf", source, dtype), expected(source, dtype)

    return make


def share(path: Path, weights: list[int]) -> None:
    """Leave out the tensors of layers that use another's."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    owned = [f"model.layers.{i}." for i in weights]
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or n.startswith(tuple(owned))}
    assert len(kept) < len(tensors)
    save_file(kept, file, {"format": "pt"})


def expected(path: Path, dtype: str) -> list[np.ndarray]:
    """Logits of the prompts by transformers, matrices rounded to a GGUF type and back."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = json.loads((path / "config.json").read_text())
    layers = getattr(getattr(model, "model", None), "layers", None)
    for i, owner in enumerate(config.get("layer_weights", [])):
        layers[i].load_state_dict(layers[owner].state_dict())
    with torch.no_grad():
        if dtype != "f32":
            for name, weight in model.named_parameters():
                round_weight(name, weight, dtype, config["model_type"])
        return [model(torch.tensor([ids]), use_cache=False).logits[0].numpy() for ids in PROMPTS]


def round_weight(name: str, weight: Any, dtype: str, family: str) -> None:
    """Round a matrix, or several, as a GGUF file holds it; routers stay as they are."""
    import gguf
    import torch

    if weight.ndim < 2 or name.endswith(("mlp.gate.weight", "router.weight")):
        return
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    turned = family == "llama4_text" and weight.ndim == 3
    values = np.ascontiguousarray((weight.transpose(1, 2) if turned else weight).numpy())
    blocks = gguf.quants.quantize(values, kind)
    back = torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind), np.float32))
    weight.copy_(back.transpose(1, 2) if turned else back)


@pytest.mark.parametrize(("name", "form", "engine"), MATRIX)
def test_logits_are_those_of_transformers(made, name, form, engine):
    path, wanted = made(name, form)
    step = engine_step(engine, path)
    got: list[list[np.ndarray]] = [[], []]
    # One prompt in two parts, beside the other that comes token by token; then both go on so.
    for widths in [(25, 1), (9, 8), *[(1, 1)] * 27]:
        ids, positions, sequences = [], [], []
        for i, width in enumerate(widths):
            at = len(got[i])
            part = PROMPTS[i][at : at + width]
            ids += part
            positions += range(at, at + len(part))
            sequences += [i] * len(part)
        for i, row in zip(
            sequences, step(ids, positions, sequences, list(range(len(ids)))), strict=True
        ):
            got[i].append(row)
    # Activations are rounded where weights are, but not in the plain graph.
    near = 5e-3 if form.endswith("q8_0") and engine != "graph" else 2e-4
    for rows, want in zip(got, wanted, strict=True):
        assert np.abs(np.stack(rows) - want).max() < near * np.abs(want).max()


def test_every_family_is_in_the_matrix():
    assert {case.family for case in CASES.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n, c in CASES.items() for f in c.formats if f == "gguf-f32"]
)
def test_both_formats_say_the_same(made, name, form):
    with (
        open_checkpoint(made(name, form)[0]) as gguf,
        open_checkpoint(made(name, "hf-f32")[0]) as hf,
    ):
        ours, theirs = gguf.spec, hf.spec
        assert ours.layers == theirs.layers and ours.moe == theirs.moe
        for rope, other in zip(ours.ropes, theirs.ropes, strict=True):
            np.testing.assert_allclose(
                rope_frequencies(rope, ours.head_dim, 256),
                rope_frequencies(other, theirs.head_dim, 256),
                rtol=1e-6,
            )
        assert set(gguf.tensors) == set(hf.tensors)
        for tensor, info in hf.tensors.items():
            assert gguf.tensors[tensor].shape == info.shape
            whole = hf.read_float(tensor)
            np.testing.assert_allclose(gguf.read_float(tensor), whole, atol=1e-6)
            for start, stop in [(0, 1), (3, 3), (info.rows // 3, info.rows - 1)]:
                if 0 <= start <= stop <= info.rows:
                    np.testing.assert_array_equal(
                        hf.read_float(tensor, start, stop), whole[start:stop], err_msg=tensor
                    )


def test_the_page_is_made_from_the_rows():
    assert family_cases.PAGE.read_text(encoding="utf-8") == family_cases.page()
