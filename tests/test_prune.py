"""Pruning and sparsity: each against what it must beat."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from checkpoints import tiny_dir
from small_models import WINDOWS, logits, off, quiet, twin

from pronk.compress import shape as shapes
from pronk.compress import smaller, sparse, structured
from pronk.compress.layerwise import Stream
from pronk.errors import RequestError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_dir(tmp_path_factory.mktemp("smaller") / "tiny", "llama", num_hidden_layers=4)


def test_layers_that_change_little_go(tmp_path):
    model, spec = twin(tiny_dir(tmp_path / "m", "llama", num_hidden_layers=6))
    idle = (1, 4)
    with torch.no_grad():
        for i in idle:  # they add next to nothing, and their other weights are the largest
            layer = model.model.layers[i]
            for name, factor in (("self_attn.o_proj", 1e-3), ("mlp.down_proj", 1e-3),
                                 ("self_attn.v_proj", 10), ("mlp.up_proj", 10)):  # fmt: skip
                layer.get_submodule(name).weight *= factor
    expected = logits(model)
    shape = dataclasses.replace(shapes.shape_of(spec), layers=4)
    kept = structured.prune(model, WINDOWS, shape, quiet)
    assert kept["layers"] == [0, 2, 3, 5]
    assert off(logits(smaller._settled(model, shapes.resized(spec, shape))), expected) < 0.05


def test_heads_that_others_stand_in_for_go(tmp_path):
    path = tiny_dir(
        tmp_path / "m", "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3
    )
    model, spec = twin(path)
    with torch.no_grad():
        for layer in model.model.layers:
            for part, size in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
                weight = getattr(layer.self_attn, part).weight
                weight[2 * size :] = weight[:size]  # the third group is the first
            layer.self_attn.o_proj.weight[:, 64:] *= 3  # and no small one
            layer.self_attn.o_proj.weight[:, :32] *= 3
    expected = logits(model)
    shape = dataclasses.replace(shapes.shape_of(spec), kv_heads=2)
    kept = structured.prune(model, WINDOWS, shape, quiet)
    assert all(groups in ([0, 1], [1, 2]) for groups in kept["kv_heads"])
    small = shapes.resized(spec, shape)
    assert (small.num_heads, small.num_kv_heads) == (4, 2)
    assert off(logits(smaller._settled(model, small)), expected) < 0.05


def test_neurons_that_others_stand_in_for_go(tmp_path):
    model, spec = twin(tiny_dir(tmp_path / "m", "qwen2", intermediate_size=128))
    with torch.no_grad():
        for layer in model.model.layers:
            for part in ("gate_proj", "up_proj"):
                weight = getattr(layer.mlp, part).weight
                weight[64:96] = weight[:32]
            # The twins are read by the largest weights; those of the last are too small to matter.
            layer.mlp.down_proj.weight[:, :32] *= 4
            layer.mlp.down_proj.weight[:, 64:96] *= 4
            layer.mlp.down_proj.weight[:, 96:] *= 1e-3
    expected, large = logits(model), copy.deepcopy(model)
    shape = dataclasses.replace(shapes.shape_of(spec), mlp=64)
    structured.prune(model, WINDOWS, shape, quiet)
    error = off(logits(smaller._settled(model, shapes.resized(spec, shape))), expected)
    with torch.no_grad():  # those of the largest weights are both twins
        for layer in large.model.layers:
            norms = layer.mlp.down_proj.weight.norm(dim=0)
            layer.mlp.down_proj.weight[:, norms.argsort()[:64]] = 0
    assert error < 0.1 < 0.5 * off(logits(large), expected)


def test_fewer_columns_are_refitted_to_do_what_all_did():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 12, generator=generator)
    x = base @ torch.randn(12, 32, generator=generator)
    weight = torch.randn(8, 32, generator=generator)
    gram = x.T @ x
    kept = structured.keep_columns(weight, gram, 1, 16)
    y = x @ weight.T
    assert len(kept) == 16
    assert off(x[:, kept] @ weight[:, kept].T, y) > 0.3
    assert off(x[:, kept] @ structured.refit(weight, gram, kept).T, y) < 0.03
    # Those chosen do better than any chosen by chance, refitted as well.
    chance = [torch.randperm(32, generator=generator)[:8].sort().values for _ in range(20)]
    errors = [off(x[:, c] @ structured.refit(weight, gram, c).T, y) for c in chance]
    best = structured.keep_columns(weight, gram, 1, 8)
    assert off(x[:, best] @ structured.refit(weight, gram, best).T, y) < min(errors)


def test_channels_that_carry_little_go(tmp_path):
    model, spec = twin(tiny_dir(tmp_path / "m", "llama", tie_word_embeddings=False))
    idle = torch.arange(0, 64, 2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, idle] *= 1e-3
        for layer in model.model.layers:
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(part).weight[idle] *= 1e-3
            for part in ("self_attn.q_proj", "mlp.gate_proj"):
                layer.get_submodule(part).weight[:, idle] *= 5  # large weights that read nothing
    expected = logits(model)
    shape = dataclasses.replace(shapes.shape_of(spec), hidden=32)
    kept = structured.prune(model, WINDOWS, shape, quiet)
    assert kept["channels"] == list(range(1, 64, 2))
    assert off(logits(smaller._settled(model, shapes.resized(spec, shape))), expected) < 0.03


PATTERNS = ["unstructured", "2:4", "1:4"]


@pytest.mark.parametrize("text", PATTERNS)
def test_each_way_to_zeros_is_better_than_the_one_before(text):
    pattern = sparse.parse_pattern(text, None)
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1, 64)[:, None]
    scales = torch.logspace(-0.6, 0.6, 64)[torch.randperm(64, generator=generator)]
    x = torch.randn(600, 64, generator=generator) @ mix * scales
    weight, gram = torch.randn(48, 64, generator=generator), x.T @ x
    errors = []
    for method in sparse.METHODS:
        made = sparse.sparsify_matrix(weight, gram, method, pattern)
        assert float((made == 0).float().mean()) == pytest.approx(pattern.sparsity, abs=1e-3)
        if pattern.of:
            zeros = (made.reshape(-1, pattern.of) == 0).sum(1)
            assert (zeros == pattern.zeros).all()
        errors.append(off(x @ made.T, x @ weight.T))
    magnitude, wanda, sparsegpt = errors
    assert sparsegpt < 0.9 * wanda
    assert wanda < 0.9 * magnitude


def test_each_way_to_zeros_is_better_than_the_one_before_in_a_model(tiny):
    model, _ = twin(tiny)
    with torch.no_grad():  # norms of trained models are far from even, as here
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight *= torch.logspace(-1, 0.6, 64)[torch.randperm(64)]
    expected, errors = logits(model), []
    for method in sparse.METHODS:
        made = copy.deepcopy(model)
        found = sparse.sparsify(made, WINDOWS, method, sparse.parse_pattern("2:4", None), quiet)
        assert found["sparsity"] == pytest.approx(0.5)
        errors.append((found["error"], off(logits(made), expected)))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2][1] < errors[1][1] < errors[0][1]


def test_what_sparse_int4_would_take_is_arithmetic():
    bits = {text: sparse.stored_bits(sparse.parse_pattern(text, None)) for text in PATTERNS}
    # Two of four values of 4 bits with 2 bits of place; or half the values and a bit for each.
    assert bits == {"2:4": 2 + 1 + 0.5, "1:4": 1 + 0.5 + 0.5, "unstructured": 2 + 1 + 0.5}


def test_sizes_to_keep():
    assert shapes.parse_keep("24", 30) == 24
    assert shapes.parse_keep("75%", 1536, 32) == 1152
    assert shapes.parse_keep("-25%", 1536, 32) == 1152
    assert shapes.parse_keep("1%", 64, 32) == 32
    assert shapes.parse_keep("100%", 100, 32) == 100
    for text in ("0", "-3", "31", "0%", "-100%", "101%", "1.5", "x", ""):
        with pytest.raises(RequestError):
            shapes.parse_keep(text, 30)


@pytest.mark.parametrize("share", [0.9, 0.65, 0.4, 0.2])
def test_a_shape_of_a_target_is_near_it(share):
    from pronk.spec import LayerSpec, ModelSpec

    spec = ModelSpec(
        "llama", "smol", 49152, 576, 1536, 9, 3, 64, 1e-5, 2048, True, (LayerSpec(),) * 30
    )
    whole = shapes.count_parameters(spec)
    assert whole == 134_515_008
    small = shapes.resized(spec, shapes.shape_for(spec, int(share * whole)))
    assert share - 0.03 < shapes.count_parameters(small) / whole <= share
    assert small.intermediate_size % 32 == 0 and small.hidden_size % 32 == 0
    with pytest.raises(RequestError, match="no shape of the model has 1,000 parameters"):
        shapes.shape_for(spec, 1000)


def test_streams_feed_layers_what_those_before_now_give(tiny):
    model, _ = twin(tiny)
    stream = Stream(model, WINDOWS)
    first, second = model.model.layers[:2]
    with torch.no_grad():
        first.mlp.down_proj.weight.zero_()
    stream.advance(first)
    seen = []
    second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    assert all(torch.equal(a, b) for a, b in zip(stream.states, seen, strict=True))
