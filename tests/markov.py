"""A model in closed form for tests of evaluation, and its words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

VOCAB = 11
IDS = [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 400)]


class Letters:
    """One token a letter from a to k."""

    bos_id = None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return [(ord(c) - ord("a")) % VOCAB for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


class Markov:
    """A model whose prediction is a function of the last token alone; counts its runs."""

    context = 100
    tokenizer = Letters()

    def __init__(self, seed: int, blur: float = 0.0, part: int = 5) -> None:
        rng = np.random.default_rng(1)
        self.table = rng.standard_normal((VOCAB, VOCAB)) * 2
        self.table += blur * np.random.default_rng(seed).standard_normal(self.table.shape)
        self.part, self.runs = part, 0

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return np.concatenate(list(self.logit_parts(ids)))

    def logit_parts(
        self, ids: Sequence[int], first: int = 0, endings: Iterable[Sequence[int]] | None = None
    ) -> Iterator[np.ndarray]:
        self.runs += 1
        rows = self.table[list(ids)][first:].astype(np.float32)
        for at in range(0, len(rows), self.part):
            yield rows[at : at + self.part]
        for ending in endings or ():
            yield self.table[list(ending)].astype(np.float32)

    def log_p(self) -> np.ndarray:
        table = self.table.astype(np.float32).astype(np.float64)
        return table - np.log(np.exp(table).sum(axis=1, keepdims=True))


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)
