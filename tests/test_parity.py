"""Logits against Hugging Face transformers: tiny random models, and the real one."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_dir, tiny_gguf, tiny_llama_dir
from engines import make_runner, run_whole

from pronk import load
from pronk.checkpoint.open import open_checkpoint

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 150)]

CONFIGS = {
    "llama2": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "grouped": {"num_key_value_heads": 1, "head_dim": 32, "hidden_size": 128},
    "biased": {"attention_bias": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}  # fmt: skip


def transformers_logits(path, ids):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_agrees_with_transformers(tmp_path, name):
    path = tiny_llama_dir(tmp_path / "hf", **CONFIGS[name])
    expected = transformers_logits(path, IDS)
    with load(path, threads=2, context=256, kv_dtype="f32") as model:
        actual = model.logits(IDS)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_float32_gguf_agrees_with_transformers(tmp_path):
    path = tiny_llama_dir(tmp_path / "hf")
    expected = transformers_logits(path, IDS)
    with load(tiny_gguf(tmp_path / "m.gguf", path), context=256, kv_dtype="f32") as model:
        actual = model.logits(IDS)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


FILES = ["hf-float32", "hf-bfloat16", "hf-sharded", "gguf-f32", "gguf-f16", "gguf-q8_0"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_family_agrees_with_transformers(tmp_path, family, file, tied):
    kind, dtype = file.split("-")
    how = {"hf-bfloat16": {"dtype": "bfloat16"}, "hf-sharded": {"shard": "50KB"}}.get(file, {})
    config = {
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    path = hf = tiny_dir(tmp_path / "hf", family, tie_word_embeddings=tied, **config, **how)
    if kind == "gguf":
        path = tiny_gguf(tmp_path / "m.gguf", hf, dtype)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.tie_embeddings == tied
    twin = rounded_twin(hf, dtype if kind == "gguf" else "f32")
    near = 2e-3 if dtype == "q8_0" else 1e-4  # activations are rounded where weights are

    def check(actual, ids):
        expected = twin_logits(twin, ids)
        assert np.abs(actual - expected).max() < near * np.abs(expected).max()

    runner = make_runner(path, kv_dtype="f32", kv_tokens=512)
    prompts = [IDS[:90], IDS[90:], IDS[40:41]]
    check(run_whole(runner, prompts[0]), prompts[0])  # prefill
    check(run_whole(runner, prompts[1], 1), prompts[1])  # a cached decode, token by token
    # Three at once: two prompts in chunks beside one that decodes.
    blocks = [[[0, 1, 2]], [[3, 4, 5]], [[6]]]
    got = [[] for _ in prompts]
    while any(len(rows) < len(prompt) for rows, prompt in zip(got, prompts, strict=True)):
        ids, positions, sequences = [], [], []
        for i, (prompt, width) in enumerate(zip(prompts, (40, 1, 1), strict=True)):
            at = len(got[i])
            part = prompt[at : at + width]
            ids += part
            positions += range(at, at + len(part))
            sequences += [i] * len(part)
        logits = runner.step(ids, positions, sequences, blocks, list(range(len(ids))))
        for i, row in zip(sequences, logits, strict=True):
            got[i].append(row)
    for rows, prompt in zip(got, prompts, strict=True):
        check(np.stack(rows), prompt)


def rounded_twin(path, dtype):
    """The transformers model of a directory, its matrices rounded to a GGUF type and back.

    It shares no code with the reader that is tested.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                blocks = gguf.quants.quantize(weight.numpy(), kind)
                values = np.array(gguf.quants.dequantize(blocks, kind), np.float32)
                weight.copy_(torch.from_numpy(values))
    return model


def twin_logits(twin, ids):
    import torch

    with torch.no_grad():
        return twin(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_bundle_runs_alike_in_transformers(tmp_path, tied, family):
    from pronk.checkpoint.bundle import write_bundle
    from pronk.checkpoint.open import open_checkpoint
    from pronk.compress.quantize import RoundToNearest

    source = tiny_dir(tmp_path / "hf", family, tie_word_embeddings=tied)
    formats = {"head": "q8_0", "attention": "q4_1", "gate_up": "q4_0", "down": "q4_1"}
    with open_checkpoint(source) as checkpoint:
        out = write_bundle(
            checkpoint, formats, tmp_path / "out", quantize=RoundToNearest(), meta={}
        )
    expected = transformers_logits(out, IDS)
    with load(out, context=256, kv_dtype="f32") as model:
        assert model.spec.family == family and not model.conversions
        actual = model.logits(IDS)
    # What is left is the rounding of activations, and of the embedding copy kept for transformers.
    assert np.abs(actual - expected).max() < 2e-3 * np.abs(expected).max()


def test_greedy_text_is_that_of_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from pronk import SamplingParams

    path = tiny_llama_dir(tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = reference.generate(
        torch.tensor([IDS[:20]]), max_new_tokens=60, do_sample=False, eos_token_id=None,
        pad_token_id=0)[0, 20:].tolist()  # fmt: skip
    with load(path, context=256, kv_dtype="f32") as model:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        assert [p.token for p in model.generate(IDS[:20], params)] == expected


def plain_rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


# What Gemma 3 270M's own config says.
GEMMA = {
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "rope_parameters": {"sliding_attention": plain_rope(1e4), "full_attention": plain_rope(1e6)},
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
}


def dequantized_twin(path):
    """A transformers model with the weights of a GGUF file in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        config = AutoConfig.for_model(
            spec.family, vocab_size=spec.vocab_size, hidden_size=spec.hidden_size,
            head_dim=spec.head_dim, intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads, rms_norm_eps=spec.norm_eps,
            max_position_embeddings=spec.context_length, tie_word_embeddings=spec.tie_embeddings,
            **(GEMMA if spec.family == "gemma3_text" else {
                "sliding_window": None, "rope_parameters": plain_rope(spec.ropes[0].theta)}),
        )  # fmt: skip
        with no_init_weights():  # minutes, for a real one
            model = AutoModelForCausalLM.from_config(config).eval()
        state = {}
        for name, info in checkpoint.tensors.items():
            values = torch.from_numpy(checkpoint.read_float(name).reshape(info.shape))
            # Gemma's norms multiply by one more than their weight, which GGUF files have added.
            added = spec.family == "gemma3_text" and name.endswith("norm.weight")
            state[name] = values - 1 if added else values
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        model.load_state_dict(state)
    return model


PROMPTS = ["Write a Python function that reverses a list", "What is a hash table?", "Say hello."]


def test_smollm2_agrees_with_its_dequantized_twin(smollm2):
    agrees_with_its_twin(smollm2, 2000)


@pytest.mark.slow
def test_qwen_agrees_with_its_dequantized_twin(qwen):
    agrees_with_its_twin(qwen, 1000)


@pytest.mark.slow
def test_gemma_agrees_with_its_dequantized_twin(gemma):
    agrees_with_its_twin(gemma, 1000, at_once=1000)  # past the edge of its window


def agrees_with_its_twin(path, tokens, at_once=500):
    import torch

    from pronk import SamplingParams
    from pronk.evaluate.corpus import default_corpus, encode

    twin = dequantized_twin(path)
    same, total, kl = 0, 0, 0.0
    with load(path, context=at_once) as model:
        ids = encode(default_corpus(), model.tokenizer, tokens)
        for start in range(0, tokens, at_once):
            part = ids[start : start + at_once]
            actual = torch.from_numpy(model.logits(part)).double().log_softmax(-1)
            with torch.no_grad():
                expected = twin(torch.tensor([part])).logits[0].double().log_softmax(-1)
            same += int((actual.argmax(-1) == expected.argmax(-1)).sum())
            kl += float((expected.exp() * (expected - actual)).sum())
            total += len(part)
        for prompt in PROMPTS:
            ids = model.encode(prompt)
            if model.has_chat_template:
                ids = model.render([{"role": "user", "content": prompt}])
            said = [piece.token for piece in model.generate(ids, SamplingParams(max_tokens=40))]
            logits = twin_logits(twin, ids + said)[len(ids) - 1 : -1]
            # Greedy text is the twin's own, but for what it itself nearly says as gladly.
            assert (logits.max(-1) - logits[np.arange(len(said)), said]).max() < 0.5, prompt
    print(f"top-1 agreement {same / total:.4f}, KL {kl / total:.6f} nats over {total} tokens")
    assert same / total >= 0.99
    assert kl / total < 0.005
