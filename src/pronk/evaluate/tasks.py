"""Questions with known answers: what a task is, where it comes from, and how it is scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pronk.errors import RequestError
from pronk.evaluate.windows import log_normalizer

__all__ = ["BUILT_IN", "Answers", "Item", "Task", "answer", "likelihoods", "load_task", "split"]

BUILT_IN = ("facts", "cloze")
"""Tasks that come with Pronk: small, so they tell a broken model from a sound one, not two good
ones apart."""

_MOST_BYTES = 256 << 20
_MOST_CHOICES = 64
_TOGETHER = 64  # tokens of an ending that surely fit one step


@dataclass(frozen=True, slots=True)
class Item:
    """A text, how it may go on, and which of these is right.

    One ending: it is right when every token of it is the likeliest. Several: when the right one
    is the likeliest.
    """

    context: str
    endings: tuple[str, ...]
    gold: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one form.

    Attributes
    ----------
    name : str
    items : tuple of Item
    sha256 : str
        Of the items that are asked.
    """

    name: str
    items: tuple[Item, ...]
    sha256: str

    @property
    def choice(self) -> bool:
        """Whether there are several endings to choose from."""
        return len(self.items[0].endings) > 1

    @property
    def metric(self) -> str:
        """What its accuracy is, in words."""
        return "length-normalized choice" if self.choice else "greedy last word"


class _Words(Protocol):
    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True
    ) -> list[int]: ...


class _Asked(Protocol):
    @property
    def tokenizer(self) -> _Words: ...
    @property
    def context(self) -> int: ...
    def logit_parts(
        self, ids: Sequence[int], first: int = 0, endings: Iterable[Sequence[int]] | None = None, /
    ) -> Iterator[NDArray[Any]]: ...


def load_task(name: str, folder: Path | None = None, limit: int | None = None) -> Task:
    """A task by name or by file.

    Each line of a file is a JSON object: ``{"context", "continuation"}`` (a word is put behind
    the context) or ``{"query", "choices", "gold"}`` (choices are put behind the query, and where
    that holds a line ``Question:``, behind ``Answer:``). ``"delimiter"`` says otherwise.

    Parameters
    ----------
    name : str
        A file ending in ``.jsonl``, the name of one in `folder`, or one of `BUILT_IN`.
    folder : Path, optional
    limit : int, optional
        Take the first so many.

    Raises
    ------
    RequestError
        If there is no such task, or a line of it is not of these forms.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"the limit must be at least 1 question, not {limit}")
    if name.endswith(".jsonl"):
        lines, where = _read(Path(name)), name
    elif folder is not None and (folder / f"{name}.jsonl").is_file():
        lines, where = _read(folder / f"{name}.jsonl"), str(folder / f"{name}.jsonl")
    elif name in BUILT_IN:
        file = resources.files("pronk.evaluate") / "data" / f"{name}.jsonl"
        lines, where = file.read_text(encoding="utf-8").splitlines(), name
    else:
        raise RequestError(
            f"there is no task {name!r}: give a .jsonl file, the name of one in --task-dir, or "
            f"{' or '.join(BUILT_IN)}"
        )
    items: list[Item] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            items.append(_item(line, f"line {number} of {where}"))
        if len(items) == limit:
            break
    if not items:
        raise RequestError(f"the task {where} is empty")
    if len({len(item.endings) > 1 for item in items}) > 1:
        raise RequestError(f"the task {where} mixes continuations and choices: make two of it")
    asked = json.dumps([[item.context, item.endings, item.gold] for item in items])
    return Task(Path(name).stem, tuple(items), hashlib.sha256(asked.encode()).hexdigest())


def _read(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RequestError(f"the task {file} cannot be read: {error.strerror or error}") from None
    if len(data) > _MOST_BYTES:
        raise RequestError(f"the task {file} is larger than 256 MiB: give a part of it")
    try:
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"the task {file} is not UTF-8 (byte {error.start})") from None


def _item(line: str, where: str) -> Item:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise RequestError(f"{where} is not JSON") from None
    wanted = 'either {"context", "continuation"} or {"query", "choices", "gold"}'
    if not isinstance(data, dict):
        raise RequestError(f"{where} is no object: it must be {wanted}")
    delimiter = data.get("delimiter")
    if delimiter is not None and not isinstance(delimiter, str):
        raise RequestError(f'{where} has a "delimiter" that is no text')
    context, word = data.get("context"), data.get("continuation")
    if isinstance(context, str) and isinstance(word, str) and context and word:
        joined = " " + word.lstrip() if delimiter is None else delimiter + word
        return Item(context.rstrip() if delimiter is None else context, (joined,))
    query, choices, gold = data.get("query"), data.get("choices"), data.get("gold")
    if (
        not isinstance(query, str) or not query.strip()
        or not isinstance(choices, list) or not 2 <= len(choices) <= _MOST_CHOICES
        or not all(isinstance(one, str) and one.strip() for one in choices)
    ):  # fmt: skip
        raise RequestError(f"{where} must be {wanted}, with text that is not empty")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise RequestError(f'{where} needs "gold", the place of the right one of its choices')
    if delimiter is None:
        query = query.rstrip()
        asks = query.rpartition("\n")[2].startswith("Question:")
        query, delimiter = query + "\nAnswer:" * asks, " "
        choices = [one.strip() for one in choices]
    return Item(query, tuple(delimiter + one for one in choices), gold)


@dataclass(slots=True)
class Answers:
    """What a model made of the questions of a task; a list entry a question, in their order.

    Attributes
    ----------
    right : list of bool
        By the likelihood as it is: the likeliest choice, or every token of the continuation.
    right_normalized : list of bool
        Choices: by the log-likelihood over the bytes of the choice. Else the same.
    nll : list of float
        Negative log-likelihood of the right ending, in nats.
    cut : int
        Questions whose beginning was cut off, as they were longer than the context.
    """

    right: list[bool] = field(default_factory=list)
    right_normalized: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    cut: int = 0


def split(words: _Words, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, as the whole is cut.

    Spaces at the end of the context go to what follows: words begin with theirs. An empty
    context is the token that texts begin with, if the tokenizer has one.
    """
    kept = context.rstrip(" ")
    ending = context[len(kept) :] + ending
    before = words.encode(kept, parse_special=False) if kept else words.encode("")
    if not kept:
        return before, words.encode(ending, add_special=False, parse_special=False)
    both = words.encode(kept + ending, parse_special=False)
    # A token may reach over the border, even the last one of all: then it is the ending's.
    border = min(len(before), len(both) - 1)
    return both[:border], both[border:]


def likelihoods(
    model: _Asked, context: Sequence[int], endings: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Log-likelihood of each ending, and whether all of it is what greedy decoding gives.

    The context is run once for all endings; what of it does not fit is cut off at its front.
    """
    longest = max(map(len, endings))
    room = model.context - longest + 1
    if room < 1 or not context:
        raise RequestError(
            f"an ending of {longest} tokens, and something before it, do not fit the context "
            f"of {model.context}"
        )
    context = list(context[-room:])
    if longest > _TOGETHER:
        return [_alone(model, context, ending) for ending in endings]
    # All but an ending's last token are run behind the context; those of one token need no run.
    runs = [list(ending[:-1]) for ending in endings if len(ending) > 1]
    parts = model.logit_parts(context, len(context) - 1, runs)
    first = next(parts)[-1:]
    found = []
    for ending in endings:
        logits = first if len(ending) < 2 else np.concatenate([first, next(parts)])
        found.append(_score(logits, ending))
    return found


def _alone(model: _Asked, context: Sequence[int], ending: Sequence[int]) -> tuple[float, bool]:
    """Of an ending too long for one step behind a context that is kept."""
    total, greedy, at = 0.0, True, 0
    for part in model.logit_parts([*context, *ending[:-1]], len(context) - 1):
        more, likeliest = _score(part, ending[at : at + len(part)])
        total, greedy, at = total + more, greedy and likeliest, at + len(part)
    return total, greedy


def _score(logits: NDArray[Any], targets: Sequence[int]) -> tuple[float, bool]:
    x = logits.astype(np.float64)
    total = float((x[np.arange(len(x)), targets] - log_normalizer(x)).sum())
    return total, bool((x.argmax(axis=1) == targets).all())


def answer(model: _Asked, task: Task, answers: Answers) -> Iterator[int]:
    """Ask a model every question of a task that `answers` does not have yet.

    Parameters
    ----------
    model : Model
    task : Task
    answers : Answers
        Grows by a question at a time.

    Yields
    ------
    int
        Questions answered so far.
    """
    for item in task.items[len(answers.right) :]:
        pairs = [split(model.tokenizer, item.context, ending) for ending in item.endings]
        # Cut with its ending, a context may differ by a token from one choice to the next.
        together = len({tuple(context) for context, _ in pairs}) == 1
        if together:
            scores = likelihoods(model, pairs[0][0], [ending for _, ending in pairs])
        else:
            scores = [likelihoods(model, context, [ending])[0] for context, ending in pairs]
        answers.cut += any(len(c) + len(e) - 1 > model.context for c, e in pairs)
        totals = [total for total, _ in scores]
        gold = item.gold
        if len(scores) == 1:
            right = normal = scores[0][1]
        else:
            sizes = [len(ending.strip().encode()) for ending in item.endings]
            right = int(np.argmax(totals)) == gold
            normal = int(np.argmax(np.divide(totals, sizes))) == gold
        answers.right.append(right)
        answers.right_normalized.append(normal)
        answers.nll.append(-totals[gold])
        yield len(answers.right)
