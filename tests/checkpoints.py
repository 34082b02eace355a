"""Tiny checkpoints for tests: the same random weights as a Hugging Face directory and as GGUF."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from gguf_layout import gguf_metadata, gguf_tensors

CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun",
    "once upon a time there was a model that ran on one small machine, and it ran well",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "there is no thing in the house that the house does not need, is there?",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# ruff: disable[RUF001]
_PIECES = [
    *(line + "\n" for text in CORPUS for line in text.split("\n")),
    *["    for i in range(10):\n", "return x[::-1]", "/* C++ */ a->b != c;", "#include <x>\r\n"],
    *[
        "你好，世界！",
        "机器学习模型",
        "日本語のテキスト、かな",
        "한국어 문장",
        "สวัสดี",
        "नमस्ते",
        "مرحبا",
        "שלום",
    ],
    *[
        "🙂",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "👍🏽",
        "é",
        "e\u0301",
        "ñ",
        "Å",
        "\u212b",
        "ﬁ",
        "½",
        "²",
        "٣",
        "ⅷ",
    ],
    *[" ", "  ", "   ", " " * 17, "\t", "\t\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000"],
    *[
        "it's",
        "WE'RE",
        "'S",
        "don't",
        "’s",
        "3.14",
        "1234567",
        "0x1F",
        "10_000",
        "a1b2",
        "𝔘",
        "\u200b",
    ],
    *["...", "!?", "--", "://", "$\\alpha$", "</s>", "\ufeff", *SPECIAL],
]
# ruff: enable[RUF001]


def mixed_lines(count: int) -> list[str]:
    """Texts of code, scripts, emoji, whitespace runs and random characters; always the same."""
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        pieces = rng.choices(_PIECES, k=rng.randint(1, 12))
        for at in range(len(pieces)):
            if rng.random() < 0.1:
                code = rng.choice([rng.randrange(0x20, 0x2FFF), rng.randrange(0x3000, 0x20000)])
                pieces[at] = chr(code) if not 0xD800 <= code < 0xE000 else "?"
        lines.append(rng.choice(["", " "]).join(pieces))
    return lines


def tiny_tokenizer(path: Path, vocab_size: int = 320) -> None:
    """Write a byte-level BPE tokenizer (SmolLM2's layout) of at most `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|im_end|>",
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 512,
            }
        )
    )


_MPT = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
    "intermediate_size": "",
    "num_key_value_heads": "",
}
"""MPT's names of the usual fields; it has none for the last."""


def tiny_llama_dir(path: Path, **config: Any) -> Path:
    """`tiny_dir` of a Llama."""
    return tiny_dir(path, "llama", **config)


def tiny_dir(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard: str | None = None,
    **config: Any,
) -> Path:
    """Write a random tiny model as a Hugging Face directory and return the directory.

    `family` is its model type, `config` overrides fields of its config; `dtype` is that of the
    stored weights and `shard` a maximal shard size such as "50KB".
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if family == "llama":  # others derive it, and their files leave it out
        fields["head_dim"] = 16
    if family == "mistral":
        fields["sliding_window"] = None
    fields.update(config)
    fields = {_MPT.get(key, key) if family == "mpt" else key: v for key, v in fields.items()}
    fields = {key: value for key, value in fields.items() if key}
    middle = 0.0 if family.startswith("gemma") else 1.0  # what its norms start at
    path = Path(path)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 1:  # norms start at one and biases at zero: hide no mistake
                    weight.normal_(middle if "norm" in name else 0.0, 0.2)
    finally:
        torch.random.set_rng_state(state)
    extra = {} if shard is None else {"max_shard_size": shard}
    model.to(getattr(torch, dtype)).save_pretrained(path, **extra)
    tiny_tokenizer(path, min(fields["vocab_size"], 320))
    return path


def hf_tensors(hf_dir: Path) -> dict[str, np.ndarray]:
    """Every stored tensor of a Hugging Face directory as float32."""
    from safetensors.torch import load_file

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(Path(hf_dir).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = tensor.float().numpy()
    return tensors


def tiny_gguf(path: Path, hf_dir: Path, dtype: str = "f32", **metadata: Any) -> Path:
    """Write the weights and tokenizer of `hf_dir` as the GGUF file `path`, and return it.

    `dtype` is the type of the matrices; vectors stay F32. `metadata` overrides keys, with
    ``__`` for ``.`` (``general__architecture="mamba"``); None leaves a key out.
    """
    import gguf

    path, hf_dir = Path(path), Path(hf_dir)
    config = json.loads((hf_dir / "config.json").read_text())
    arch, values = gguf_metadata(config)
    values = {"general.name": "tiny", **values}
    values.update(_tokenizer_metadata(hf_dir, config["vocab_size"]))
    values.update({key.replace("__", "."): value for key, value in metadata.items()})
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", arch))
    writer.data_alignment = values.get("general.alignment", 32)
    for key, value in values.items():
        _add(writer, key, value)
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    for name, weight in gguf_tensors(config, hf_tensors(hf_dir)).items():
        if weight.ndim == 1 or dtype == "f32" or "ffn_gate_inp" in name:
            writer.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))
        else:
            blocks = _blocks(np.ascontiguousarray(weight), kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _blocks(weight: np.ndarray, kind: Any) -> np.ndarray:
    """Blocks of a GGUF type; those of K-quants, which `gguf` cannot write, are of other values."""
    import gguf

    # Factors of the scales that make the values about as large as weights are.
    factors = {"Q4_K": {0: 2.5e-4, 2: 2e-3}, "Q5_K": {0: 1.2e-4, 2: 2e-3}, "Q6_K": {208: 7e-5}}
    if kind.name not in factors:
        return gguf.quants.quantize(weight, kind)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(weight.shape)
    blocks = rng.integers(0, 256, (*weight.shape[:-1], weight.shape[-1] // size, nbytes), np.uint8)
    for at, factor in factors[kind.name].items():
        scales = (factor * rng.uniform(0.5, 1, blocks.shape[:-1])).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1)


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tokenizer_metadata(hf_dir: Path, vocab_size: int) -> dict[str, Any]:
    stored = json.loads((hf_dir / "tokenizer.json").read_text())
    by_id = {id: token for token, id in stored["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in stored["added_tokens"]}
    by_id.update(special)
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            3 if id in special else 1 if id in by_id else 5 for id in range(vocab_size)
        ],
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
