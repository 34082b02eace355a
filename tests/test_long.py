"""Long contexts: logits in parts, perplexity by position, depth, and the verbs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from checkpoints import tiny_gguf, tiny_llama_dir
from test_cli import pronk, sentence

from pronk import load
from pronk.cli import main
from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.depth import compare, fill, format_depth, summarize
from pronk.evaluate.divergence import divergence
from pronk.evaluate.long_view import format_long, plot
from pronk.evaluate.perplexity import perplexity
from pronk.evaluate.positions import by_position, default_bucket, runs_of

IDS = [int(i) for i in np.random.default_rng(0).integers(1, 7, 200)]
POLICY = "window=64,global-every=2,sinks=4"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return tiny_gguf(folder / "tiny.gguf", tiny_llama_dir(folder / "hf"), "q4_1")


class Markov:
    """A model whose prediction is a function of the last token alone, in parts of 10 rows."""

    def __init__(self, seed: int, vocab: int = 7) -> None:
        self.table = np.random.default_rng(seed).standard_normal((vocab, vocab)) * 3

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.table[list(ids)].astype(np.float32)

    def logit_parts(
        self, ids: Sequence[int], first: int = 0, endings: Iterable[Sequence[int]] | None = None
    ) -> Iterator[np.ndarray]:
        rows = self.logits(ids)[first:]
        for at in range(0, len(rows), 10):
            yield rows[at : at + 10]

    def loss(self, before: int, token: int) -> float:
        row = self.table[before].astype(np.float32).astype(np.float64)
        return float(np.log(np.exp(row).sum()) - row[token])


# ---- logits in parts


@pytest.mark.parametrize("attention", [None, POLICY])
def test_parts_are_the_logits(tiny, attention):
    ids = [int(i) for i in np.random.default_rng(1).integers(3, 320, 300)]
    with load(tiny, threads=2, context=384, attention=attention) as model:
        whole = model.logits(ids)
        assert (np.concatenate(list(model.logit_parts(ids))) == whole).all()
        for first in (1, 130, 299):
            assert (np.concatenate(list(model.logit_parts(ids, first))) == whole[first:]).all()


@pytest.mark.parametrize("attention", [None, POLICY])
def test_endings_follow_the_ids_and_not_each_other(tiny, attention):
    rng = np.random.default_rng(2)
    ids = [int(i) for i in rng.integers(3, 320, 200)]
    endings = [[int(i) for i in rng.integers(3, 320, n)] for n in (70, 1, 33, 70)]
    with load(tiny, threads=2, context=384, attention=attention) as model:
        last, *parts = model.logit_parts(ids, len(ids) - 1, endings)
        assert (last == model.logits(ids)[-1:]).all()
        for ending, part in zip(endings, parts, strict=True):
            assert (part == model.logits([*ids, *ending])[len(ids) :]).all()


def test_an_ending_may_depend_on_the_one_before(tiny):
    with load(tiny, threads=1, context=64) as model:
        ids, said = model.encode("the quick brown fox"), []

        def endings():
            while len(said) < 6:
                yield said

        for part in model.logit_parts(ids, len(ids) - 1, endings()):
            said.append(int(part[-1].argmax()))
        pieces = model.generate(ids)
        assert said == [next(pieces).token for _ in range(6)]


def test_endings_that_do_not_fit(tiny):
    with load(tiny, threads=1, context=256) as model:
        free = model._engine.kv.free
        for length, ending in ((250, [5] * 7), (10, [5] * 129), (10, [5, 400]), (10, [])):
            parts = model.logit_parts([3] * length, length - 1, [[4], ending])
            assert len(next(parts)) == len(next(parts)) == 1
            with pytest.raises(RequestError):
                next(parts)
        held = model.logit_parts([3] * 200)
        next(held)
        held.close()
        assert model._engine.kv.free == free


# ---- perplexity by position


@pytest.mark.parametrize(("context", "bucket"), [(200, 30), (64, 16), (50, 50), (33, 8), (2, 1)])
def test_positions_in_closed_form(context, bucket):
    model = Markov(1)
    expected: dict[int, list[float]] = {}
    for start in range(0, len(IDS), context):
        run = IDS[start : start + context]
        for at in range(1, len(run)):
            expected.setdefault(at // bucket, []).append(model.loss(run[at - 1], run[at]))
    found = by_position(model, IDS, context, bucket)
    assert [b.start // bucket for b in found] == sorted(expected)
    for one in found:
        losses = expected[one.start // bucket]
        assert one.tokens == len(losses)
        assert one.nll == pytest.approx(np.mean(losses), rel=1e-9)
        assert one.perplexity == pytest.approx(math.exp(one.nll))
        assert one.stop == min(one.start + bucket, context)


def test_runs_start_as_the_text_does():
    assert runs_of([9, 1, 2, 3, 4, 5], 3, bos=9) == [[9, 1, 2], [9, 3, 4], [9, 5]]
    assert runs_of([9, 1, 2, 3, 4, 5], 3, bos=7) == [[9, 1, 2], [3, 4, 5]]
    assert runs_of([1, 2, 3, 4], 3) == [[1, 2, 3]]  # a token alone predicts nothing


def test_one_run_is_the_perplexity(tiny):
    with load(tiny, threads=2, context=256) as model:
        ids = model.encode("the quick brown fox jumps over the lazy dog " * 12)[:256]
        found = by_position(model, ids, 256)
        whole = perplexity(model, ids, 256, 254)
    assert sum(b.tokens for b in found) == whole.tokens
    assert sum(b.nll * b.tokens for b in found) / whole.tokens == pytest.approx(whole.nll)


def test_positions_that_cannot_be_scored():
    for size in ({"context": 1}, {"context": 10, "bucket": 0}, {"context": 10, "bucket": 11}):
        with pytest.raises(RequestError, match="must be"):
            by_position(Markov(1), IDS, **size)
    with pytest.raises(RequestError, match="too short"):
        by_position(Markov(1), [1], 10)
    small = Markov(1, 8)
    small.table = small.table[:, :7]
    with pytest.raises(CheckpointError, match="vocabulary ends at 6"):
        by_position(small, [*IDS[:5], 7], 10)
    assert default_bucket(8192) == 512
    assert default_bucket(2048) == 256
    assert default_bucket(64) == 8


# ---- depth


def test_comparing_in_closed_form():
    p, q = Markov(1), Markov(2)
    result = compare(p, q, IDS, 1)
    windows = divergence(p, q, IDS, 500)
    assert result.kl == pytest.approx(windows.kl, rel=1e-9)
    assert result.top1_agreement == pytest.approx(windows.top1_agreement)
    assert result.reference_perplexity == pytest.approx(perplexity(p, IDS, 500).perplexity)
    assert result.perplexity == pytest.approx(perplexity(q, IDS, 500).perplexity)
    part = compare(p, q, IDS, 150)
    losses = [q.loss(IDS[i - 1], IDS[i]) for i in range(150, 200)]
    assert (part.first, part.tokens) == (150, 50)
    assert part.perplexity == pytest.approx(math.exp(np.mean(losses)))
    same = compare(p, p, IDS, 100)
    assert (same.kl, same.top1_agreement) == (0, 1)
    for first in (0, 200):
        with pytest.raises(RequestError, match="compared"):
            compare(p, q, IDS, first)
    with pytest.raises(RequestError, match="vocabulary"):
        compare(p, Markov(1, 8), IDS, 1)


def test_a_text_that_fills_a_context():
    assert fill([9, 1, 2], 2) == [9, 1]
    assert fill([9, 1, 2], 6) == [9, 1, 2, 1, 2, 1]
    assert fill([9], 3) == [9, 9, 9]


def figures(**changes):
    one = {"kv": 100, "memory": {"kv": 100}, "peak_memory": 1000, "ttft": 1.0, "prefill": 50.0,
           "decode": 10.0}  # fmt: skip
    return {**one, **changes}


def test_ratios_are_of_rounds():
    rounds = [
        {"full": figures(decode=10.0), "policy": figures(kv=40, decode=30.0)},
        {"full": figures(decode=40.0), "policy": figures(kv=40, decode=60.0)},  # a fast spell
        {"full": figures(decode=12.0), "policy": figures(kv=40, decode=24.0)},
    ]
    found = summarize(rounds)
    assert found["rounds"] == 3
    assert found["variants"]["policy"]["decode"] == 30
    assert found["ratios"]["decode"] == 2
    assert found["ratios"]["kv"] == pytest.approx(0.4)
    assert found["ratios"]["prefill"] == 1
    quality = {"tokens": 50, "kl": 0.125, "top1_agreement": 0.9, "reference_perplexity": 4.0,
               "perplexity": 5.0}  # fmt: skip
    depth = {"context": 64, "attention": "window=8", "prompt_tokens": 60, "tokens": 4}
    lines = format_depth({**depth, **found, "quality": quality})
    decode = next(line for line in lines if "decode" in line)
    assert decode.split()[-3:] == ["12.0", "30.0", "2.00"]
    assert next(line for line in lines if "perplexity" in line).split()[-1] == "1.250"
    assert "0.1250 nats" in lines[-1]
    alone = summarize([{"full": figures()}])
    assert "ratios" not in alone
    text = "\n".join(format_depth({**depth, "attention": None, **alone}))
    assert "window" not in text and "ratio" not in text


# ---- the verbs


def test_bench_measures_at_the_depth_of_a_context_that_is_given(tiny):
    command = ("bench", tiny, "--runs", 2, "--tokens", 4, "--prompt-tokens", 20, "--json")
    assert "depth" not in json.loads(pronk(*command).stdout)
    assert "depth" not in json.loads(pronk(*command, "--context", 256, "--no-depth").stdout)
    depth = json.loads(pronk(*command, "--context", 256).stdout)["depth"]
    assert (depth["context"], depth["prompt_tokens"], depth["tokens"]) == (256, 252, 4)
    assert (depth["rounds"], depth["attention"], list(depth["variants"])) == (2, None, ["full"])
    full = depth["variants"]["full"]
    assert full["kv"] == full["memory"]["kv"] > 0
    assert full["peak_memory"] > 10_000_000
    assert full["prefill"] > 0 < full["decode"]


def test_bench_sets_a_policy_beside_full_attention(tiny):
    command = ("bench", tiny, "--runs", 1, "--tokens", 4, "--context", 512, "--attention", POLICY)
    depth = json.loads(pronk(*command, "--json").stdout)["depth"]
    full, policy = depth["variants"]["full"], depth["variants"]["policy"]
    assert depth["attention"] == POLICY
    assert depth["ratios"]["kv"] == pytest.approx(policy["kv"] / full["kv"])
    assert policy["kv"] < full["kv"]
    quality = depth["quality"]
    assert (quality["first"], quality["tokens"]) == (384, 128)
    assert quality["kl"] > 0
    assert 0 < quality["top1_agreement"] <= 1
    assert quality["perplexity"] != quality["reference_perplexity"]
    out = pronk(*command).stdout
    assert POLICY in out and "full attention" in out and "KL from full attention" in out


def test_a_policy_that_windows_everything_in_sight_changes_nothing(tiny):
    command = ("bench", tiny, "--runs", 1, "--tokens", 4, "--context", 128, "--json")
    quality = json.loads(pronk(*command, "--attention", "window=128").stdout)["depth"]["quality"]
    assert (quality["kl"], quality["top1_agreement"]) == (0, 1)
    assert quality["perplexity"] == quality["reference_perplexity"]


def test_eval_by_position(tiny):
    out = pronk("eval", tiny, "--positions", "--max-tokens", 600, "--json").stdout
    found = json.loads(out)
    assert (found["context"], found["bucket"]) == (512, 64)
    (one,) = found["variants"]
    assert (one["name"], one["attention"], one["rope_scaling"]) == ("as it is", None, None)
    assert sum(row["tokens"] for row in one["positions"]) == 598
    assert "needles" not in one
    with load(tiny, context=512) as model:
        from pronk.evaluate.corpus import default_corpus, encode

        ids = encode(default_corpus(), model.tokenizer, 600)
        same = by_position(model, ids, 512, 64, model.tokenizer.bos_id)
    assert one["positions"] == [bucket.to_dict() for bucket in same]


def test_eval_past_the_context_with_and_without_a_scaling(tiny):
    command = ("eval", tiny, "--positions", "--rope-scaling", "yarn:2", "--max-tokens", 700)
    found = json.loads(pronk(*command, "--context", 700, "--json").stdout)
    plain, scaled = found["variants"]
    assert (plain["rope_scaling"], scaled["rope_scaling"]) == ("none:2", "yarn:2")
    assert [p["tokens"] for p in plain["positions"]] == [p["tokens"] for p in scaled["positions"]]
    assert all(
        a["nll"] != b["nll"] for a, b in zip(plain["positions"], scaled["positions"], strict=True)
    )
    within = json.loads(pronk("eval", tiny, "--positions", "--max-tokens", 512, "--bucket", 88,
                              "--json").stdout)["variants"][0]["positions"]  # fmt: skip
    # Up to the model's own context nothing is changed.
    assert plain["positions"][:5] == within[:5]
    assert json.loads(pronk(*command, "--json").stdout)["context"] == 1024
    table = pronk(*command, "--context", 700).stdout
    assert "yarn:2" in table and "ratio" in table


def test_eval_of_long_contexts(tiny, tmp_path):
    drawn = tmp_path / "long.svg"
    command = ("eval", tiny, "--long", "--max-tokens", 400, "--needles", 1, "--attention", POLICY,
               "--threads", 1)  # fmt: skip
    out = pronk(*command, "--json", "--plot", drawn).stdout
    found = json.loads(out)
    plain, windowed = found["variants"]
    assert (plain["attention"], windowed["attention"]) == (None, POLICY)
    assert windowed["kv"] < plain["kv"]
    for one in found["variants"]:
        assert [(c["length"], c["depth"]) for c in one["needles"]] == [
            (n, d) for n in (128, 256, 464) for d in (0, 0.25, 0.5, 0.75, 1)
        ]
        assert all(0 <= c["recall"] <= 1 and c["logprob"] < 0 for c in one["needles"])
    # Up to the window they see the same, and no further.
    first, last = plain["positions"][0], plain["positions"][-1]
    assert windowed["positions"][0] == first
    assert windowed["positions"][-1]["nll"] != last["nll"]
    assert b"</svg>" in drawn.read_bytes()
    assert json.loads(pronk(*command, "--json").stdout) == found  # seeded
    other = json.loads(pronk(*command, "--json", "--seed", 1).stdout)
    assert other["variants"][0]["needles"] != plain["needles"]
    lines = format_long(found)
    assert sum("hidden numbers" in line for line in lines) == 2
    assert any(line.split()[:1] == ["464"] for line in lines)


@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_plots(tmp_path, suffix):
    rows = [
        {"start": 0, "stop": 8, "perplexity": 9.0, "nll": math.log(9), "tokens": 7},
        {"start": 8, "stop": 16, "perplexity": 5.0, "nll": math.log(5), "tokens": 8},
    ]
    draw = random.Random(0)
    cells = [
        {"length": n, "depth": d, "trials": 2, "recall": draw.random(), "choice": draw.random(),
         "logprob": -1.0, "margin": 2.0}
        for n in (100, 200) for d in (0.0, 1.0)
    ]  # fmt: skip
    variants = [
        {"name": "a", "positions": rows},
        {"name": "b", "positions": rows, "needles": cells},
    ]
    path = tmp_path / f"long.{suffix}"
    plot(path, "tiny", {"variants": variants})
    start = {"svg": b"<?xml", "png": b"\x89PNG", "html": b"<!doctype html>"}[suffix]
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_sentences(tiny, tmp_path):
    assert "--positions" in sentence("eval", tiny, "--context", 64)
    assert "--positions" in sentence("eval", tiny, "--plot", tmp_path / "a.svg")
    assert "a.pdf" in sentence("eval", tiny, "--long", "--plot", tmp_path / "a.pdf")
    assert "--reference" in sentence("eval", tiny, "--long", "--reference", tiny)
    assert "context" in sentence("eval", tiny, "--positions", "--context", 1)
    assert "[2, 512]" in sentence("eval", tiny, "--positions", "--context", 513)
    assert "bucket" in sentence("eval", tiny, "--positions", "--bucket", 0)
    assert "--needles" in sentence("eval", tiny, "--long", "--needles", 0)
    assert "176 or more" in sentence("eval", tiny, "--long", "--context", 100)
    assert "window" in sentence("eval", tiny, "--long", "--attention", "sinks=4")
    assert "window" in sentence("bench", tiny, "--context", 256, "--tokens", 4, "--attention", "x")


def test_a_child_that_fails_is_one_sentence(tiny):
    from pronk.device.child import run_json
    from pronk.errors import PronkError

    asked = {"model": str(tiny), "threads": 1, "context": 100_000, "tokens": 4, "kv": "bf16",
             "activations": "int12", "packed_cache": False, "attention": None,
             "rope_scaling": None}  # fmt: skip
    with pytest.raises(PronkError, match="failed: the context must be in"):
        run_json("pronk.commands.depth", [json.dumps(asked)])


@pytest.mark.slow
def test_smollm2_finds_numbers_and_a_window_alone_does_not(smollm2, capsys):
    """The real model, at lengths of which a window of 128 positions sees little."""

    def told(*words):
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    words = ("eval", smollm2, "--long", "--context", 1024, "--max-tokens", 2048)
    plain, windowed = told(*words, "--attention", "window=128,sinks=4")["variants"]

    def mean(one, key):
        cells = [c for c in one["needles"] if c["length"] > 500 and c["depth"] < 0.8]
        return sum(c[key] for c in cells) / len(cells)

    assert mean(plain, "recall") > 0.8
    assert mean(plain, "choice") > 0.9
    assert mean(windowed, "recall") < 0.2
    assert mean(windowed, "choice") < 0.6
    words = ("bench", smollm2, "--context", 1024, "--tokens", 8, "--runs", 1)
    depth = told(*words, "--attention", "window=128,global-every=4")["depth"]
    assert depth["ratios"]["kv"] < 0.6
    assert depth["quality"]["kl"] > 0.001
    assert depth["quality"]["perplexity"] > depth["quality"]["reference_perplexity"]
