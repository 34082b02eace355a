"""Several variants of a model on one text and the same questions, measured so that it can resume.

What is measured of a variant is kept under its hash, the text's and the protocol's: a run that
was cut short, or one with another variant more, measures only what is missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pronk.errors import RequestError
from pronk.evaluate.kept import Kept
from pronk.evaluate.scores import Scores, score_window
from pronk.evaluate.tasks import Answers, Task, answer
from pronk.evaluate.windows import Window, windows

__all__ = ["Reading", "Variant", "ask_all", "score_all", "take_turns"]

Progress = Callable[[str, int, int], None]

_SAVE = 20.0  # seconds between two savings


class _Model(Protocol):
    @property
    def tokenizer(self) -> Any: ...
    @property
    def context(self) -> int: ...
    def logits(self, ids: Sequence[int], /) -> NDArray[Any]: ...
    def logit_parts(
        self, ids: Sequence[int], first: int = 0, endings: Iterable[Sequence[int]] | None = None, /
    ) -> Iterator[NDArray[Any]]: ...


Load = Callable[["Variant"], AbstractContextManager[_Model]]


@dataclass(frozen=True, slots=True)
class Variant:
    """What is compared.

    Attributes
    ----------
    name : str
        What it is called in the report.
    path : str
    sha256 : str
        Of all that decides what it computes.
    facts : Mapping
        What else the report says of it.
    """

    name: str
    path: str
    sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as tokens, and how it is read; see `pronk.evaluate.windows.windows`.

    Attributes
    ----------
    text : str
        The name of the text.
    ids : sequence of int
    words, bytes : int
        In what the tokens spell, words between white space.
    window, stride : int
    bos : int or None
    """

    text: str
    ids: Sequence[int]
    words: int
    bytes: int
    window: int
    stride: int
    bos: int | None

    def windows(self) -> list[Window]:
        """What the models are given, and which tokens of it are scored."""
        return list(windows(self.ids, self.window, self.stride, self.bos))

    def to_dict(self) -> dict[str, Any]:
        """The protocol as plain data, for reports and as part of the name of what is kept."""
        ids = np.asarray(self.ids, np.int64)
        return {
            "text": self.text,
            "ids_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
            "tokens": len(self.ids) - 1,
            "words": self.words,
            "bytes": self.bytes,
            "window": self.window,
            "stride": self.stride,
            "bos": self.bos is not None and self.ids[0] == self.bos,
        }


def score_all(
    groups: Sequence[Sequence[Variant]],
    reference: Variant,
    reading: Reading,
    load: Load,
    kept: Kept,
    engine: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Scores]:
    """Every token of a text scored by every variant; by their names.

    Parameters
    ----------
    groups : sequence of sequence of Variant
        Those that are in memory together, beside the reference, which is run once a group.
        The reference is in one of them.
    reference : Variant
    reading : Reading
    load : callable
        Variant to a context manager of its model.
    kept : Kept
        Where results are saved, every 20 seconds and at the end, however that comes.
    engine : Mapping
        What else decides the results: version, instruction set.
    progress : callable
        Called with what is done, windows scored and windows to score.
    """
    plan = reading.windows()
    ends = np.cumsum([len(window.targets) for window in plan]).tolist()
    names = [variant.name for group in groups for variant in group]
    found: dict[str, list[Scores]] = {}
    for variant in (variant for group in groups for variant in group):
        arrays = kept.arrays("text", _text_facts(variant, reference, reading, engine))
        found[variant.name] = [Scores(**arrays)] if _sound(arrays, ends) else []
    done = {name: sum(map(len, found[name])) for name in names}
    total = len(names) * len(plan)
    scored = sum(end <= count for count in done.values() for end in ends)
    progress("scoring", scored, total)

    for group in groups:
        missing = [v for v in group if done[v.name] < ends[-1]]
        if not missing:
            continue

        def save(some: Sequence[Variant] = missing) -> None:
            for variant in some:
                scores = Scores.join(found[variant.name])
                found[variant.name] = [scores]
                if len(scores):
                    facts = _text_facts(variant, reference, reading, engine)
                    kept.keep_arrays("text", facts, {f: getattr(scores, f) for f in _FIELDS})

        with ExitStack() as stack:
            exact = stack.enter_context(load(reference))
            models = {
                v.name: stack.enter_context(load(v)) if v.name != reference.name else exact
                for v in missing
            }
            for variant in missing:
                _check_words(variant, models[variant.name], reference, exact, reading)
            saved = time.monotonic()
            stack.callback(save)
            for window, end in zip(plan, ends, strict=True):
                due = [v.name for v in missing if done[v.name] < end]
                if not due:
                    continue
                results = score_window(window, [models[name] for name in due], exact)
                # Together, so that an interruption leaves whole windows.
                for name, scores in zip(due, results, strict=True):
                    found[name].append(scores)
                    done[name] = end
                scored += len(due)
                progress("scoring", scored, total)
                if time.monotonic() - saved > _SAVE:
                    save()
                    saved = time.monotonic()
    return {name: Scores.join(found[name]) for name in names}


_FIELDS = ("nll", "kl", "same")


def _text_facts(
    variant: Variant, reference: Variant, reading: Reading, engine: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "variant": variant.sha256,
        "reference": reference.sha256,
        "reading": reading.to_dict(),
        "engine": dict(engine),
    }


def _sound(
    arrays: Mapping[str, NDArray[Any]] | None, ends: Sequence[int]
) -> TypeGuard[Mapping[str, NDArray[Any]]]:
    """Whether kept scores are of whole windows."""
    if arrays is None or sorted(arrays) != sorted(_FIELDS):
        return False
    sizes = {array.shape for array in arrays.values()}
    return len(sizes) == 1 and sizes.pop() in {(end,) for end in ends}


def _check_words(
    variant: Variant, model: _Model, reference: Variant, exact: _Model, reading: Reading
) -> None:
    if model is exact:
        return
    text = exact.tokenizer.decode(reading.ids[: min(len(reading.ids), 4096)])
    ours, theirs = (
        m.tokenizer.encode(text, add_special=False, parse_special=False) for m in (exact, model)
    )
    if ours != theirs:
        raise RequestError(
            f"{variant.name} and {reference.name} cut a text into other tokens: only variants of "
            "one model can be compared"
        )


def ask_all(
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    load: Load,
    kept: Kept,
    engine: Mapping[str, Any],
    progress: Progress,
) -> dict[str, dict[str, Answers]]:
    """Every question asked of every variant; by task and variant.

    The arguments are those of `score_all`.
    """
    found: dict[str, dict[str, Answers]] = {task.name: {} for task in tasks}
    total = len(variants) * sum(len(task.items) for task in tasks)
    done = 0
    for variant in variants:
        facts = {"variant": variant.sha256, "engine": dict(engine)}
        for task in tasks:
            data = kept.json("task", facts | {"task": task.sha256})
            found[task.name][variant.name] = Answers(**data) if data else Answers()
        done += sum(len(answers[variant.name].right) for answers in found.values())
        progress("asking", done, total)
        missing = [t for t in tasks if len(found[t.name][variant.name].right) < len(t.items)]
        if not missing:
            continue
        with load(variant) as model:
            for task in missing:
                answers = found[task.name][variant.name]
                before = done - len(answers.right)
                saved = time.monotonic()
                try:
                    for asked in answer(model, task, answers):
                        progress("asking", before + asked, total)
                        if time.monotonic() - saved > _SAVE:
                            kept.keep_json("task", facts | {"task": task.sha256}, asdict(answers))
                            saved = time.monotonic()
                finally:
                    kept.keep_json("task", facts | {"task": task.sha256}, asdict(answers))
                done = before + len(task.items)
    return found


def take_turns(
    variants: Sequence[Variant],
    rounds: int,
    measure: Callable[[Variant], dict[str, Any]],
    kept: Kept,
    facts: Mapping[str, Any],
    progress: Progress,
) -> list[dict[str, dict[str, Any]]]:
    """Rounds in which each variant is measured once, so that a slow spell meets them all.

    Parameters
    ----------
    variants : sequence of Variant
    rounds : int
    measure : callable
        Variant to the figures of one run.
    kept, progress
        See `score_all`. A round counts when it is complete.
    facts : Mapping
        What else decides the figures: machine, sizes.

    Returns
    -------
    list of dict
        A round each: figures by variant.
    """
    about = {"variants": [variant.sha256 for variant in variants], "facts": dict(facts)}
    done: list[dict[str, Any]] = kept.json("bench", about) or []
    for turn in range(len(done), rounds):
        one: dict[str, Any] = {}
        for i, variant in enumerate(variants):
            progress("measuring speed", turn * len(variants) + i, rounds * len(variants))
            one[variant.sha256] = measure(variant)
        done.append(one)
        kept.keep_json("bench", about, done)
    return [{v.name: one[v.sha256] for v in variants} for one in done[:rounds]]
