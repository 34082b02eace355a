"""Pronk as a model of lm-evaluation-harness: against transformers, and on a task of files alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import CORPUS, tiny_llama_dir


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("harness") / "tiny")


@pytest.fixture(scope="module")
def lm(path):
    from pronk.evaluate.harness import PronkLM

    return PronkLM(str(path), threads=1, context=128)


@pytest.fixture(scope="module")
def exact(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def asked(*args):
    return SimpleNamespace(args=args)


def logprobs(exact, ids):
    import torch

    with torch.no_grad():
        return exact(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_loglikelihoods_are_those_of_transformers(lm, exact):
    words = lm.model.tokenizer
    pairs = [(CORPUS[0], " dog"), (CORPUS[0], " the sun sleeps"), ("", "once upon"),
             (CORPUS[1] + " ", "and more " * 18)]  # fmt: skip
    found = lm.loglikelihood([asked(*pair) for pair in pairs])
    for (context, ending), (total, greedy) in zip(pairs, found, strict=True):
        before = words.encode(context.rstrip()) or [words.bos_id]
        whole = words.encode(context + ending)
        after = whole[len(before) :] if context else whole
        table = logprobs(exact, [*before, *after])
        rows = range(len(before) - 1, len(before) + len(after) - 1)
        expected = sum(table[row, token].item() for row, token in zip(rows, after, strict=True))
        assert total == pytest.approx(expected, rel=2e-3)
        assert greedy == all(
            int(table[row].argmax()) == t for row, t in zip(rows, after, strict=True)
        )


def test_texts_longer_than_the_context_are_scored_token_by_token(lm, exact):
    text = "\n".join(CORPUS * 3)
    ids = lm.model.tokenizer.encode(text, add_special=False)
    assert len(ids) > 2 * lm.model.context
    (total,) = lm.loglikelihood_rolling([asked(text)])
    # Windows do not overlap but in the token that the first of each is predicted from.
    size = lm.model.context - 1
    expected = 0.0
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        seen = [ids[start - 1] if start else lm.model.tokenizer.bos_id, *part[:-1]]
        if len(part) < size and start:  # the last one is given a whole context
            seen = ids[len(ids) - size - 1 : -1]
        table = logprobs(exact, seen)[-len(part) :]
        expected += sum(table[i, token].item() for i, token in enumerate(part))
    assert total == pytest.approx(expected, rel=5e-3)


def test_answers_together_are_those_alone(lm):
    requests = [asked(text[:20], {"until": ["\n"], "max_gen_toks": 6}) for text in CORPUS]
    together = lm.generate_until(requests)
    assert together == [lm.generate_until([one])[0] for one in requests]
    assert any(together)
    long = asked("the dog " * 300, {"until": [], "max_gen_toks": 4})
    assert len(lm.model.tokenizer.encode(long.args[0])) > lm.model.context
    assert lm.generate_until([long])


TASK = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_a_task_of_local_files_agrees_with_ours(lm, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from pronk.evaluate.tasks import Answers, answer, load_task

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"query": CORPUS[i % 4][: 10 + i], "choices": ["dog", "a model", "the sun", "x"],
         "gold": i % 4, "delimiter": " "}
        for i in range(12)
    ]  # fmt: skip
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_words.yaml").write_text(TASK.format(data=data))
    result = lm_eval.simple_evaluate(
        lm, tasks=["local_words"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    mine = Answers()
    list(answer(lm.model, load_task(str(data)), mine))
    found = result["results"]["local_words"]
    assert found["acc,none"] == pytest.approx(sum(mine.right) / 12)
    assert math.isclose(found["acc_norm,none"], sum(mine.right_normalized) / 12)


def test_the_model_is_registered():
    from lm_eval.api.registry import get_model

    from pronk.evaluate.harness import PronkLM

    assert get_model("pronk") is PronkLM


def test_without_the_harness_one_sentence_says_what_to_install(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom pronk.errors import RequestError\n"
        "try: import pronk.evaluate.harness\nexcept RequestError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "pip install 'pronk[tasks]'" in done.stdout
