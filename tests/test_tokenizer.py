"""Tokenizers: exact ids, exact bytes, special tokens, and files that are refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    CHAT_TEMPLATE,
    CORPUS,
    SPECIAL,
    mixed_lines,
    tiny_dir,
    tiny_gguf,
)
from tokenizer_checks import TEXTS, check_round_trip, check_saved, load

from pronk.checkpoint.tokenizer import Tokenizer
from pronk.errors import CheckpointError, RequestError


def test_directory_and_gguf_agree(tmp_path: Path, hf_dir: Path) -> None:
    one, two = load(hf_dir), load(tiny_gguf(tmp_path / "m.gguf", hf_dir))
    for tokenizer in (one, two):
        check_round_trip(tokenizer)
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert tokenizer.chat_template == CHAT_TEMPLATE
    for text in TEXTS:
        assert one.encode(text) == two.encode(text)
        assert one.encode(text, parse_special=False) == two.encode(text, parse_special=False)
    check_saved(two, tmp_path / "saved")


def test_special_tokens_in_a_text_are_read_only_if_asked(hf_dir: Path) -> None:
    tokenizer = load(hf_dir)
    assert tokenizer.encode("<|im_end|>") == [2]
    spelled = tokenizer.encode("<|im_end|>", parse_special=False)
    assert 2 not in spelled and tokenizer.decode(spelled) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.token_bytes(2) == b"" and tokenizer.decode([2]) == ""
    assert tokenizer.decode([2], skip_special=False) == "<|im_end|>"


def test_begin_and_end_are_added_where_the_file_says(tmp_path: Path, hf_dir: Path) -> None:
    marks = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    tokenizer = load(tiny_gguf(tmp_path / "m.gguf", hf_dir, **marks))
    plain = tokenizer.encode("the dog", add_special=False)
    assert tokenizer.encode("the dog") == [1, *plain, 2]
    check_saved(tokenizer, tmp_path / "saved")


def test_every_end_is_known(tmp_path: Path, hf_dir: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", hf_dir, tokenizer__ggml__eot_token_id=0)
    assert load(path).eos_ids == {0, 2}
    load(path).save(tmp_path / "saved")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "saved" / file).write_bytes((hf_dir / file).read_bytes())
    assert load(tmp_path / "saved").eos_ids == {0, 2}


ENDS = [
    ("smollm", "<|eot_id|>"),
    ("llama4", "<|eot|>"),
    ("llama4", "<|end_of_text|>"),
    ("llama-bpe", "<|eom_id|>"),
    ("gpt-4o", "<|end|>"),
]


@pytest.mark.parametrize(("pre", "end"), ENDS)
def test_ends_of_turns_are_found_by_name(tmp_path: Path, hf_dir: Path, pre: str, end: str) -> None:
    by_id = {2: "<|im_end|>", 1: "<|im_start|>", 0: end}
    stored = json.loads((hf_dir / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(stored, key=stored.__getitem__)
    tokens[:3] = [by_id[id] for id in range(3)]
    fields = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__pre": pre}
    assert load(tiny_gguf(tmp_path / "m.gguf", hf_dir, **fields)).eos_ids == {0, 2}
    # A word that looks like one is none.
    kinds = [1, 3, 3, *[1] * (len(tokens) - 3)]
    path = tiny_gguf(tmp_path / "m.gguf", hf_dir, **fields, tokenizer__ggml__token_type=kinds)
    assert load(path).eos_ids == {2}


PRE = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "smaug-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama4": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001 (full-width marks are meant)
    "refact": None,
    "gpt-2": None,
    "olmo": None,
}


@pytest.mark.parametrize("pre", PRE)
def test_kinds_of_splitting_are_the_originals(tmp_path: Path, hf_dir: Path, pre: str) -> None:
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers

    original = tokenizers.Tokenizer.from_file(str(hf_dir / "tokenizer.json"))
    pattern = PRE[pre]
    if pattern is None:
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if pre == "refact":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        original.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        original.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer = load(tiny_gguf(tmp_path / "m.gguf", hf_dir, tokenizer__ggml__pre=pre))
    if pre in ("qwen2", "olmo"):
        original.normalizer = normalizers.NFC()
    original.model.ignore_merges = pre in ("llama-bpe", "tekken")
    for text in [*TEXTS, *CORPUS, *mixed_lines(500)]:
        assert tokenizer.encode(text, add_special=False) == original.encode(text).ids


def check_mixed_lines(
    tokenizer: Tokenizer, reference: Any, count: int = 5000, composes: bool = True
) -> None:
    for text in mixed_lines(count):
        ids = tokenizer.encode(text)
        assert ids == reference(text).input_ids, text
        # Qwen composes characters first; nothing else may change.
        composed = unicodedata.normalize("NFC", text) if composes else text
        assert tokenizer.decode(ids, skip_special=False) == composed
        added = {tokenizer.encode(token)[0]: token.encode() for token in SPECIAL}
        exact = b"".join(added.get(id) or tokenizer.token_bytes(id) for id in ids)
        assert exact == composed.encode()


def test_qwen2_ids_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AddedToken, Qwen2Tokenizer

    hf = tiny_dir(tmp_path / "hf", "qwen2")
    tokenizer = load(tiny_gguf(tmp_path / "m.gguf", hf, tokenizer__ggml__pre="qwen2"))
    stored = json.loads((hf / "tokenizer.json").read_text())["model"]
    reference = Qwen2Tokenizer(stored["vocab"], [tuple(pair) for pair in stored["merges"]])
    reference.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    check_mixed_lines(tokenizer, reference)
    # The end of a turn, and the end of a text, which the file does not name.
    assert tokenizer.eos_ids == {2, 0}


@pytest.mark.slow
def test_the_real_qwen_tokenizer(tmp_path: Path, qwen: Path) -> None:
    import gguf
    from transformers import AddedToken, Qwen2Tokenizer

    from pronk.serve.chat import render

    tokenizer = load(qwen)
    fields = gguf.GGUFReader(qwen).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    kinds = fields["tokenizer.ggml.token_type"].contents()
    reference = Qwen2Tokenizer(
        {token: id for id, token in enumerate(tokens)},
        [tuple(merge.split(" ")) for merge in merges],
        eos_token="<|im_end|>",
    )
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (3, 4):
            added = AddedToken(token, special=kind == 3, normalized=False)
            reference.add_tokens([added])
    assert reference.convert_tokens_to_ids("<|im_end|>") == 151645
    check_mixed_lines(tokenizer, reference)
    assert tokenizer.eos_ids == {151645, 151643}
    reference.chat_template = tokenizer.chat_template
    user, reply = {"role": "user", "content": "hi  \n"}, {"role": "assistant", "content": "Yes."}
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"zone": "string"}}}]
    for messages, extra in (
        ([user], {}),
        ([{"role": "system", "content": "Be brief."}, user, reply, user], {}),
        ([user], {"tools": tools}),
    ):
        expected = reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **extra
        )
        assert render(tokenizer.chat_template or "", messages, **extra) == expected
    check_saved(tokenizer, tmp_path / "saved")


@pytest.mark.parametrize("pre", ["default", "starcoder", "dbrx"])
def test_other_kinds_round_trip(tmp_path: Path, hf_dir: Path, pre: str) -> None:
    check_round_trip(load(tiny_gguf(tmp_path / "m.gguf", hf_dir, tokenizer__ggml__pre=pre)))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pre": "made-up"}, "unknown rule 'made-up'"),
    ({"model": "bert"}, "unknown model 'bert'"),
    ({"merges": ["ab"]}, "no pair"),
    ({"merges": ["qqq zzz"]}, "cannot load"),
    ({"merges": None}, "without merges"),
    ({"tokens": ["a"] * 320}, "twice"),
    ({"tokens": [f"t{i}" for i in range(400)]}, "only 320"),
    ({"tokens": None}, "holds no tokenizer"),
    ({"token_type": [1, 2]}, "token types"),
    ({"eos_token_id": 320}, "eos token the id 320"),
    ({"bos_token_id": 2**31}, "bos token"),
    ({"model": "llama"}, "without a score"),
]


def test_broken_metadata_is_refused(tmp_path: Path, hf_dir: Path) -> None:
    for fields, words in BAD:
        keys = {f"tokenizer__ggml__{key}": value for key, value in fields.items()}
        with pytest.raises(CheckpointError, match=words) as caught:
            load(tiny_gguf(tmp_path / "m.gguf", hf_dir, **keys))
        assert "\n" not in str(caught.value)


def test_broken_directories_are_refused(tmp_path: Path, hf_dir: Path) -> None:
    for file in hf_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def refuse(name: str, text: str, words: str) -> None:
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)
        if before is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(before)

    refuse("tokenizer.json", "{}", "no tokenizer that Pronk can load")
    refuse("generation_config.json", '{"eos_token_id": [2, 320]}', "id 320")
    refuse("generation_config.json", '{"eos_token_id": ["2"]}', "special token the id 2")
    refuse("generation_config.json", '{"eos_token_id": [[2]]}', r"the id \[2\]")
    refuse("tokenizer_config.json", '{"bos_token": 7}', "bos_token")
    refuse("tokenizer_config.json", r'{"bos_token": "\ud800"}', "surrogates")
    refuse("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 7}]}',
           "chat_template")  # fmt: skip
    refuse("tokenizer_config.json", '{"chat_template": 7}', "chat_template")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load(tmp_path)


def test_ids_beyond_the_model_are_refused(tmp_path: Path, hf_dir: Path) -> None:
    for file in hf_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    vocab["z"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="id 5000"):
        load(tmp_path).encode("z")
    with pytest.raises(RequestError, match="out of range"):
        load(hf_dir).decode([320])
    with pytest.raises(RequestError, match="out of range"):
        load(hf_dir).decode([-1])
    with pytest.raises(RequestError, match="surrogate"):
        load(hf_dir).encode("\ud800")


def test_templates_beside_the_config(tmp_path: Path, hf_dir: Path) -> None:
    for file in hf_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": ["default"]},
        {"name": "default", "template": "one"},
    ]
    config["eos_token"] = {"content": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(tmp_path).chat_template == "one"
    assert load(tmp_path).eos_token == "<|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("two")
    assert load(tmp_path).chat_template == "two"


@pytest.mark.slow
def test_the_real_tokenizer_on_mixed_lines(smollm2: Path) -> None:
    import gguf
    import tokenizers
    from tokenizers import AddedToken, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = load(smollm2)
    fields = gguf.GGUFReader(smollm2).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    library = tokenizers.Tokenizer(models.BPE({t: id for id, t in enumerate(tokens)}, pairs))
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    kinds = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    library.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    reference = PreTrainedTokenizerFast(tokenizer_object=library)
    check_mixed_lines(tokenizer, reference, composes=False)


def test_the_real_tokenizer(tmp_path: Path, smollm2: Path) -> None:
    tokenizer = load(smollm2)
    check_round_trip(tokenizer)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert (tokenizer.bos_token, tokenizer.eos_ids) == ("<|im_start|>", {2})
    check_saved(tokenizer, tmp_path / "saved")
