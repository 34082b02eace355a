"""Distillation and training on a grid: each against what it must beat."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from checkpoints import tiny_dir
from small_models import (
    IDS,
    TEXT,
    WINDOWS,
    logits,
    off,
    quiet,
    recipe,
    twin,
    weights_of,
    write_text,
)

from pronk import load
from pronk.checkpoint.open import open_checkpoint
from pronk.compress import fake_quant, smaller, structured, training
from pronk.compress import shape as shapes
from pronk.compress.layerwise import cut_windows
from pronk.compress.torch_model import to_transformers
from pronk.errors import PronkError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_dir(tmp_path_factory.mktemp("smaller") / "tiny", "llama", num_hidden_layers=4)


def test_the_loss_and_its_gradient_are_the_plain_ones(tiny):
    teacher, _ = twin(tiny)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    recipe = training.Recipe(1, window=200, batch=2, temperature=2.0, hidden=0.5, precision="f32")
    trainer = training.Trainer(
        student, teacher, IDS, recipe, tiny.parent / "no", matched=[(0, 0), (2, 3)]
    )
    ids = trainer._windows(0)
    assert ids.shape == (2, 200)
    loss = trainer._backward(ids)
    own = {name: weight.grad.clone() for name, weight in trainer.trained.items()}
    student.zero_grad()
    p = teacher(ids, output_hidden_states=True)
    q = student(ids, output_hidden_states=True)
    kl = (p.logits / 2).softmax(-1) * (
        (p.logits / 2).log_softmax(-1) - (q.logits / 2).log_softmax(-1)
    )
    plain = 4 * kl.sum(-1).mean()
    for mine, other in ((0, 0), (2, 3)):
        a, b = q.hidden_states[mine + 1], p.hidden_states[other + 1].detach()
        plain = plain + 0.25 * (a - b).square().mean() / b.square().mean()
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=1e-4)
    for name, weight in student.named_parameters():
        assert off(own[name], weight.grad) < 1e-3, name


def test_distillation_gives_back_what_pruning_took(tmp_path, tiny):
    pruning = smaller.Pruning(layers="3", mlp="-40%", window=48, dtype="float32")
    found = smaller.prune(tiny, pruning, TEXT, tmp_path / "out", recipe=recipe(60))
    measured = found["measured"]
    assert measured["recovered"]["kl"] < 0.85 * measured["pruned"]["kl"]
    assert found["shape"]["after"] == {"layers": 3, "kv_heads": 2, "mlp": 96, "hidden": 64}
    # What was measured is what was written, and what runs.
    model, spec = twin(tmp_path / "out")
    teacher, _ = twin(tiny)
    assert shapes.count_parameters(spec) == found["parameters"]["after"]
    judged = cut_windows(TEXT.judged, 48, 42)
    again = training.compare(model, teacher, judged)
    assert again["kl"] == pytest.approx(measured["recovered"]["kl"], rel=1e-4)
    with load(tmp_path / "out", context=64, kv_dtype="f32") as own:
        assert off(torch.from_numpy(own.logits(IDS[:48])), logits(model)[:48]) < 1e-5
    # A second verb goes on from there.
    more = smaller.distill(tmp_path / "out", tiny, TEXT, tmp_path / "more", recipe(40))
    assert more["measured"]["distilled"]["kl"] < measured["recovered"]["kl"]
    assert not list(tmp_path.glob(".*"))


def test_matched_hidden_states_come_nearer(tmp_path, tiny):
    teacher, spec = twin(tiny)
    shape = dataclasses.replace(shapes.shape_of(spec), mlp=64)
    start = copy.deepcopy(teacher)
    structured.prune(start, WINDOWS, shape, quiet)
    found = []
    for weight in (0.0, 100.0):
        student = copy.deepcopy(start)
        trainer = training.Trainer(
            student, teacher, IDS, recipe(40, hidden=weight), tmp_path / "s",
            matched=[(i, i) for i in range(4)],
        )  # fmt: skip
        trainer.run(quiet)
        own = student.model(WINDOWS, output_hidden_states=True).hidden_states[2]
        other = teacher.model(WINDOWS, output_hidden_states=True).hidden_states[2]
        found.append(off(own, other))
    assert found[1] < 0.95 * found[0]


def test_zeros_stay_zero_in_distillation(tmp_path, tiny):
    pruning = smaller.Pruning(pattern="2:4", method="magnitude", window=48, dtype="float32")
    found = smaller.prune(tiny, pruning, TEXT, tmp_path / "out", recipe=recipe(40))
    measured = found["measured"]
    assert measured["recovered"]["kl"] < 0.8 * measured["pruned"]["kl"]
    model, _ = twin(tmp_path / "out")
    for name, weight in model.named_parameters():
        if "_proj" in name:
            zeros = (weight.reshape(-1, 4) == 0).sum(1)
            assert (zeros >= 2).all() and zeros.float().mean() < 2.01, name
    sizes = found["sparse"]
    assert sizes["bytes_sparse_int4"] * 4.5 == pytest.approx(sizes["bytes_dense_int4"] * 3.5)


GRID = fake_quant.Grid(3, 32)


def test_scales_are_searched_and_storable():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for clip in (False, True):
        scale = fake_quant.fit_scales(weight, GRID, clip)
        assert torch.equal(scale, scale.half().float())
        codes = fake_quant.codes_of(weight, scale, GRID)
        assert codes.min() >= -4 and codes.max() <= 3
        errors.append(off((codes * scale[..., None]).reshape(16, 64), weight))
    assert errors[1] < 0.95 * errors[0]


def test_training_on_a_grid_beats_rounding_to_it(tmp_path, tiny):
    found = smaller.qat(tiny, GRID, TEXT, tmp_path / "out", recipe(100, learning_rate=5e-4))
    measured = found["measured"]
    assert measured["clipped"]["kl"] < measured["rounded"]["kl"]
    assert measured["trained"]["kl"] < 0.8 * measured["clipped"]["kl"]
    # The bundle holds the grid: at most eight values a group, and as good as was measured.
    with open_checkpoint(tmp_path / "out") as ckpt:
        assert ckpt.tensors["model.layers.1.mlp.down_proj.weight"].dtype == "q4_0"
        groups = ckpt.read_float("model.layers.1.mlp.down_proj.weight").reshape(-1, 32)
        assert max(len(np.unique(group)) for group in groups) <= 8
        model = to_transformers(ckpt)
    teacher, _ = twin(tiny)
    again = training.compare(model, teacher, cut_windows(TEXT.judged, 48, 42))
    assert again["kl"] == pytest.approx(measured["trained"]["kl"], rel=1e-3)
    with load(tmp_path / "out", context=64, kv_dtype="f32") as own:
        assert not own.conversions
        assert off(torch.from_numpy(own.logits(IDS[:48])), logits(model)[:48]) < 2e-3


@pytest.mark.parametrize("text", ["int2-g32", "int4-g64", "int8-g32"])
def test_every_grid_is_stored_as_it_was_trained(tmp_path, text):
    path = tiny_dir(tmp_path / "m", "qwen2", intermediate_size=128, tie_word_embeddings=False)
    grid = fake_quant.parse_grid(text)
    model, _ = twin(path)
    names = fake_quant.attach(model, grid)
    blocks = fake_quant.GridBlocks(model, grid)
    from pronk.checkpoint.bundle import write_bundle

    with open_checkpoint(path) as ckpt:
        out = write_bundle(ckpt, blocks.formats, tmp_path / "o", quantize=blocks, meta={})
    with open_checkpoint(out) as ckpt:
        for name in names:
            trained = model.get_submodule(name.removesuffix(".weight")).weight.detach().numpy()
            assert np.array_equal(ckpt.read_float(name), trained), name


def test_a_run_that_was_cut_short_ends_as_one_that_was_not(tmp_path, tiny):
    class CutError(Exception):
        pass

    teacher, _ = twin(tiny)
    start = copy.deepcopy(teacher)
    with torch.no_grad():
        start.model.layers[1].mlp.down_proj.weight.zero_()

    def train(student, tell=quiet, seed=0):
        trainer = training.Trainer(
            student, teacher, IDS, recipe(12, seed=seed), tmp_path / "state", every=5
        )
        trainer.run(tell)
        return trainer

    whole, cut = copy.deepcopy(start), copy.deepcopy(start)
    train(whole).done()

    def stop(what, done, total):
        if done == 7:
            raise CutError

    with pytest.raises(CutError):
        train(cut, stop)
    resumed = copy.deepcopy(start)
    trainer = train(resumed)
    assert trainer.resumed == 5
    assert len(trainer.losses) == 12
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    # Another seed is another run, and starts anew.
    assert train(copy.deepcopy(start), seed=1).resumed == 0
    (tmp_path / "state").write_bytes(b"12345678 not a state")
    with pytest.raises(PronkError, match=r"state is damaged .*remove it to start anew"):
        train(copy.deepcopy(start))


def test_a_run_that_was_killed_goes_on(tmp_path, tiny):
    text = write_text(tmp_path / "text")
    words = [
        "prune", str(tiny), "--mlp", "-40%", "--calibration", str(text), "--window", "32",
        "--samples", "4", "--distill", "150", "--threads", "1", "--precision", "f32", "--json",
    ]  # fmt: skip

    def start(out):
        command = [sys.executable, "-m", "pronk", *words, "-o", str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start("out")
    state = tmp_path / ".out.training"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert state.exists() and not (tmp_path / "out").exists()
    reports = []
    for out in ("out", "whole"):
        stdout, stderr = (run := start(out)).communicate()
        assert run.returncode == 0, stderr
        reports.append(json.loads(stdout))
    assert reports[0]["resumed_at"] >= 25 and reports[1]["resumed_at"] == 0
    assert reports[0]["losses"] == reports[1]["losses"]
    a, b = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(tmp_path.glob(".*"))


def test_a_loss_that_is_not_finite_ends_training(tmp_path, tiny):
    teacher, _ = twin(tiny)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    trainer = training.Trainer(student, teacher, IDS, recipe(3), tmp_path / "state")
    with pytest.raises(PronkError, match="no longer finite at step 1: give a lower --learning"):
        trainer.run(quiet)
