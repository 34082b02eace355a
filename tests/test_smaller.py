"""Pruning, sparsity, distillation and training on a grid: each against what it must beat."""

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
from checkpoints import mixed_lines, tiny_dir, tiny_gguf

from pronk import load
from pronk.checkpoint.open import open_checkpoint
from pronk.cli import main
from pronk.compress import fake_quant, smaller, sparse, structured, training
from pronk.compress import shape as shapes
from pronk.compress.layerwise import Stream, cut_windows
from pronk.compress.torch_model import RECORD_FILE, ModelWriter, to_transformers
from pronk.errors import PronkError, RequestError

torch = pytest.importorskip("torch")

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 20_000)]
WINDOWS = cut_windows(IDS, 48, 8)
TEXT = smaller.Text(IDS[:800], IDS[:-800], IDS[-800:])


def quiet(what, done, total):
    pass


def logits(model, windows=WINDOWS):
    with torch.no_grad():
        return torch.cat([model(window[None]).logits[0] for window in windows])


def off(actual, expected):
    return float(((actual - expected).norm() / expected.norm()).detach())


def twin(path):
    with open_checkpoint(path) as ckpt:
        return to_transformers(ckpt), ckpt.spec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_dir(tmp_path_factory.mktemp("smaller") / "tiny", "llama", num_hidden_layers=4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_goes_to_transformers_and_back(tmp_path, family, tied):
    source = tiny_dir(tmp_path / "hf", family, tie_word_embeddings=tied)
    path = tiny_gguf(tmp_path / "m.gguf", source)
    model, spec = twin(path)
    with load(path, context=64, kv_dtype="f32") as own:
        expected = own.logits(IDS[:48])
    assert off(logits(model)[:48], torch.from_numpy(expected)) < 1e-5
    with open_checkpoint(path) as ckpt, ModelWriter(tmp_path / "out") as writer:
        out = writer.write(model, spec, ckpt.load_tokenizer(), {"a": 1}, "float32")
    with load(out, context=64, kv_dtype="f32") as own:
        assert own.spec == dataclasses.replace(spec, name="out")
        assert off(torch.from_numpy(own.logits(IDS[:48])), torch.from_numpy(expected)) < 1e-5
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert off(logits(again), logits(model)) < 1e-6
    assert AutoTokenizer.from_pretrained(out).encode("a fox") == own.encode("a fox")
    assert json.loads((out / RECORD_FILE).read_text()) == {"a": 1}


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


def recipe(steps, **changes):
    fields = {"window": 48, "batch": 4, "learning_rate": 1e-3, "precision": "f32", **changes}
    return training.Recipe(steps, **fields)


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


def weights_of(path):
    model, _ = twin(path)
    return {name: weight.clone() for name, weight in model.named_parameters()}


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


def write_text(path):
    path.write_text("\n".join(mixed_lines(300)), encoding="utf-8")
    return path


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


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("pronk: error: ")
    return sentence


BAD = [
    ([], "nothing to prune: give --parameters"),
    (["--mlp", "33"], "33 MLP neurons cannot be kept: .* in steps of 32"),
    (["--mlp", "-200%"], "leaves nothing"),
    (["--layers", "9"], "the model has 4"),
    (["--layers", "3", "--parameters", "-10%"], "--parameters chooses all sizes"),
    (["--parameters", "-99%"], "no shape of the model"),
    (["--pattern", "4:2"], "neither unstructured nor n:m"),
    (["--pattern", "2:4", "--sparsity", "0.6"], "is not that of the pattern"),
    (["--layers", "3", "--samples", "0"], "samples must be 1"),
    (["--sparsity", "1.5"], "between 0 and 1"),
    (["--layers", "3", "--window", "500000"], "two windows of 500000"),
    (["--layers", "3", "--distill", "-1"], "steps must be in"),
    (["--layers", "3", "--distill", "9", "--learning-rate", "nan"], "learning-rate must be in"),
    (["--hidden", "32", "--distill", "3", "--hidden-weight", "1"], "equally wide"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_what_cannot_be_pruned_is_refused_in_a_sentence(tmp_path, tiny, capsys, words, sentence):
    import re

    text = write_text(tmp_path / "text")
    options = ["--calibration", text, "-o", tmp_path / "out", "--window", "32", "--samples", "2"]
    said = refused(capsys, "prune", tiny, *options, *words)
    assert re.search(sentence, said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]


def test_texts_and_formats_that_are_none_are_refused(tmp_path, tiny, capsys):
    options = ["-o", tmp_path / "out", "--layers", "3", "--calibration"]
    (tmp_path / "empty").write_text("")
    assert "is empty" in refused(capsys, "prune", tiny, *options, tmp_path / "empty")
    (tmp_path / "raw").write_bytes(b"\xff\xfe\xfd")
    assert "is not UTF-8" in refused(capsys, "prune", tiny, *options, tmp_path / "raw")
    (tmp_path / "short").write_text("too short")
    assert "two windows" in refused(capsys, "prune", tiny, *options, tmp_path / "short")
    text = write_text(tmp_path / "text")
    options = ["--window", "32", "--calibration", text, "-o", tmp_path / "out"]
    for form in ("int5-g32", "int3-g48", "q4_0", "int3-g0"):
        assert "--format" in refused(capsys, "qat", tiny, "--format", form, *options)
    said = refused(capsys, "qat", tiny, "--format", "int3-g128", *options)
    assert "groups of 128 do not divide the 64 columns" in said
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(tmp_path, tiny, capsys):
    text = write_text(tmp_path / "text")
    options = ["--window", "32", "--calibration", text, "-o", tmp_path / "out"]
    other = tiny_dir(tmp_path / "other", "llama", vocab_size=352)
    said = refused(capsys, "distill", other, "--teacher", tiny, *options)
    assert "352 tokens in its vocabulary and the teacher 320" in said
    gemma = tiny_dir(tmp_path / "gemma", "gemma3_text", head_dim=16)
    said = refused(capsys, "prune", gemma, "--layers", "1", *options)
    assert "a gemma3_text model cannot be made smaller so yet: llama, mistral, qwen2 can" in said
    windowed = tiny_dir(tmp_path / "windowed", "mistral", sliding_window=64)
    assert "with windows" in refused(capsys, "qat", windowed, "--format", "int4-g32", *options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    said = refused(capsys, "prune", tiny, "--layers", "3", *options)
    assert "exists and is not a model that Pronk made smaller" in said
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_disk_that_fills_up_leaves_the_old_model(tmp_path, tiny, monkeypatch):
    pruning = smaller.Pruning(layers="3", window=48)
    smaller.prune(tiny, pruning, TEXT, tmp_path / "out")
    before = weights_of(tmp_path / "out")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(PronkError, match="out cannot be written: No space left on device"):
        smaller.prune(tiny, dataclasses.replace(pruning, layers="2"), TEXT, tmp_path / "out")
    after = weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(PronkError, match="training cannot be written: No space left"):
        smaller.distill(tmp_path / "out", tiny, TEXT, tmp_path / "d", recipe(26))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_torch_one_sentence_says_what_to_install(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    said = refused(capsys, "prune", tiny, "--layers", "3", "-o", tmp_path / "out")
    assert "needs torch, which is not installed: pip install torch==2.13.0 'pronk[" in said


def test_a_loss_that_is_not_finite_ends_training(tmp_path, tiny):
    teacher, _ = twin(tiny)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    trainer = training.Trainer(student, teacher, IDS, recipe(3), tmp_path / "state")
    with pytest.raises(PronkError, match="no longer finite at step 1: give a lower --learning"):
        trainer.run(quiet)


def test_the_command_line_prunes_learns_from_sampled_text_and_trains(tmp_path, tiny, capsys):
    text = write_text(tmp_path / "text")
    options = ["--window", "32", "--calibration", str(text), "--threads", "1"]
    argv = ["prune", str(tiny), "--parameters", "-35%", *options, "-o", str(tmp_path / "p")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "as it was" in said and "3 layers" in said
    argv = ["distill", str(tmp_path / "p"), "--teacher", str(tiny), "--steps", "3", *options]
    assert main([*argv, "--sampled", "2", "-o", str(tmp_path / "d"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["losses"]) == 3
    argv = ["prune", str(tiny), "--pattern", "2:4", "--method", "wanda", *options]
    assert main([*argv, "-o", str(tmp_path / "s")]) == 0
    assert "50.0% zeros (2:4); runs dense, no faster" in capsys.readouterr().out
    argv = ["qat", str(tiny), "--format", "int4-g32", "--steps", "2", *options]
    assert main([*argv, "-o", str(tmp_path / "q")]) == 0
    assert "int4-g32: 4.5 bits a weight as stored" in capsys.readouterr().out
    assert main(["run", str(tmp_path / "q"), "hello", "--max-tokens", "2"]) == 0


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
