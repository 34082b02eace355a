"""Sentences hidden in a text: where they lie, and whether a model finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pronk.errors import RequestError
from pronk.evaluate.needle import Haystack, default_lengths, find_needles, hide, make_trials


class Reader:
    """A model of characters that finds the number in the last `sight` of them, or makes one up."""

    bos = 0

    def __init__(self, sight: int, template: bool = False) -> None:
        self.sight, self.has_chat_template, self.tokenizer = sight, template, self
        self.read = 0

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        assert not parse_special
        return [ord(c) % 128 for c in text]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(map(chr, ids))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return [1, *(ord(c) % 128 for c in messages[0]["content"]), 2]

    def logit_parts(
        self, ids: Sequence[int], first: int = 0, endings: Iterable[Sequence[int]] | None = None
    ) -> Iterator[np.ndarray]:
        assert first == len(ids) - 1
        self.read += len(ids)
        text = self.decode(ids)
        seen = re.findall(r"The secret number of the \w+ is (\d+)\.", text[-self.sight :])
        number = seen[0] if seen else "00000"
        place = re.findall(r"secret number of the (\w+)\?", text)[-1]
        sayings = [
            f"{space}{words}{number}"
            for space in ("", " ")
            for words in ("", f"The secret number of the {place} is ")
        ]

        def row(said: str) -> np.ndarray:
            logits = np.zeros(128, np.float32)
            following = [s[len(said)] for s in sayings if s.startswith(said) and s != said]
            # It says the number where nothing was said yet; 3 ends an answer.
            logits[3 if not following else ord(following[0])] = 9
            return logits

        yield row("")[None]
        for ending in endings or ():
            said = self.decode(ending)
            yield np.array([row(said[: i + 1]) for i in range(len(said))])


TEXT = "\n".join(f"line {i} of a text that says nothing" for i in range(400))


@pytest.mark.parametrize("template", [False, True])
def test_a_sentence_is_found_where_it_is_seen(template):
    model = Reader(sight=900, template=template)
    haystack = Haystack(model.encode(TEXT, parse_special=False))
    trials = list(make_trials(model, haystack, [600, 2000], needles=3, seed=5))
    cells = find_needles(model, trials, frozenset({3}))
    assert [(c.length, c.depth) for c in cells] == [
        (length, depth) for length in (600, 2000) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    for cell in cells:
        seen = cell.length == 600 or cell.depth >= 0.75
        assert cell.trials == 3
        assert cell.recall == (1 if seen else 0), cell
        if seen:
            assert cell.choice == 1
            assert cell.margin > 5
            assert cell.logprob > -0.5  # five digits, each all but sure
    assert model.read == sum(len(t.prompt) for t in trials)  # a prompt is run once


def test_trials_are_what_they_say():
    model = Reader(0)
    haystack = Haystack(model.encode(TEXT, parse_special=False))
    trials = list(make_trials(model, haystack, [500, 1500], needles=2, seed=1))
    assert trials == list(make_trials(model, haystack, [500, 1500], needles=2, seed=1))
    assert trials != list(make_trials(model, haystack, [500, 1500], needles=2, seed=2))
    for trial in trials:
        assert 0.9 * trial.length < len(trial.prompt) <= trial.length
        text = model.decode(trial.prompt)
        assert text.count(f"is {trial.number}.") == 1
        before, behind = text[: text.rindex("\n\nQuestion")].split(f"is {trial.number}.")
        place = len(before) / (len(before) + len(behind))
        assert place == pytest.approx(trial.depth, abs=0.15)
        assert len({tuple(e) for e in trial.endings}) == 8
        assert model.decode(trial.endings[0]).endswith(f" is {trial.number}")


def test_hiding():
    text = "one\ntwo\n\nthree"
    assert hide(text, "X.", 0) == "X.\n\none\ntwo\n\nthree"
    assert hide(text, "X.", 0.4) == "one\n\nX.\n\ntwo\n\nthree"
    assert hide(text, "X.", 0.7) == "one\ntwo\n\nX.\n\nthree"
    assert hide(text, "X.", 1) == "one\ntwo\n\nthree\n\nX."
    assert hide("", "X.", 0.5) == "X."


def test_lengths_and_refusals():
    assert default_lengths(8192) == [1024, 2048, 4096, 8144]
    assert default_lengths(200) == [128, 152]
    with pytest.raises(RequestError, match="176 or more"):
        default_lengths(175)
    model = Reader(0)
    haystack = Haystack(model.encode(TEXT, parse_special=False))
    with pytest.raises(RequestError, match="too few"):
        list(make_trials(model, haystack, [100]))
    with pytest.raises(RequestError, match="needle"):
        list(make_trials(model, haystack, [1000], needles=0))


def test_a_haystack_starts_over():
    model = Reader(0)
    haystack = Haystack(model.encode("abcdef", parse_special=False))
    assert haystack.cut(4, 9, model) == "efabcdefa"
    assert haystack.cut(0, 0, model) == ""
