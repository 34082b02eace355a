"""A sentence hidden in a long text, and whether a model finds it again (the passkey test).

After "needle in a haystack" and the passkey task of arXiv:2305.16300. A small model may find the
number and not say it well, so every question is scored in two ways: does the greedy answer hold
the number, and is the number more likely than others of its kind, were the sentence to be said.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pronk.errors import RequestError
from pronk.evaluate.positions import PartsModel, scored
from pronk.evaluate.windows import log_normalizer

__all__ = ["DEPTHS", "Cell", "Haystack", "Trial", "default_lengths", "find_needles", "make_trials"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the sentence is hidden: the share of the text before it."""

_PLACES = ("garden", "kitchen", "library", "harbour", "museum", "bakery", "station", "castle")
_SENTENCE = "The secret number of the {place} is {number}."
_QUESTION = (
    "What is the secret number of the {place}? It is somewhere in the text above. "
    "Answer with the number alone."
)
_LEAD = "The secret number of the {place} is"
_DIGITS = 5
_OTHERS = 7  # numbers that the right one is compared with
_SHORTEST = 128  # tokens: the question and some text
_ANSWER = 48  # tokens: of the greedy answer, and of the sentence to complete at most


class _Words(Protocol):
    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True
    ) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class _Asked(PartsModel, Protocol):
    @property
    def tokenizer(self) -> Any: ...
    @property
    def has_chat_template(self) -> bool: ...
    def render(self, messages: Sequence[Mapping[str, Any]], /) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text to hide a sentence in, as token ids without special ones."""

    ids: Sequence[int]

    def cut(self, start: int, tokens: int, words: _Words) -> str:
        """So many tokens from a place on, as text; it starts over where it ends."""
        at = start % len(self.ids)
        piece = list(self.ids[at : at + tokens])
        while len(piece) < tokens:
            piece += self.ids[: tokens - len(piece)]
        # A cut may go through a character.
        return words.decode(piece).strip("\ufffd \n")


@dataclass(frozen=True, slots=True)
class Trial:
    """One prompt with a hidden sentence.

    Attributes
    ----------
    length : int
        Tokens that the prompt may have; it has nearly as many.
    depth : float
        Share of the text before the sentence.
    prompt : list of int
    number : str
        What is asked for.
    endings : list of list of int
        The sentence to complete, with the right number and then with the others.
    """

    length: int
    depth: float
    prompt: list[int]
    number: str
    endings: list[list[int]]


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of the trials of one length and depth.

    Attributes
    ----------
    recall : float
        Share of the trials whose greedy answer holds the number.
    choice : float
        Share in which the number is more likely than every other one (by chance: 1 in 8).
    logprob : float
        Mean log-probability of the number, in nats, where the sentence is repeated.
    margin : float
        Mean of how far that is above the most likely other number.
    """

    length: int
    depth: float
    trials: int
    recall: float
    choice: float
    logprob: float
    margin: float

    def to_dict(self) -> dict[str, float | int]:
        """Plain data under stable names."""
        return {
            "length": self.length,
            "depth": self.depth,
            "trials": self.trials,
            "recall": self.recall,
            "choice": self.choice,
            "logprob": self.logprob,
            "margin": self.margin,
        }


def default_lengths(context: int) -> list[int]:
    """Prompt lengths up to the context, with room for an answer: an eighth, a quarter, half, all.

    Raises
    ------
    RequestError
        If the context is too short to hide anything in.
    """
    longest = context - _ANSWER
    lengths = sorted({max(context // part, _SHORTEST) for part in (8, 4, 2)} | {longest})
    if longest < _SHORTEST:
        raise RequestError(
            f"a context of {context} is too short to hide a sentence in: give "
            f"{_SHORTEST + _ANSWER} or more"
        )
    return [length for length in lengths if length <= longest]


def make_trials(
    model: _Asked,
    haystack: Haystack,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    needles: int = 1,
    seed: int = 0,
) -> Iterator[Trial]:
    """Prompts of every length and depth, `needles` of each; the same ones for the same seed.

    The question goes through the model's chat template where it has one.

    Raises
    ------
    RequestError
        If a length leaves no room for text, or a figure is out of range.
    """
    if needles < 1:
        raise RequestError(f"there must be at least 1 needle, not {needles}")
    for length in lengths:
        for depth in depths:
            for trial in range(needles):
                # Apart from the depth: what differs along a row of the table is the depth alone.
                draw = random.Random(f"{seed}/{length}/{trial}")
                yield _trial(model, haystack, length, depth, draw)


def _trial(
    model: _Asked, haystack: Haystack, length: int, depth: float, draw: random.Random
) -> Trial:
    words = model.tokenizer
    place = draw.choice(_PLACES)
    low = 10 ** (_DIGITS - 1)
    numbers = [str(n) for n in draw.sample(range(low, 10 * low), _OTHERS + 1)]
    start = draw.randrange(len(haystack.ids))
    sentence = _SENTENCE.format(place=place, number=numbers[0])
    question = _QUESTION.format(place=place)

    def prompt(tokens: int) -> list[int]:
        text = hide(haystack.cut(start, tokens, words), sentence, depth)
        if model.has_chat_template:
            return model.render([{"role": "user", "content": f"{text}\n\n{question}"}])
        return list(words.encode(f"{text}\n\nQuestion: {question}\nAnswer:", parse_special=False))

    tokens = length - len(prompt(0))
    ids = prompt(max(tokens, 0))
    while len(ids) > length and tokens > 0:  # text put together again may have more tokens
        tokens -= max(1, len(ids) - length)
        ids = prompt(max(tokens, 0))
    if tokens < 1:
        raise RequestError(f"{length} tokens are too few for a question in a text: give more")
    # A template that ends with the assistant's turn is followed by words, others by a space.
    space = "" if model.has_chat_template else " "
    lead = space + _LEAD.format(place=place)
    endings = [
        words.encode(f"{lead} {number}", add_special=False, parse_special=False)
        for number in numbers
    ]
    return Trial(length, depth, ids, numbers[0], endings)


def hide(text: str, sentence: str, depth: float) -> str:
    """The text with a sentence of its own paragraph between two of its lines, or at an end."""
    target = round(depth * len(text))
    breaks = [0, len(text), *(match.end() for match in re.finditer(r"\n+", text))]
    at = min(breaks, key=lambda place: (abs(place - target), place))
    parts = (text[:at].rstrip("\n"), sentence, text[at:].lstrip("\n"))
    return "\n\n".join(part for part in parts if part)


def find_needles(
    model: _Asked,
    trials: Sequence[Trial],
    eos: frozenset[int] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Ask for every hidden number, and give the figures of each length and depth.

    Parameters
    ----------
    model : Model
    trials : sequence of Trial
    eos : frozenset of int
        Tokens that end an answer.
    progress : callable, optional
        Called with the tokens read and the tokens to read.
    """
    found: dict[tuple[int, float], list[tuple[bool, float, float]]] = {}
    done, total = 0, sum(len(trial.prompt) for trial in trials)
    for trial in trials:
        found.setdefault((trial.length, trial.depth), []).append(_ask(model, trial, eos))
        done += len(trial.prompt)
        if progress is not None:
            progress(done, total)
    cells = []
    for (length, depth), results in found.items():
        n = len(results)
        margins = [right - other for _, right, other in results]
        cells.append(
            Cell(
                length,
                depth,
                n,
                recall=sum(said for said, _, _ in results) / n,
                choice=sum(margin > 0 for margin in margins) / n,
                logprob=sum(right for _, right, _ in results) / n,
                margin=sum(margins) / n,
            )
        )
    return cells


def _ask(model: _Asked, trial: Trial, eos: frozenset[int]) -> tuple[bool, float, float]:
    """Whether the number is said; its log-probability, and that of the likeliest other one.

    The prompt is run once: the answer, token by token, and then every ending follow it.
    """
    said: list[int] = []
    answered = False

    def endings() -> Iterator[list[int]]:
        nonlocal answered
        while said[-1] not in eos and len(said) < _ANSWER:
            yield said
        answered = True
        yield from trial.endings

    parts = model.logit_parts(trial.prompt, len(trial.prompt) - 1, endings())
    first = next(parts)[-1:]
    said.append(int(first[0].argmax()))
    scores: list[float] = []
    for part in parts:
        if answered:
            scores.append(_logprob(first, part, trial, len(scores)))
        else:
            said.append(int(part[-1].argmax()))
    text = re.sub(r"[ ,]", "", model.tokenizer.decode(said))
    return trial.number in text, scores[0], max(scores[1:])


def _logprob(first: Any, part: Any, trial: Trial, index: int) -> float:
    """Log-probability of an ending's tokens from where the endings differ."""
    ending = trial.endings[index]
    shared = 0
    while len({tuple(other[: shared + 1]) for other in trial.endings}) == 1:
        shared += 1
    total = 0.0
    for at, x, targets in scored(iter((first, part[:-1])), ending):
        for i, target in enumerate(targets):
            if at + i >= shared:
                total += float(x[i, target] - log_normalizer(x[i : i + 1])[0])
    return total
