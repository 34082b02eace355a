"""Tasks: their files, and answers against likelihoods in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from markov import Letters, Markov, write

from pronk.errors import RequestError
from pronk.evaluate.tasks import BUILT_IN, Answers, answer, load_task, split


def test_the_simple_forms_of_tasks(tmp_path):
    task = load_task(write(tmp_path / "w.jsonl", {"context": "It was a ", "continuation": "dog"},
                           "", {"context": "a", "continuation": "b", "delimiter": ""}))  # fmt: skip
    assert [(i.context, i.endings) for i in task.items] == [("It was a", (" dog",)), ("a", ("b",))]
    assert not task.choice
    rows = [{"query": "Question: Is it?\n", "choices": ["yes", "no"], "gold": 1},
            {"query": "It is", "choices": [" a", "b "], "gold": 0}]  # fmt: skip
    write(tmp_path / "c.jsonl", *rows)
    task = load_task("c", tmp_path)
    assert task.choice
    assert task.items[0].context == "Question: Is it?\nAnswer:"
    assert [i.endings for i in task.items] == [(" yes", " no"), (" a", " b")]
    first = load_task("c", tmp_path, limit=1)
    assert (len(first.items), first.sha256 == task.sha256) == (1, False)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "is empty"),
        (["{"], "line 1 of .* is not JSON"),
        ([[1]], "is no object"),
        ([{"query": "q", "choices": ["a"], "gold": 0}], "must be either"),
        ([{"query": "q", "choices": ["a", ""], "gold": 0}], "must be either"),
        ([{"query": "q", "choices": ["a", "b"], "gold": 2}], '"gold"'),
        ([{"query": "q", "choices": ["a", "b"], "gold": True}], '"gold"'),
        ([{"context": "c", "continuation": ""}], "must be either"),
        ([{"context": "c", "continuation": "d", "delimiter": 3}], "delimiter"),
        ([{"context": "c", "continuation": "d"}, {"query": "q", "choices": ["a", "b"], "gold": 0}],
         "mixes"),
    ],
)  # fmt: skip
def test_tasks_that_are_none(tmp_path, rows, why):
    with pytest.raises(RequestError, match=why):
        load_task(write(tmp_path / "t.jsonl", *rows))


def test_tasks_that_cannot_be_read(tmp_path):
    with pytest.raises(RequestError, match="there is no task 'nothing'"):
        load_task("nothing", tmp_path)
    with pytest.raises(RequestError, match="cannot be read"):
        load_task(str(tmp_path / "missing.jsonl"))
    (tmp_path / "x.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(RequestError, match="not UTF-8"):
        load_task("x", tmp_path)
    with pytest.raises(RequestError, match="at least 1"):
        load_task("facts", limit=0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_tasks_are_sound(name):
    task = load_task(name)
    assert len(task.items) >= 40
    assert len({item.context for item in task.items}) == len(task.items)
    assert all(len(set(item.endings)) == len(item.endings) for item in task.items)
    if task.choice:  # guessing the same place is no good
        places = [sum(i.gold == g for i in task.items) for g in range(4)]
        assert max(places) - min(places) <= 1


def test_answers_are_those_of_the_likelihoods(tmp_path):
    model = Markov(0)
    log_p = model.log_p()
    words = Letters()

    def score(context, ending):
        ids = words.encode(context + ending)
        return sum(log_p[a, b] for a, b in zip(ids[len(context) - 1 :], ids[len(context) :],
                                               strict=False))  # fmt: skip

    choices = ["abc", "b", "cdefg", "kj"]
    rows = [{"query": q, "choices": choices, "gold": g, "delimiter": ""}
            for g, q in enumerate(("abca", "bb", "ck", "dd"))]  # fmt: skip
    found = Answers()
    task = load_task(write(tmp_path / "c.jsonl", *rows))
    assert list(answer(model, task, found)) == [1, 2, 3, 4]
    for i, row in enumerate(rows):
        totals = [score(row["query"], c) for c in choices]
        assert found.right[i] == (np.argmax(totals) == row["gold"])
        even = [t / len(c) for t, c in zip(totals, choices, strict=True)]
        assert found.right_normalized[i] == (np.argmax(even) == row["gold"])
        assert found.nll[i] == pytest.approx(-totals[row["gold"]], rel=1e-6)
    assert len({tuple(found.right), tuple(found.right_normalized)}) == 2, "both say the same"
    # A continuation is right if each token of it is the likeliest; a long one is run by itself.
    best = [0]
    for _ in range(70):
        best.append(int(log_p[best[-1]].argmax()))
    said = words.decode(best[1:])
    for text, right in ((said[:3], True), (said, True), (said[:-1] + "abcdefghijk"[best[-1] - 1],
                                                         False)):  # fmt: skip
        row = {"context": "a", "continuation": text, "delimiter": ""}
        found = Answers()
        list(answer(model, load_task(write(tmp_path / "w.jsonl", row)), found))
        assert (found.right, found.cut) == ([right], 0)
    long = {"context": "ab" * 80, "continuation": "c", "delimiter": ""}
    found = Answers()
    list(answer(model, load_task(write(tmp_path / "l.jsonl", long)), found))
    assert found.cut == 1


def test_a_token_over_the_border_is_the_endings():
    class Pairs(Letters):
        def encode(self, text, add_special=True, parse_special=True):
            return [ord(text[i]) for i in range(0, len(text), 2)]

    assert split(Pairs(), "abc", "d") == ([97], [99])
    assert split(Pairs(), "ab ", "cd") == ([97], [32, 100])
