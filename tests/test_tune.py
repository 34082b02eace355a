"""Scales and norms learnt end to end: their gradient, what they gain, what stays as it was."""

from __future__ import annotations

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
from pronk.compress.bits import divergence
from pronk.compress.calibrate import read_calibration
from pronk.compress.compress import compress
from pronk.compress.forward import Decoder, embedded
from pronk.compress.grid import fit_grid, from_blocks, to_blocks
from pronk.compress.layers import read_floats
from pronk.compress.recipes import recipe_of
from pronk.compress.stages import Compressed
from pronk.compress.tune import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 4
RTN = recipe_of("int4-rtn")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "hf"
    return checkpoints.tiny_llama_dir(
        path, intermediate_size=128, tie_word_embeddings=request.param
    )


@pytest.fixture(scope="module")
def rounded(source: Path) -> Path:
    compress(source, RTN, source.parent / "rounded")
    return source.parent / "rounded"


@pytest.mark.parametrize(
    "text", ["int8-g32", "int8-channel", "int4-g64", "int4-g32-min", "int3-g64", "int2-g32-min"]
)
def test_blocks_give_back_codes_and_grid(text: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 128), np.float32))
    storage = parse_storage(text)
    grid = fit_grid(weight, storage)
    codes = grid.codes(weight)
    blocks = to_blocks(codes, grid)
    got, same = from_blocks(blocks, storage, 128)
    assert torch.equal(got.float(), codes)
    assert torch.equal(same.scale, grid.scale)
    assert grid.low is None or (same.low is not None and torch.equal(same.low, grid.low))
    want = dequantize(blocks, storage.blocks, 128)
    np.testing.assert_allclose(same.values(got.float()), want, rtol=0, atol=1e-6)


def tuner(source: Any, view: Any, **options: Any) -> Tuner:
    windows = read_calibration(source, None, SAMPLES, 0).windows[:, :40]
    names = [name for name, info in source.tensors.items() if len(info.shape) == 2]
    if not source.spec.tie_embeddings:
        names.remove("model.embed_tokens.weight")
    storages = dict.fromkeys(names, parse_storage("int4-g32"))
    given = {"steps": 2, "rate": 1e-3, "seed": 0, **options}
    return Tuner(source, view, Decoder(source.spec), storages, windows, **given)


def test_the_gradient_is_that_of_the_whole_model(source: Path, rounded: Path) -> None:
    with open_checkpoint(source) as ckpt, open_checkpoint(rounded) as view:
        ours = tuner(ckpt, view)
        ours._target = ours._ends()
        drawn = np.array([2, 0])
        loss = ours._step(drawn)

        decoder, layers = Decoder(ckpt.spec), ckpt.spec.num_layers
        factors = {n: torch.ones_like(h.factor).requires_grad_() for n, h in ours._held.items()}

        def weights(layer: int) -> dict[str, torch.Tensor]:
            out = read_floats(view, decoder.names(layer))
            for name in out:
                size = out[name].shape[-1] // factors[name].shape[-1]
                out[name] = out[name] * factors[name].repeat_interleave(size, -1)
            return out

        ids = ours._windows[drawn]
        p, q = embedded(ckpt, decoder, ids), embedded(view, decoder, ids)
        head = "model.embed_tokens.weight"
        if head in factors:
            q = weights(layers)[head][torch.from_numpy(ids)]
        for layer in range(layers + 1):
            p = decoder.run(layer, p, read_floats(ckpt, decoder.names(layer)))
            q = decoder.run(layer, q, weights(layer))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        plain = (p.exp() * (p - q)).sum(-1).mean()
        plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=1e-4)
    assert len(factors) == len(view.tensors) - (head not in factors)
    for name, factor in factors.items():
        got, want = ours._held[name].factor.grad, factor.grad
        assert got is not None and want is not None and want.abs().max() > 0, name
        assert (got - want).norm() < 1e-3 * want.norm(), name


def kl(source: Path, made: Path) -> float:
    with open_checkpoint(source) as ckpt, open_checkpoint(made) as view:
        windows = read_calibration(ckpt, None, 2 * SAMPLES, 1).windows
        return divergence(ckpt, view, Decoder(ckpt.spec), windows)


@pytest.mark.parametrize("name", ["int4-rtn", "int4-min-rtn", "int3-rtn"])
def test_tuned_scales_keep_predictions_and_codes(name: str, source: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    compress(source, recipe, tmp_path / "plain")
    report = compress(source, replace(recipe, tune=30), tmp_path / "tuned", samples=SAMPLES)
    assert kl(source, tmp_path / "tuned") < 0.8 * kl(source, tmp_path / "plain")
    assert report.tuning is not None
    assert report.tuning["last"] < report.tuning["first"]
    with open_checkpoint(tmp_path / "plain") as plain, open_checkpoint(tmp_path / "tuned") as tuned:
        changed = 0
        for tensor, text in report.formats.items():
            info, storage = plain.tensors[tensor], parse_storage(text)
            (a, old), (b, new) = (
                from_blocks(of.read_rows(tensor, 0, info.rows), storage, info.cols)
                for of in (plain, tuned)
            )
            assert torch.equal(a, b)
            changed += not torch.equal(old.scale, new.scale)
        assert changed == len(report.formats)


class CutError(Exception):
    pass


def test_a_tuning_that_was_cut_short_ends_as_one_that_was_not(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    recipe = replace(RTN, tune=20)

    def stop(what: str, done: int, total: int) -> None:
        if what == "tuning scales" and done == 18:
            raise CutError

    with pytest.raises(CutError):
        compress(source, recipe, tmp_path / "out", samples=SAMPLES, progress=stop)
    steps: list[int] = []
    plain = Tuner._step
    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "_step", lambda self, drawn: steps.append(1) or plain(self, drawn))
        compress(source, recipe, tmp_path / "out", samples=SAMPLES)
    assert len(steps) == 4
    compress(source, recipe, tmp_path / "whole", samples=SAMPLES)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_has_no_factor_stays_as_it_is(source: Path, rounded: Path) -> None:
    with open_checkpoint(source) as ckpt, open_checkpoint(rounded) as view:
        ours = tuner(ckpt, view)
        made = ours.made()
        again = Compressed(view, {n: (view.tensors[n].dtype, v) for n, v in made.items()})
        for name, info in view.tensors.items():
            np.testing.assert_array_equal(
                again.read_rows(name, 0, info.rows), view.read_rows(name, 0, info.rows)
            )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "int4-rtn", "--tune-scales", "-1"], "--tune-scales must be from 0"),
        (["--recipe", "bf16", "--tune-scales", "2"], "no scales to tune"),
    ],
)
def test_what_cannot_be_tuned(
    options: list[str], words: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["compress", str(source), *options, "-o", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bundles_say_how_they_were_tuned(source: Path, tmp_path: Path, capsys: Any) -> None:
    import json

    out = str(tmp_path / "out")
    words = ["compress", str(source), "--recipe", "int4-rtn", "--tune-scales", "2", "-o", out]
    assert main([*words, "--samples", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tuning"]
    assert told["steps"] == 2
    manifest = json.loads((tmp_path / "out" / "pronk.json").read_text())
    assert manifest["tuning"] == told
    assert manifest["recipe"]["tune"] == 2
    assert main(["run", out, "hello", "--max-tokens", "2", "--no-packed-cache"]) == 0
