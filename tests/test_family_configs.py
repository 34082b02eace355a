"""Configs of families: ropes as transformers computes them, older layouts, refusals, spans."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import hf_tensors, tiny_dir, tiny_gguf
from engines import engine_step
from family_cases import CASES

from pronk.checkpoint.open import open_checkpoint
from pronk.errors import CheckpointError
from pronk.graph.rope import rope_frequencies
from pronk.spec import RopeSpec

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-stated": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
        "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 128,
        "short_factor": [1.0 + i / 4 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir(tmp_path_factory.mktemp("llama") / "hf", "llama", head_dim=16)


def change(path: Path, copy: Path, **fields: Any) -> Path:
    """A copy of a directory whose config has other fields; None leaves one out."""
    copy.mkdir(exist_ok=True)
    for file in path.iterdir():
        if file.name != "config.json":
            (copy / file.name).unlink(missing_ok=True)
            os.link(file, copy / file.name)
    config = json.loads((path / "config.json").read_text()) | fields
    config = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("name", ROPES)
def test_ropes_are_those_of_transformers(
    llama: Path, tmp_path: Path, name: str, layout: str
) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**ROPES[name], "rope_theta": 5e4}
    if layout == "old":
        base, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        fields = {"rope_parameters": None, "rope_theta": base,
                  "rope_scaling": {**rope, "type": kind}}  # fmt: skip
    else:
        fields = {"rope_parameters": rope}
    path = change(llama, tmp_path / "hf", **fields)
    config = AutoConfig.from_pretrained(path)
    length = 700  # beyond the original context, and beyond max_position_embeddings
    with open_checkpoint(path) as checkpoint:
        (spec,) = checkpoint.spec.ropes
        context = checkpoint.spec.context_length
    ours = rope_frequencies(spec, 16, length)
    if name == "default":
        wanted, factor = 1 / 5e4 ** (torch.arange(0, 16, 2) / 16), 1.0
    else:
        init = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]]
        wanted, factor = init(config, "cpu", seq_len=length)
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-5)
    assert spec.attention_factor == pytest.approx(factor)
    assert context == (1024 if name == "dynamic" else 512)


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn", "longrope"])
def test_ropes_of_gguf_are_those_of_the_config(llama: Path, tmp_path: Path, name: str) -> None:
    rope = {**ROPES[name], "rope_theta": 5e4}
    path = change(llama, tmp_path / "hf", rope_parameters=rope)
    file = tiny_gguf(tmp_path / "m.gguf", path)
    with open_checkpoint(path) as hf, open_checkpoint(file) as gguf:
        (ours,), (theirs,) = gguf.spec.ropes, hf.spec.ropes
        assert gguf.spec.context_length == hf.spec.context_length
    for context in (32, 512):
        np.testing.assert_allclose(
            rope_frequencies(ours, 16, context), rope_frequencies(theirs, 16, context), rtol=1e-6
        )
    assert ours.attention_factor == pytest.approx(theirs.attention_factor)


def test_gemma3_in_the_layout_of_its_first_files(tmp_path: Path) -> None:
    path = tiny_dir(tmp_path / "hf", "gemma3_text", num_hidden_layers=7, head_dim=16)
    with open_checkpoint(path) as checkpoint:
        new = checkpoint.spec
    old = change(
        path, tmp_path / "old", rope_parameters=None, layer_types=None, rope_theta=1e6,
        rope_local_base_freq=1e4, sliding_window_pattern=6, sliding_window=16,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    with open_checkpoint(old) as checkpoint:
        spec = checkpoint.spec
    assert new.ropes == (RopeSpec(theta=1e4), RopeSpec(theta=1e6))
    assert spec.ropes == (RopeSpec(theta=1e4), RopeSpec(theta=1e6, kind="linear", factor=8.0))
    assert [layer.window for layer in spec.layers] == [16] * 5 + [0, 16]
    assert [layer.rope for layer in spec.layers] == [0] * 5 + [1, 0]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'; Pronk knows Llama"),
    ("llama", {"rope_parameters": {"rope_type": "new"}}, "'new'; Pronk knows default, linear"),
    ("llama", {"hidden_act": "tanh"}, "'tanh'; Pronk knows silu"),
    ("mixtral", {"num_experts_per_tok": 9}, "experts of a token"),
    ("mixtral", {"num_local_experts": 5}, "calls for 5"),
    ("mixtral", {"num_local_experts": 10**9}, "number of experts"),
    ("mixtral", {"intermediate_size": 1 << 40}, "width of an expert"),
    ("gemma2", {"layer_types": ["mamba", "mamba"]}, "'mamba'; Pronk knows full_attention"),
    ("gemma2", {"layer_types": ["full_attention"]}, "each layer"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"sliding_window": "wide"}, "sliding_window"),
    ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.75}}, "partial_rotary_factor"),
    ("phi3", {"num_key_value_heads": 4}, "calls for"),
    ("mpt", {"no_bias": False}, "no_bias"),
    ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv"),
    ("mpt", {"attn_config": {"alibi": False}}, "alibi"),
    ("mpt", {"attn_config": []}, "attn_config"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmoe", {"num_local_experts": None, "num_experts": None}, "number of experts"),
    ("granite", {"logits_scaling": 0}, "logits_scaling"),
    ("granite", {"mlp_bias": True}, "mlp_bias"),
    ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
    ("llama4_text", {"floor_scale": 0}, "floor_scale"),
    ("llama4_text", {"intermediate_size": 32}, "calls for"),
]
MADE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 160},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def test_configs_that_are_refused(tmp_path: Path) -> None:
    for at, (family, fields, words) in enumerate(REFUSED):
        made = tmp_path / family
        if not made.exists():
            tiny_dir(made, family, **MADE.get(family, {}))
        with open_checkpoint(made) as checkpoint:
            assert checkpoint.spec.family == family
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(change(made, tmp_path / f"changed{at}", **fields))
        assert "\n" not in str(caught.value)


JUNK: tuple[Any, ...] = (None, -1, 2**70, "x", [], [None, []], {"rope_type": []}, True, 1e999)


@pytest.mark.parametrize("family", ["phi3", "gemma3_text", "mpt", "llama4_text", "qwen3_moe"])
def test_whatever_a_field_holds_is_refused_in_a_sentence(tmp_path: Path, family: str) -> None:
    made = tiny_dir(tmp_path / "hf", family, **MADE.get(family, {}))
    file = made / "config.json"
    config = json.loads(file.read_text())
    refused = 0
    for field in [*config, "rope_scaling", "layer_weights", "sliding_window", "no_rope_layers"]:
        for junk in JUNK:
            file.write_text(json.dumps({**config, field: junk}))
            try:
                open_checkpoint(made).close()
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > len(config)


GGUF_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"olmoe__expert_gating_func": 7}, "'7'; Pronk knows 1 \\(softmax\\)"),
    ("olmoe", {"olmoe__expert_used_count": 5}, "experts of a token"),
    ("olmoe", {"olmoe__expert_count": 3}, "shape"),
    ("olmoe", {"olmoe__expert_weights_scale": 2.5}, "expert_weights_scale"),
    ("olmoe", {"olmoe__attention__clamp_kqv": 8.0}, "clamp_kqv"),
    ("mpt", {"mpt__attention__max_alibi_bias": None}, "max_alibi_bias"),
    ("gemma2", {"gemma2__attention__sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma2", {"gemma2__attention__sliding_window_pattern": [True]}, "window pattern"),
    ("phi3", {"phi3__rope__dimension_count": 8}, "calls for"),
    ("phi3", {"phi3__attention__head_count_kv": 4}, "calls for"),
]


def test_files_that_are_refused(tmp_path: Path) -> None:
    for family, fields, words in GGUF_REFUSED:
        made = tmp_path / family
        if not made.exists():
            tiny_dir(made, family, **MADE.get(family, {}))
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(tiny_gguf(tmp_path / "m.gguf", made, **fields))
        assert "\n" not in str(caught.value)


def test_parts_of_one_matrix_lie_where_they_say(tmp_path: Path) -> None:
    path = tiny_dir(tmp_path / "hf", "phi3")
    for file in (path, tiny_gguf(tmp_path / "m.gguf", path, "q8_0")):
        with open_checkpoint(file) as checkpoint:
            for name, info in checkpoint.tensors.items():
                span = checkpoint.span(name)
                assert span is not None and not span.pairs, name
                raw = os.pread(span.fd, info.nbytes, span.offset)
                assert raw == checkpoint.read_rows(name, 0, info.rows).tobytes(), name
                assert info.rows * info.cols > 0 and len(raw) == info.nbytes


def test_transposed_experts_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_dir(tmp_path / "hf", "llama4_text", **MADE["llama4_text"])
    stored = hf_tensors(path)["model.layers.0.feed_forward.experts.gate_up_proj"]
    width = stored.shape[2] // 2
    gate, up = stored[:, :, :width].swapaxes(1, 2), stored[:, :, width:].swapaxes(1, 2)
    monkeypatch.setattr("pronk.checkpoint.rows._STRIP", 7 * 4 * stored.shape[1])  # 7 rows
    with open_checkpoint(path) as checkpoint:
        for start, stop in [(0, 2 * width), (3, 5), (width - 2, width + 9), (6, 8), (4, 4)]:
            for name, whole in (("gate", gate), ("up", up)):
                tensor = f"model.layers.0.mlp.experts.{name}_proj.weight"
                want = whole.reshape(-1, stored.shape[1])[start:stop]
                np.testing.assert_array_equal(checkpoint.read_float(tensor, start, stop), want)


def test_experts_one_by_one_in_files_of_old(tmp_path: Path) -> None:
    import gguf

    path = tiny_dir(tmp_path / "hf", "mixtral", num_local_experts=3)
    new = tiny_gguf(tmp_path / "new.gguf", path)
    reader = gguf.GGUFReader(new)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for key, part in reader.fields.items():
        if not key.startswith(("GGUF.", "general.", "tokenizer.")):
            writer.add_key_value(key, part.contents(), part.types[0])
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if "_exps" in tensor.name:
            for i, expert in enumerate(data):
                name = tensor.name.replace("_exps", "").replace(".weight", f".{i}.weight")
                writer.add_tensor(name, expert)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "old.gguf") as old, open_checkpoint(new) as checkpoint:
        assert old.spec.layers == checkpoint.spec.layers and old.spec.moe == checkpoint.spec.moe
        assert set(old.tensors) == set(checkpoint.tensors)
        for name in old.tensors:
            np.testing.assert_array_equal(old.read_float(name), checkpoint.read_float(name))


def test_the_largest_gemma_scales_scores_by_its_hidden_size(tmp_path: Path) -> None:
    for layers, scale in ((46, 64 / 4), (45, None)):  # as llama.cpp tells it from the others
        path = tiny_dir(
            tmp_path / f"{layers}", "gemma2", num_hidden_layers=layers, head_dim=32,
            query_pre_attn_scalar=32,
        )  # fmt: skip
        with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", path)) as checkpoint:
            assert checkpoint.spec.attention_scale == (scale and pytest.approx(scale**-0.5))


_EYE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
SEEING = {
    "gemma3_text": ("gemma3", _EYE),
    "llama4_text": ("llama4", _EYE | {
        "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        "intermediate_size": 128,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_the_text_model_of_one_that_also_sees(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = tiny_dir(tmp_path / "text", name, **CASES[name].config)
    inner = json.loads((text / "config.json").read_text())
    wrapper, eye = SEEING[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(wrapper, text_config=inner, vision_config=eye)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path / "both")
    ids = list(range(3, 40))
    # transformers' Llama 4 wants an image; its text model is whole, and Gemma's has no head.
    whole = model.language_model if wrapper == "llama4" else model
    with torch.no_grad():
        want = whole(input_ids=torch.tensor([ids])).logits[0].numpy()
    step = engine_step("graph", tmp_path / "both")
    got = step(ids, list(range(len(ids))), [0] * len(ids), list(range(len(ids))))
    assert np.abs(got - want).max() < 2e-4 * np.abs(want).max()

    fields = json.loads((tmp_path / "both" / "config.json").read_text())
    del fields["text_config"]
    (tmp_path / "both" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="has no text_config, which a "):
        open_checkpoint(tmp_path / "both")
