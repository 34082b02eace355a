"""Perplexity, divergence, texts and latency, on models in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.corpus import Corpus, default_corpus, encode, load_corpus
from pronk.evaluate.divergence import divergence
from pronk.evaluate.latency import latency
from pronk.evaluate.perplexity import perplexity
from pronk.evaluate.windows import windows
from pronk.spec import SamplingParams

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 7, 200)]


class Markov:
    """A model whose prediction is a function of the last token alone."""

    def __init__(self, seed: int, vocab: int = 7) -> None:
        self.table = np.random.default_rng(seed).standard_normal((vocab, vocab)) * 3
        self.longest = 0

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.longest = max(self.longest, len(ids))
        return self.table[list(ids)].astype(np.float32)

    def log_p(self) -> np.ndarray:
        table = self.table.astype(np.float32).astype(np.float64)
        return table - np.log(np.exp(table).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("window", "stride"), [(3, 1), (16, 8), (16, 14), (64, None), (500, 100)])
def test_perplexity_in_closed_form(window: int, stride: int | None) -> None:
    model = Markov(1)
    expected = -model.log_p()[IDS[:-1], IDS[1:]].mean()
    result = perplexity(model, IDS, window, stride)
    assert result.tokens == len(IDS) - 1
    assert result.nll == pytest.approx(expected, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(expected))
    assert model.longest <= window
    # With a begin token that every window repeats, the same tokens are scored.
    again = perplexity(model, IDS, window, stride, bos=IDS[0])
    assert again.tokens == result.tokens
    assert again.nll == pytest.approx(expected, rel=1e-12)


def test_uniform_model_and_shifted_logits() -> None:
    class Uniform:
        def logits(self, ids: Sequence[int]) -> np.ndarray:
            return np.full((len(ids), 7), 3e4, dtype=np.float32)

    assert perplexity(Uniform(), IDS, 32).perplexity == pytest.approx(7)


@pytest.mark.parametrize("bos", [None, 0])
def test_every_token_is_scored_once(bos: int | None) -> None:
    ids = list(range(100))
    seen: list[int] = []
    for part in windows(ids, 16, 10, bos):
        assert len(part.ids) <= 16
        for i, target in enumerate(part.targets):
            # The row that scores a token comes right after the token before it.
            assert part.ids[part.first + i] == target - 1
        assert len(part.ids) == part.first + len(part.targets) + 1 or part.ids[-1] == 99
        if bos is not None:
            assert part.ids[0] == bos
        seen += part.targets
    assert seen == ids[1:]


def test_divergence_in_closed_form() -> None:
    p, q = Markov(1), Markov(2)
    at = IDS[:-1]
    kl = (np.exp(p.log_p()) * (p.log_p() - q.log_p())).sum(axis=1)[at].mean()
    same = (p.table.argmax(axis=1) == q.table.argmax(axis=1))[at].mean()
    result = divergence(p, q, IDS, 32, 10)
    assert result.tokens == len(at)
    assert result.kl == pytest.approx(kl, rel=1e-10)
    assert result.top1_agreement == pytest.approx(same)
    itself = divergence(p, p, IDS, 32)
    assert (itself.kl, itself.top1_agreement) == (0, 1)


def test_divergence_where_the_reference_rules_a_token_out() -> None:
    p, q = Markov(1), Markov(2)
    p.table[:, 3] = -np.inf
    assert math.isfinite(divergence(p, q, IDS, 32).kl)
    assert divergence(q, p, IDS, 32).kl == math.inf


def test_models_that_cannot_be_scored() -> None:
    broken = Markov(1)
    broken.table[2, 2] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        perplexity(broken, IDS, 32)
    small = Markov(1, 8)
    small.table = small.table[:, :7]
    with pytest.raises(CheckpointError, match="vocabulary ends at 6"):
        perplexity(small, [*IDS[:5], 7], 32)
    with pytest.raises(RequestError, match="vocabulary"):
        divergence(Markov(1), Markov(1, 8), IDS, 32)
    for bad in ({"window": 2}, {"window": 8, "stride": 7}, {"window": 8, "stride": 0}):
        with pytest.raises(RequestError, match="must be"):
            perplexity(Markov(1), IDS, **bad)
    with pytest.raises(RequestError, match="too short"):
        perplexity(Markov(1), [1], 8)


class Characters:
    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        assert add_special and not parse_special
        return [1, *map(ord, text)]


def test_default_text_is_the_same_each_time() -> None:
    first = default_corpus()
    assert first == default_corpus() == load_corpus(None)
    assert first.name.startswith("python-3.")
    assert len(first.text) > 100_000


def test_encode_takes_the_first_tokens() -> None:
    assert encode(Corpus("x", "abc"), Characters()) == [1, 97, 98, 99]
    assert encode(Corpus("x", "abc" * 1000), Characters(), 3) == [1, 97, 98]
    with pytest.raises(RequestError, match="too short"):
        encode(Corpus("x", "abc"), Characters(), 1)


@pytest.mark.parametrize(
    ("data", "why"), [(None, "does not exist"), (b" \n", "is empty"), (b"ab\xff", "not UTF-8")]
)
def test_texts_that_cannot_be_read(tmp_path: Path, data: bytes | None, why: str) -> None:
    file = tmp_path / "text.txt"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(RequestError, match=why):
        load_corpus(file)
    with pytest.raises(RequestError, match="cannot be read"):
        load_corpus(tmp_path)


def test_text_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    assert load_corpus(file) == Corpus("text.txt", "grün")


class Clocked:
    """A model that takes 1 s for the first token and 0.25 s for each other one."""

    def __init__(self, tokens: int | None = None) -> None:
        self.now, self.tokens = 0.0, tokens
        self.prompts: list[list[int]] = []

    def generate(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        assert params.ignore_eos and params.temperature == 0 and params.max_tokens is not None
        # The first run of a process is slower.
        self.now += 1.0 if self.prompts else 9.0
        self.prompts.append(prompt)
        yield 0
        for _ in range((self.tokens or params.max_tokens) - 1):
            self.now += 0.25
            yield 0


def test_latency_by_definition() -> None:
    model = Clocked()
    result = latency(model, range(10), tokens=9, runs=3, clock=lambda: model.now)
    assert (result.ttft, result.decode, result.prefill) == (1.0, 4.0, 10.0)
    assert (result.prompt_tokens, result.tokens, result.runs) == (10, 9, 3)
    assert len(model.prompts) == 4
    assert len({tuple(prompt[:2]) for prompt in model.prompts}) == 4
    assert all(sorted(prompt) == list(range(10)) for prompt in model.prompts)


def test_latency_refuses() -> None:
    model = Clocked(tokens=3)
    with pytest.raises(RequestError, match="stopped after 3 of 9"):
        latency(model, [1, 2], tokens=9, clock=lambda: model.now)
    with pytest.raises(RequestError, match="at least 2 tokens"):
        latency(model, [1], tokens=1)
    with pytest.raises(RequestError, match="empty"):
        latency(model, [])
