"""Compressing: what each recipe gains, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from pronk.checkpoint.blocks import dequantize
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.storage import parse_storage
from pronk.cli import main
from pronk.compress.bits import Goal, Sensitivity, choose
from pronk.compress.calibrate import read_calibration
from pronk.compress.compress import compress
from pronk.compress.forward import Decoder, embedded
from pronk.compress.grid import fit_grid, to_blocks
from pronk.compress.layers import read_floats
from pronk.compress.recipes import RECIPES, Recipe, recipe_of
from pronk.errors import BudgetError, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 3


def uneven(path: Path, **config: Any) -> Path:
    """A random model, some of whose inputs are large, as those of trained ones are."""
    checkpoints.tiny_llama_dir(path, **{"intermediate_size": 128, **config})
    tensors = checkpoints.hf_tensors(path)
    from safetensors.numpy import save_file

    large = np.random.default_rng(0).lognormal(0, 1, 64).astype(np.float32)
    for name, values in tensors.items():
        if "layernorm" in name:
            values *= large
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose embedding is not rounded with the head, which would hide what layers lose."""
    return uneven(tmp_path_factory.mktemp("untied") / "hf", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def gguf(tiny: Path) -> Path:
    return checkpoints.tiny_gguf(tiny.parent / "tiny.gguf", tiny)


def layer_error(source: Path, made: Path) -> float:
    """Relative mean squared error of what all layers give, on calibration text."""
    with open_checkpoint(source) as ckpt, open_checkpoint(made) as view:
        windows = read_calibration(ckpt, None, SAMPLES, 0).windows
        decoder = Decoder(ckpt.spec)
        ends = []
        for of in (ckpt, view):
            x = embedded(ckpt, decoder, windows)
            for layer in range(ckpt.spec.num_layers):
                x = decoder.run(layer, x, read_floats(of, decoder.names(layer)))
            ends.append(x)
        return float((ends[1] - ends[0]).square().sum() / ends[0].square().sum())


def weight_error(source: Path, made: Path) -> float:
    with open_checkpoint(source) as ckpt, open_checkpoint(made) as view:
        names = [name for name in ckpt.tensors if "_proj" in name]
        pairs = [(ckpt.read_float(name), view.read_float(name)) for name in names]
        lost = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
        return lost / sum(float((a**2).sum()) for a, _ in pairs)


def nearest(recipe: Recipe) -> Recipe:
    """The recipe with round-to-nearest in the place of its method."""
    values = {name: getattr(recipe, name) for name in recipe.__slots__}
    return Recipe(**{**values, "method": "rtn", "fold": ""})


def made(source: Path, recipe: Recipe, out: Path, **options: Any) -> Path:
    compress(source, recipe, out, samples=SAMPLES, **options)
    return out


K_QUANTS = ["k4-imatrix", "k4-gptq"]
SEARCHED = [n for n, recipe in RECIPES.items() if recipe.method == "mse" and not recipe.fold]
CALIBRATED = [
    name
    for name, recipe in RECIPES.items()
    if recipe.calibrated and recipe.formats and name not in K_QUANTS and not recipe.static
]


def test_every_recipe_is_told_from_the_nearest() -> None:
    """By one of the tests below; those of no other method have nothing to be told from."""
    told = {*CALIBRATED, *SEARCHED, *K_QUANTS, "auto"}
    assert told == {name for name, recipe in RECIPES.items() if recipe.method != "rtn"}


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_recipes_keep_what_layers_give(name: str, untied: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    ours = layer_error(untied, made(untied, recipe, tmp_path / "ours"))
    plain = layer_error(untied, made(untied, nearest(recipe), tmp_path / "plain"))
    assert ours < 0.85 * plain


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.fold])
def test_folding_adds_to_the_method(name: str, untied: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    ours = layer_error(untied, made(untied, recipe, tmp_path / "ours"))
    plain = layer_error(untied, made(untied, replace(recipe, fold=""), tmp_path / "plain"))
    assert ours < 0.97 * plain


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_scales_lower_the_squared_error(name: str, tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    ours = weight_error(tiny, made(tiny, recipe, tmp_path / "ours"))
    plain = weight_error(tiny, made(tiny, nearest(recipe), tmp_path / "plain"))
    assert ours < 0.99 * plain


def test_automatic_bits_beat_what_is_uniform_at_their_size(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of("auto")
    report = compress(tiny, recipe, tmp_path / "auto", samples=SAMPLES, goal=Goal(bits=4.25))
    assert report.weight_bytes / report.weights <= 4.25 / 8
    assert len(set(report.formats.values())) > 1
    assert report.prediction is not None
    assert 0.2 < report.prediction["measured_kl"] / report.prediction["kl"] < 2
    stored = json.loads((tmp_path / "auto" / "pronk.json").read_text())
    assert stored["prediction"] == report.prediction
    uniform = layer_error(tiny, made(tiny, recipe_of("int4-gptq"), tmp_path / "all", group="g64"))
    assert layer_error(tiny, tmp_path / "auto") < uniform
    larger = layer_error(tiny, made(tiny, recipe_of("int4-rtn"), tmp_path / "nearest"))
    assert layer_error(tiny, tmp_path / "auto") < 0.8 * larger
    costs = stored["sensitivity"]
    assert set(costs) == set(report.formats)
    assert all(cost["int8-g32"] < cost["int4-g32"] < cost["int3-g32"] for cost in costs.values())
    small = compress(tiny, recipe, tmp_path / "kl", samples=SAMPLES, goal=Goal(kl=0.05))
    assert small.prediction is not None
    assert small.prediction["kl"] <= 0.05
    assert small.weight_bytes < report.weights
    with pytest.raises(BudgetError, match="smallest take"):
        compress(tiny, recipe, tmp_path / "no", samples=SAMPLES, goal=Goal(bits=2))
    with pytest.raises(RequestError, match="--bits"):
        compress(tiny, recipe, tmp_path / "no")
    with pytest.raises(RequestError, match="one of"):
        Goal()
    assert not (tmp_path / "no").exists()


def test_what_a_source_holds_already_costs_nothing(tiny: Path, tmp_path: Path) -> None:
    source = checkpoints.tiny_gguf(tmp_path / "q4_1.gguf", tiny, "q4_1")
    report = compress(source, recipe_of("auto"), tmp_path / "out", samples=1, goal=Goal(bits=6))
    layers = {name for name in report.formats if "layers" in name}
    assert all(report.sensitivity[name]["int4-g32-min"] == 0 for name in layers)
    assert all(report.sensitivity[name]["int4-g32"] > 0 for name in layers)
    kept = [name for name in layers if report.formats[name] == "int4-g32-min"]
    assert kept and all(report.errors[name]["weights"] == 0 for name in kept)


def test_bits_count_what_nothing_is_chosen_for() -> None:
    costs = {"a": Sensitivity({"small": 1.0, "large": 0.0}, {"small": 10, "large": 20})}
    assert choose(costs, 10, Goal(bits=16)) == ({"a": "large"}, 0.0)
    assert choose(costs, 10, Goal(bits=16), rest=1) == ({"a": "small"}, 1.0)
    assert choose(costs, 10, Goal(size=20), rest=1) == ({"a": "small"}, 1.0)
    with pytest.raises(BudgetError, match="smallest take 13 B"):
        choose(costs, 10, Goal(size=12), rest=3)


HF = ["int4-gptq", "int4-min-rtn", "int4-awq", "int3-gptq", "int2-rtn", "int8-channel", "fp8"]


@pytest.mark.parametrize("name", [*HF, "seed", "bf16"])
def test_transformers_computes_the_same(name: str, tiny: Path, tmp_path: Path) -> None:
    import transformers

    group = "g64" if RECIPES[name].group and name != "seed" else None
    target = made(tiny, recipe_of(name), tmp_path / "out", group=group)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=False)
    ours = transformers.LlamaForCausalLM(config).float().eval()
    with open_checkpoint(target) as bundle:
        weights = {n: torch.from_numpy(bundle.read_float(n)) for n in bundle.tensors}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"].half().float()
    ours.load_state_dict({k: v.reshape(weights[k].shape[-1:] if "norm" in k else v.shape)
                          for k, v in weights.items()})  # fmt: skip
    ids = torch.arange(300)[None]
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_a_bundle_says_how_it_was_made(tiny: Path, tmp_path: Path) -> None:
    report = compress(tiny, recipe_of("int4-gptq"), tmp_path / "out", samples=SAMPLES, seed=5)
    manifest = json.loads((tmp_path / "out" / "pronk.json").read_text())
    assert manifest["recipe"]["name"] == "int4-gptq"
    assert manifest["seed"] == 5
    assert manifest["calibration"]["windows"] == SAMPLES
    assert len(manifest["source_sha256"][0]) == len(manifest["calibration"]["sha256"]) == 64
    assert set(manifest["versions"]) == {"pronk", "torch"}
    assert set(manifest["errors"]) == set(report.formats)
    assert all(0 < e["outputs"] < 0.1 for e in manifest["errors"].values())
    assert report.weight_bytes == report.weights * 4.5 / 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_seed_recipe_goes_by_kind(tiny: Path, tmp_path: Path) -> None:
    target = made(tiny, recipe_of("seed"), tmp_path / "out")
    with open_checkpoint(target) as bundle:
        for name, info in bundle.tensors.items():
            want = "bf16" if "o_proj" in name else "f32" if "norm" in name else "q8_0"
            assert info.dtype == want, name


@pytest.mark.parametrize("name", ["bf16", "f16", "fp8"])
def test_floats_are_the_nearest(name: str, tiny: Path, tmp_path: Path) -> None:
    target = made(tiny, recipe_of(name), tmp_path / "out")
    types = {"bf16": torch.bfloat16, "f16": torch.float16, "fp8": torch.float8_e4m3fn}
    with open_checkpoint(tiny) as ckpt, open_checkpoint(target) as bundle:
        tensor = "model.layers.1.mlp.up_proj.weight"
        weight = torch.from_numpy(ckpt.read_float(tensor))
        scale = torch.ones(len(weight), 1)
        if name == "fp8":
            scale = 2 ** (weight.abs().amax(1, keepdim=True) / 448).log2().ceil()
        want = (weight / scale).to(types[name]).float() * scale
        np.testing.assert_array_equal(bundle.read_float(tensor), want.numpy())


@pytest.mark.parametrize("name", ["int4-gptq", "int8", "int4-min-rtn", "int4-awq", "bf16"])
def test_gguf_holds_what_the_bundle_does(name: str, gguf: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    made(gguf, recipe, tmp_path / "out")
    made(gguf, recipe, tmp_path / "out.gguf")
    with (
        open_checkpoint(tmp_path / "out") as bundle,
        open_checkpoint(tmp_path / "out.gguf") as ours,
        open_checkpoint(gguf) as source,
    ):
        assert set(ours.tensors) == set(source.tensors)
        for tensor in source.tensors:
            np.testing.assert_allclose(
                ours.read_float(tensor), bundle.read_float(tensor), rtol=0, atol=1e-6
            )
        assert ours.load_tokenizer().encode("a model ran") == source.load_tokenizer().encode(
            "a model ran"
        )
    import gguf as package

    fields = package.GGUFReader(tmp_path / "out.gguf").fields
    kinds = {"int4-min-rtn": 3, "int8": 7, "bf16": 32}
    if "general.file_type" in fields:
        assert fields["general.file_type"].contents() == kinds.get(name, 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_the_decoder_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    extra = {"sliding_window": 16, "head_dim": 16} if family == "gemma3_text" else {}
    path = checkpoints.tiny_dir(tmp_path / "hf", family, **extra)
    theirs = AutoModelForCausalLM.from_pretrained(path).float().eval()
    ids = np.arange(80).reshape(2, 40)
    with open_checkpoint(path) as ckpt, torch.no_grad():
        decoder = Decoder(ckpt.spec)
        x = embedded(ckpt, decoder, ids)
        for layer in range(ckpt.spec.num_layers + 1):
            x = decoder.run(layer, x, read_floats(ckpt, decoder.names(layer)))
        want = theirs(torch.from_numpy(ids)).logits
    assert (x - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", ["int4-gptq", "int4-rtn", "int4-signround"])
def test_what_is_in_its_format_already_is_kept(name: str, tiny: Path, tmp_path: Path) -> None:
    source = checkpoints.tiny_gguf(tmp_path / "tiny.gguf", tiny, "q4_0")
    target = made(source, recipe_of(name), tmp_path / "out")
    with open_checkpoint(source) as ckpt, open_checkpoint(target) as bundle:
        for tensor, info in ckpt.tensors.items():
            np.testing.assert_array_equal(
                bundle.read_rows(tensor, 0, info.rows), ckpt.read_rows(tensor, 0, info.rows)
            )


def test_the_list_of_recipes(capsys: Any) -> None:
    assert main(["compress", "--list-recipes"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    for line in out.splitlines():
        if line.startswith(("int3", "int2", "fp8")):
            assert "at load" in line


def test_compress_and_run(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "out")
    assert main(["compress", str(tiny), "--recipe", "int3-rtn", "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_per_weight"] == pytest.approx(3.25 / 8)
    assert main(["run", out, "hello", "--max-tokens", "2", "--no-packed-cache"]) == 0


@pytest.mark.parametrize("dtype", ["q4_k", "q6_k"])
def test_k_blocks_hold_the_grid(dtype: str) -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((5, 512)).astype(np.float32))
    weight[1] += 3  # no minimum below zero
    weight[2] = 0
    grid = fit_grid(weight, parse_storage(dtype))
    codes = grid.codes(weight)
    values = dequantize(to_blocks(codes, grid), dtype, 512)
    np.testing.assert_allclose(values, grid.values(codes).numpy(), rtol=0, atol=1e-5)
    plain = fit_grid(weight, parse_storage("int4-g32-min"), search=False)
    lost = float((torch.from_numpy(values) - weight).square().sum())
    assert lost < 1.1 * float((plain.values(plain.codes(weight)) - weight).square().sum())


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quants_in_a_gguf_file(name: str, tmp_path: Path) -> None:
    hf = uneven(tmp_path / "hf", tie_word_embeddings=False, vocab_size=333, intermediate_size=256)
    source = checkpoints.tiny_gguf(tmp_path / "tiny.gguf", hf)
    ours = made(source, recipe_of(name), tmp_path / "ours.gguf")
    plain = made(source, nearest(recipe_of(name)), tmp_path / "plain.gguf")
    with open_checkpoint(ours) as ckpt:
        assert ckpt.tensors["model.layers.0.mlp.down_proj.weight"].dtype == "q4_k"
        assert ckpt.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "q4_1"
        assert ckpt.tensors["lm_head.weight"].dtype == "q8_0"
    assert layer_error(source, ours) < 0.85 * layer_error(source, plain)
    with pytest.raises(RequestError, match=r"give -o a file that ends in \.gguf"):
        made(source, recipe_of(name), tmp_path / "out")
