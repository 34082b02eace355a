"""Making models smaller from the command line, and what is refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from checkpoints import tiny_dir, tiny_gguf
from small_models import IDS, TEXT, logits, off, recipe, refused, twin, weights_of, write_text

from pronk import load
from pronk.checkpoint.open import open_checkpoint
from pronk.cli import main
from pronk.compress import smaller
from pronk.compress.torch_model import RECORD_FILE, ModelWriter
from pronk.errors import PronkError


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
