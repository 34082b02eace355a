"""Logits against Hugging Face transformers: tiny random models, and the real one."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_gguf, tiny_llama_dir

from pronk import load

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


def test_mistral_agrees_with_transformers(tmp_path):
    import torch
    from checkpoints import tiny_tokenizer
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        sliding_window=None, initializer_range=0.1)  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    expected = transformers_logits(tmp_path, IDS)
    with load(tmp_path, context=256, kv_dtype="f32") as model:
        actual = model.logits(IDS)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
def test_a_bundle_runs_alike_in_transformers(tmp_path, tied):
    from pronk.checkpoint.bundle import write_bundle
    from pronk.checkpoint.open import open_checkpoint
    from pronk.compress.quantize import RoundToNearest

    source = tiny_llama_dir(tmp_path / "hf", tie_word_embeddings=tied)
    formats = {"head": "q8_0", "attention": "q4_1", "gate_up": "q4_0", "down": "q4_1"}
    with open_checkpoint(source) as checkpoint:
        out = write_bundle(
            checkpoint, formats, tmp_path / "out", quantize=RoundToNearest(), meta={}
        )
    expected = transformers_logits(out, IDS)
    with load(out, context=256, kv_dtype="f32") as model:
        assert not model.conversions
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


def dequantized_twin(path):
    """A transformers model with the weights of a GGUF file in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pronk.checkpoint.open import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        config = LlamaConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size, num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
            rms_norm_eps=spec.norm_eps, max_position_embeddings=spec.context_length,
            tie_word_embeddings=spec.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        state = {}
        for name, info in checkpoint.tensors.items():
            state[name] = torch.from_numpy(checkpoint.read_float(name).reshape(info.shape))
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        model.load_state_dict(state)
    return model


def test_smollm2_agrees_with_its_dequantized_twin(smollm2):
    import torch

    from pronk.evaluate.corpus import default_corpus, encode

    twin = dequantized_twin(smollm2)
    same, total, kl = 0, 0, 0.0
    with load(smollm2, context=500) as model:
        ids = encode(default_corpus(), model.tokenizer, 2000)
        for start in range(0, 2000, 500):
            part = ids[start : start + 500]
            actual = torch.from_numpy(model.logits(part)).double().log_softmax(-1)
            with torch.no_grad():
                expected = twin(torch.tensor([part])).logits[0].double().log_softmax(-1)
            same += int((actual.argmax(-1) == expected.argmax(-1)).sum())
            kl += float((expected.exp() * (expected - actual)).sum())
            total += len(part)
    print(f"top-1 agreement {same / total:.4f}, KL {kl / total:.6f} nats over {total} tokens")
    assert same / total >= 0.99
    assert kl / total < 0.005
