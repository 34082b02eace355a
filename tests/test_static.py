"""Static ranges of activations: what sets them, what is written, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from pronk import load
from pronk.checkpoint.open import open_checkpoint
from pronk.compress import static
from pronk.compress.calibrate import read_calibration
from pronk.compress.compress import compress
from pronk.compress.forward import Decoder
from pronk.compress.recipes import recipe_of
from pronk.errors import CheckpointError, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama_dir(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="module")
def bundles(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("static")
    for how in static.OBSERVERS:
        compress(tiny, recipe_of(f"int8-static-{how}"), folder / how, samples=SAMPLES)
    return {how: folder / how for how in static.OBSERVERS}


def scales_of(bundle: Path) -> dict[str, float]:
    from safetensors.numpy import load_file

    held = load_file(bundle / "model.safetensors")
    return {n: float(v[0]) for n, v in held.items() if n.endswith(".input_scale")}


def test_observers_differ_as_they_are_meant_to() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200_000).astype(np.float32)
    values[:4] = 60.0, -80.0, 70.0, 75.0  # fewer than 1 in 10,000
    seen = static.Histogram()
    for part in np.array_split(values, 7):
        seen.add(torch.from_numpy(part))
    ranges = {how: seen.scale(how) * 127 for how in static.OBSERVERS}
    assert ranges["minmax"] == 80.0
    body = np.abs(values)
    assert np.mean(body <= ranges["percentile"]) >= 0.9999
    assert np.mean(body <= ranges["percentile"] * 0.97) < 0.9999

    def error(top: float) -> float:
        step = top / 127
        rounded = np.clip(np.round(values / step), -127, 127) * step
        return float(((rounded - values) ** 2).sum())

    tried = [error(top) for top in np.linspace(2, 80, 400)]
    assert error(ranges["mse"]) <= 1.02 * min(tried) < 0.5 * error(ranges["percentile"])
    assert 2 < ranges["entropy"] < ranges["percentile"] + 1 < ranges["mse"] < 80


def test_entropy_keeps_what_has_no_tail() -> None:
    seen = static.Histogram()
    seen.add(torch.linspace(-3, 3, 50_001))
    for how in static.OBSERVERS:
        assert seen.scale(how) * 127 == pytest.approx(3, rel=0.02), how


def test_the_width_of_bins_does_not_depend_on_the_order() -> None:
    small, large = torch.linspace(0, 1, 1000), torch.linspace(0, 900, 1000)
    one, other = static.Histogram(), static.Histogram()
    one.add(torch.cat([small, large]))
    other.add(small)
    other.add(large)
    assert one.counts.sum() == other.counts.sum() == 2000
    assert one.largest == other.largest == 900
    nothing = static.Histogram()
    nothing.add(torch.zeros(5))
    assert [nothing.scale(how) for how in static.OBSERVERS] == [1.0] * 4


def test_a_bundle_holds_the_scales_and_runs_without_them(
    tiny: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    compress(tiny, recipe_of("int8-channel"), plain)
    held = {how: scales_of(path) for how, path in bundles.items()}
    assert len({tuple(scales.values()) for scales in held.values()}) == 4
    assert all(held["minmax"][n] >= other[n] > 0 for other in held.values() for n in other)
    layers = 7 * json.loads((tiny / "config.json").read_text())["num_hidden_layers"]
    assert len(held["mse"]) == layers + 1  # and the head
    config = json.loads((bundles["mse"] / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["dynamic"] is False
    ids = list(range(60))
    with load(plain, 1, 64) as a, load(bundles["mse"], 1, 64) as b:
        np.testing.assert_array_equal(a.logits(ids), b.logits(ids))


def test_transformers_multiplies_with_the_static_inputs(bundles: dict[str, Path]) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(bundles["entropy"]).eval()
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj") or name == "lm_head":
            module.register_forward_hook(
                lambda _, given, out, name=name: seen.__setitem__(name, (given[0], out))
            )
    with torch.no_grad():
        model(torch.arange(300)[None])
    scales = scales_of(bundles["entropy"])
    assert len(seen) == len(scales)
    rounding = static.with_scales(scales)
    with open_checkpoint(bundles["entropy"]) as bundle:
        for name, (given, out) in seen.items():
            stored = "model.embed_tokens" if name == "lm_head" else name
            weight = torch.from_numpy(bundle.read_float(f"{stored}.weight"))
            rounded = rounding(f"{name}.input_scale", given) @ weight.T
            size = out.abs().max()
            assert (rounded - out).abs().max() < 1e-5 * size < (given @ weight.T - out).abs().max()


def test_what_rounding_inputs_costs(tiny: Path) -> None:
    with open_checkpoint(tiny) as ckpt:
        windows = read_calibration(ckpt, None, SAMPLES, 0).windows
        seen = static.observe(ckpt, Decoder(ckpt.spec), windows)
        minmax = static.with_scales({name: one.scale("minmax") for name, one in seen.items()})
        found = static.losses(
            ckpt,
            windows[:1],
            {"minmax": minmax, "token": static.by_token, "group": static.by_group},
        )
    assert found["exact"]["kl"] == 0
    assert found["exact"]["top1_agreement"] == 1
    assert 0 < found["group"]["kl"] < found["token"]["kl"] < found["minmax"]["kl"]


def test_what_cannot_be_is_refused(tiny: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    gguf = checkpoints.tiny_gguf(tmp_path / "tiny.gguf", tiny)
    with pytest.raises(RequestError, match="no GGUF file holds scales of inputs"):
        compress(gguf, recipe_of("int8-static-mse"), tmp_path / "out.gguf", samples=SAMPLES)
    path = bundles["minmax"] / "config.json"
    text = path.read_text()
    config = json.loads(text)
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"]["num_bits"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="input_activations set to other than int8"):
        open_checkpoint(bundles["minmax"])
    path.write_text(text)
