"""Bundles: what is written, that Hugging Face reads the same, and that kills leave nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.blocks import dequantize, quantize
from pronk.checkpoint.bundle import BundleWriter, is_bundle, write_bundle
from pronk.checkpoint.kinds import KINDS, tensor_kind
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.real_minima import join_minima, split_minima
from pronk.compress.quantize import RoundToNearest
from pronk.errors import CheckpointError, PronkError, RequestError

META = {"budget": {"memory": 10**8, "context": 64}}
MIXED = dict(zip(KINDS, ("q8_0", "q4_1", "q4_0", "q4_1"), strict=True))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def everywhere(dtype: str) -> dict[str, str]:
    return dict.fromkeys(KINDS, dtype)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama_dir(tmp_path_factory.mktemp("tied") / "hf")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untied") / "hf"
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return checkpoints.tiny_llama_dir(
        path, seed=1, tie_word_embeddings=False, rope_parameters=rope, vocab_size=333
    )


def write(source: Path, formats: dict[str, str], target: Path) -> Path:
    with open_checkpoint(source) as ckpt:
        return write_bundle(ckpt, formats, target, quantize=RoundToNearest(), meta=META)


def rounded(source: Path, formats: dict[str, str]) -> dict[str, np.ndarray]:
    """Every tensor of `source` as it should come back."""
    out = {}
    with open_checkpoint(source) as ckpt:
        for name, info in ckpt.tensors.items():
            values, kind = ckpt.read_float(name), tensor_kind(name)
            if kind is None:
                out[name] = values
            elif name == "model.embed_tokens.weight" and not ckpt.spec.tie_embeddings:
                rows = dequantize(quantize(values, "q8_0"), "q8_0", info.shape[-1])
                out[name] = rows.astype(np.float16).astype(np.float32)
            else:
                dtype = formats[kind]
                out[name] = dequantize(quantize(values, dtype), dtype, info.shape[-1])
    return out


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize(
    "formats",
    [MIXED, *map(everywhere, ("q8_0", "q4_0", "q4_1"))],
    ids=["mixed", "q8_0", "q4_0", "q4_1"],
)
def test_pronk_reads_back_what_was_rounded(
    name: str, formats: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(name)
    target = write(source, formats, tmp_path / "out")
    expected = rounded(source, formats)
    with open_checkpoint(source) as ckpt, open_checkpoint(target) as bundle:
        assert bundle.format == "bundle"
        assert bundle.spec.tie_embeddings is (name == "tied")
        assert bundle.spec.ropes[0] == ckpt.spec.ropes[0]
        assert set(bundle.tensors) == set(ckpt.tensors)
        for tensor, info in bundle.tensors.items():
            kind = tensor_kind(tensor)
            table = tensor == "model.embed_tokens.weight" and name == "untied"
            if kind is not None:
                assert info.dtype == ("q8_0" if table else formats[kind])
            # What transformers reads as float16 we read as the blocks it was, scales to an ulp.
            near = {"rtol": 2e-3} if table else {"rtol": 0}
            np.testing.assert_allclose(
                bundle.read_float(tensor), expected[tensor], atol=1e-6, err_msg=tensor, **near
            )
            half = bundle.read_float(tensor, 1, 3) if len(info.shape) == 2 else None
            if half is not None:
                np.testing.assert_array_equal(half, bundle.read_float(tensor)[1:3])
        assert bundle.load_tokenizer().encode("a model ran") == ckpt.load_tokenizer().encode(
            "a model ran"
        )


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_transformers_computes_the_same(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import torch
    import transformers

    source = request.getfixturevalue(name)
    target = write(source, MIXED, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    assert theirs.dtype == torch.float32

    ours = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(source))
    ours = ours.float().eval()
    weights = {k: torch.from_numpy(v) for k, v in rounded(source, MIXED).items()}
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    weights = {k: v.reshape(shapes[k]) for k, v in weights.items()}
    if name == "tied":
        # transformers reads the embedding in float16.
        head = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = head
        weights["model.embed_tokens.weight"] = head.half().float()
        ours.lm_head.weight = torch.nn.Parameter(head.clone())
    ours.load_state_dict(weights)
    ids = torch.arange(300)[None]
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()

    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    with open_checkpoint(source) as ckpt:
        assert tokenizer("once upon a time")["input_ids"] == ckpt.load_tokenizer().encode(
            "once upon a time"
        )
    assert theirs.config.eos_token_id == 2


def test_q4_1_of_a_file_is_kept(tied: Path, tmp_path: Path) -> None:
    source = checkpoints.tiny_gguf(tmp_path / "tiny.gguf", tied, "q4_1")
    rounding = RoundToNearest()
    with open_checkpoint(source) as ckpt:
        formats = everywhere("q4_1")
        target = write_bundle(ckpt, formats, tmp_path / "out", quantize=rounding, meta={})
        assert set(rounding.errors.values()) == {0.0}
        with open_checkpoint(target) as bundle:
            for name in ckpt.tensors:
                np.testing.assert_allclose(
                    bundle.read_float(name), ckpt.read_float(name), rtol=0, atol=1e-6
                )


def test_real_minima_round_trip() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, 64)).astype(np.float32)
    values[0] = 0.37  # groups of one value
    values[1] = -0.37
    values[2] = 0
    values[3] = rng.uniform(5, 6, 64)  # a minimum far from zero
    values[4] *= 1e-6
    blocks = quantize(values, "q4_1")
    parts = split_minima(blocks, 64)
    words = parts["weight_packed"].view(np.uint8)
    scale, zero = parts["weight_scale"].astype(np.float32), parts["weight_zero_point"]
    again = join_minima(words, scale, zero)
    want = dequantize(blocks, "q4_1", 64)
    np.testing.assert_allclose(dequantize(again, "q4_1", 64), want, rtol=0, atol=1e-6)
    # What Hugging Face computes from the same tensors.
    codes = np.stack([words & 15, words >> 4], axis=2).reshape(40, 2, 32).astype(np.float32)
    theirs = (codes - 8 - zero[:, :, None]) * scale[:, :, None]
    np.testing.assert_allclose(theirs.reshape(40, 64), want, rtol=3e-7, atol=1e-6)
    with pytest.raises(CheckpointError, match="minimum outside"):
        join_minima(words, scale, zero + np.float32(1e30))


def test_manifest(tied: Path, tmp_path: Path) -> None:
    target = write(tied, MIXED, tmp_path / "out")
    manifest = json.loads((target / "pronk.json").read_text())
    assert (manifest["format"], manifest["tied"], manifest["budget"]) == (1, True, META["budget"])
    assert manifest["formats"] == MIXED
    files = {file.name for file in target.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "pronk.json"}
    assert set(manifest["sha256"]) == files - {"pronk.json"}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is False
    groups = config["quantization_config"]["config_groups"].values()
    assert len(groups) == 3
    assert not any(part.startswith(".") for part in names(tmp_path))


def test_a_bundle_is_replaced_and_nothing_else(tied: Path, tmp_path: Path) -> None:
    target = write(tied, everywhere("q8_0"), tmp_path / "out")
    (target / "old").write_text("")
    write(tied, everywhere("q4_0"), target)
    assert not (target / "old").exists()
    assert json.loads((target / "pronk.json").read_text())["formats"] == everywhere("q4_0")
    assert names(tmp_path) == ["out"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(RequestError, match="not a bundle"):
            write(tied, MIXED, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    (tmp_path / "link").symlink_to("out")
    write(tied, everywhere("q8_0"), tmp_path / "link")
    assert json.loads((target / "pronk.json").read_text())["formats"] == everywhere("q8_0")
    assert names(tmp_path) == ["file", "link", "mine", "out"]
    (tmp_path / "empty").mkdir()
    assert is_bundle(write(tied, MIXED, tmp_path / "empty"))


def test_a_failure_leaves_the_old_bundle(tied: Path, tmp_path: Path) -> None:
    target = write(tied, everywhere("q8_0"), tmp_path / "out")
    before = (target / "pronk.json").read_bytes()

    def interrupted(ckpt: Checkpoint, name: str, dtype: str) -> Any:
        raise KeyboardInterrupt

    with open_checkpoint(tied) as ckpt, pytest.raises(KeyboardInterrupt):
        write_bundle(ckpt, MIXED, target, quantize=interrupted, meta={})
    assert (target / "pronk.json").read_bytes() == before
    assert names(tmp_path) == ["out"]


def test_rows_that_cannot_be_grouped(tmp_path: Path) -> None:
    source = checkpoints.tiny_llama_dir(tmp_path / "hf", intermediate_size=80)
    with pytest.raises(CheckpointError, match=r"down_proj.*multiple of 32"):
        write(source, MIXED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(tied: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PronkError, match="cannot be written"):
        write(tied, MIXED, tmp_path / "file" / "out")


KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.bundle import BundleWriter
from pronk.compress.quantize import RoundToNearest

def slow(ckpt, name, dtype):
    if "down_proj" in name:
        print("half-way", flush=True)
        time.sleep(600)  # until it is killed
    return RoundToNearest()(ckpt, name, dtype)

kinds = ("head", "attention", "gate_up", "down")
with open_checkpoint(sys.argv[1]) as ckpt, BundleWriter(sys.argv[2]) as writer:
    writer.write(ckpt, dict.fromkeys(kinds, "q4_0"), quantize=slow, meta={})
    writer.commit()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_bundle(tied: Path, tmp_path: Path, how: signal.Signals) -> None:
    target = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tied), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == b"half-way\n"
        left = tmp_path / f".out.tmp-{child.pid}"
        assert left.is_dir()
        child.send_signal(how)
        child.wait(timeout=120)
    assert not target.exists()
    # Ctrl-C cleans up at once; after SIGKILL the next run does.
    assert left.exists() == (how == signal.SIGKILL)
    write(tied, MIXED, target)
    assert names(tmp_path) == ["out"]


def test_a_bundle_set_aside_is_put_back(tied: Path, tmp_path: Path) -> None:
    target = write(tied, MIXED, tmp_path / "out")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target.rename(tmp_path / f".out.old-{dead.pid}")
    with BundleWriter(target):
        assert is_bundle(target)
    living = tmp_path / f".out.tmp-{os.getppid()}"
    living.mkdir()
    with BundleWriter(target) as writer:
        assert living.exists()
        assert writer.path.parent == tmp_path
    assert time.time() - (target / "pronk.json").stat().st_mtime < 600
