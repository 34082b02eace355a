"""Comparing variants: scores in one pass, paired tests, tasks, resuming, and the report."""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_gguf, tiny_llama_dir
from markov import IDS, Letters, Markov, write
from test_parity import dequantized_twin

from pronk import cli, load
from pronk.errors import CheckpointError, RequestError
from pronk.evaluate.compare import Reading, Variant, ask_all, score_all, take_turns
from pronk.evaluate.corpus import default_corpus, encode
from pronk.evaluate.kept import Kept
from pronk.evaluate.perplexity import perplexity
from pronk.evaluate.report import front, make_report
from pronk.evaluate.report_page import page
from pronk.evaluate.report_text import format_report, markdown, seen_from, sentence
from pronk.evaluate.scores import Scores, score_window
from pronk.evaluate.svg import Point, mark, scatter, ticks
from pronk.evaluate.tasks import BUILT_IN, load_task
from pronk.evaluate.windows import windows


def test_one_pass_scores_many_models():
    # Parts of other sizes, one that gives a window at once, and one that comes twice.
    class Whole:
        def __init__(self, model):
            self.logits = model.logits

    exact, near, far = Markov(0), Markov(1, 0.3, part=3), Markov(2, 1.0)
    for window in windows(IDS, 64, 20):
        found = score_window(window, [near, Whole(far), exact, near], exact)
        rows = window.ids[window.first : window.first + len(window.targets)]
        p = exact.log_p()[rows]
        for scores, model in zip(found, (near, far, exact, near), strict=True):
            q = model.log_p()[rows]
            assert scores.nll == pytest.approx(-q[np.arange(len(rows)), window.targets])
            assert scores.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1), abs=1e-12)
            assert (scores.same == (p.argmax(axis=1) == q.argmax(axis=1))).all()
        assert (found[2].kl == 0).all()
    runs = len(list(windows(IDS, 64, 20)))
    assert (exact.runs, near.runs) == (runs, runs)


def test_logits_that_are_missing_are_said_to_be():
    class Short(Markov):
        def logit_parts(self, ids, first=0, endings=None):
            yield self.table[list(ids)][first:-2]

    with pytest.raises(CheckpointError, match="too few logits"):
        score_window(next(windows(IDS, 16)), [Short(0)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("compare") / "tiny")


def transformers_nll(model, ids, window, stride, bos):
    """The strided loop of the documentation of transformers, in its own words and nothing else."""
    import torch

    total, scored, begin = 0.0, 1, 0
    while scored < len(ids):
        lead = [bos] if begin and bos is not None and ids[0] == bos else []
        end = min(begin + window - len(lead), len(ids))
        inputs = torch.tensor([[*lead, *ids[begin:end]]])
        labels = inputs.clone()
        fresh = end - scored
        labels[:, : inputs.shape[1] - fresh] = -100
        with torch.no_grad():
            total += model(inputs, labels=labels).loss.item() * fresh
        scored, begin = end, begin + stride
    return total / (len(ids) - 1)


@pytest.mark.parametrize("window", [64, 200])
def test_perplexity_is_that_of_transformers(tiny, window):
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(tiny).eval()
    with load(tiny, context=window, threads=1) as model:
        words = model.tokenizer
        ids = encode(default_corpus(), words, 500)
        ours = perplexity(model, ids, window, window // 2, words.bos_id)
    theirs = transformers_nll(twin, ids, window, window // 2, words.bos_id)
    assert ours.perplexity == pytest.approx(math.exp(theirs), rel=1e-3)


@pytest.mark.slow
def test_perplexity_of_a_real_model_is_that_of_transformers(smollm2):
    twin = dequantized_twin(smollm2)
    with load(smollm2, context=512) as model:
        words = model.tokenizer
        ids = encode(default_corpus(), words, 800)
        ours = perplexity(model, ids, 512, 256, words.bos_id)
    theirs = transformers_nll(twin, ids, 512, 256, words.bos_id)
    assert ours.perplexity == pytest.approx(math.exp(theirs), rel=1e-3)


NAMES = {"exact": 0.0, "near": 0.2, "far": 1.0}


def variants() -> list[Variant]:
    return [Variant(n, f"/m/{n}", f"hash of {n}", {"bytes": 100 - 10 * i, "bits": 8 - i})
            for i, n in enumerate(NAMES)]  # fmt: skip


class Shelf:
    """Loads models, counts loads and what is open at once, and may break down."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.loads: list[str] = []
        self.windows = self.open = self.most = 0
        self.breaks_after = breaks_after

    @contextmanager
    def __call__(self, variant: Variant):
        self.loads.append(variant.name)
        shelf = self

        class Counted(Markov):
            def logit_parts(self, *args):
                shelf.windows += 1
                if shelf.breaks_after is not None and shelf.windows > shelf.breaks_after:
                    raise KeyboardInterrupt
                return super().logit_parts(*args)

        self.open += 1
        self.most = max(self.most, self.open)
        try:
            yield Counted(len(variant.name), NAMES[variant.name])
        finally:
            self.open -= 1


READING = Reading("letters", IDS, 40, 400, 64, 32, None)


def score(shelf, kept, groups=None, reading=READING, engine=None):
    every = variants()
    groups = groups or [every]
    return score_all(
        groups, every[0], reading, shelf, kept, engine or {}, lambda what, done, total: None
    )


def test_scores_do_not_depend_on_groups():
    every = variants()
    together, apart = Shelf(), Shelf()
    one = score(together, Kept(None))
    two = score(apart, Kept(None), [every[:2], every[2:]])
    assert all((one[n].nll == two[n].nll).all() and (one[n].kl == two[n].kl).all() for n in NAMES)
    assert (together.most, apart.most) == (3, 2)
    assert apart.loads == ["exact", "near", "exact", "far"]
    assert len(one["far"]) == len(IDS) - 1


def test_an_interrupted_run_goes_on(tmp_path):
    plan = len(READING.windows())
    whole = score(Shelf(), Kept(None))
    broken = Shelf(breaks_after=10)
    with pytest.raises(KeyboardInterrupt):
        score(broken, Kept(tmp_path))
    assert broken.open == 0
    again = Shelf()
    found = score(again, Kept(tmp_path))
    assert again.windows == 3 * (plan - 3), "three windows were finished, and are kept"
    assert all((found[n].nll == whole[n].nll).all() for n in NAMES)
    nothing = Shelf()
    score(nothing, Kept(tmp_path))
    assert not nothing.loads
    # Another text, protocol or engine is another result; a damaged one is none.
    other = Reading("letters", IDS[:-1], 40, 400, 64, 32, None)
    for changes in ({"reading": other}, {"engine": {"isa": "b"}}):
        shelf = Shelf()
        score(shelf, Kept(tmp_path), **changes)
        assert len(shelf.loads) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    damaged = Shelf()
    score(damaged, Kept(tmp_path))
    assert damaged.windows == 3 * plan


def test_questions_go_on_too(tmp_path):
    rows = [{"context": "abc" * i, "continuation": "d", "delimiter": ""} for i in range(1, 9)]
    task = load_task(write(tmp_path / "w.jsonl", *rows))
    kept = Kept(tmp_path / "kept")

    def ask(shelf):
        return ask_all(variants(), [task], shelf, kept, {}, lambda *_: None)

    with pytest.raises(KeyboardInterrupt):
        ask(Shelf(breaks_after=11))
    shelf = Shelf()
    found = ask(shelf)
    assert (shelf.windows, shelf.loads) == (24 - 11, ["near", "far"])
    assert [len(a.right) for a in found["w"].values()] == [8, 8, 8]


def test_speed_is_measured_in_turns(tmp_path):
    asked: list[str] = []

    def measure(variant):
        asked.append(variant.name)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return {"decode": float(len(asked))}

    def turns():
        return take_turns(variants(), 2, measure, Kept(tmp_path), {"cpu": "x"}, lambda *_: None)

    with pytest.raises(KeyboardInterrupt):
        turns()
    found = turns()
    assert asked == ["exact", "near", "far", "exact", "near", "exact", "near", "far"]
    assert [r["exact"]["decode"] for r in found] == [1.0, 6.0]


def test_models_of_other_words_are_refused():
    @contextmanager
    def load_one(variant):
        model = Markov(0)
        if variant.name == "far":
            model.tokenizer = type("Other", (Letters,), {"encode": lambda *a, **k: [1]})()
        yield model

    with pytest.raises(RequestError, match="far and exact cut a text into other tokens"):
        score(load_one, Kept(None))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    every = variants()
    sensitive = {"model.layers.0.mlp.up_proj.weight": {"int4": 0.1, "int8": 0.01}, "x": "bad"}
    told = {"sensitivity": sensitive, "prediction": {"kl": 0.0125, "measured_kl": 0.01}}
    every[1] = Variant("near", "/m/near", "hash of near", {**every[1].facts, **told})
    rows = [{"query": "abcdefghijk"[i % 9 :], "choices": ["a", "bc", "d"], "gold": i % 3}
            for i in range(40)]  # fmt: skip
    task = load_task(write(folder / "odd<name>.jsonl", *rows))
    scores = score(Shelf(), Kept(None))
    answers = ask_all(every, [task], Shelf(), Kept(None), {}, lambda *_: None)
    bench = {"decode": 10.0, "prefill": 100.0, "ttft": 0.1, "load_time": 1.0, "peak_memory": 10**8}
    rounds = [{n: {**bench, "decode": 10.0 + i + turn} for i, n in enumerate(NAMES)}
              for turn in range(3)]  # fmt: skip
    return make_report(every, every[0], READING, scores, [task], answers, rounds,
                       about={"machine": {"cpu": "<cpu>"}, "versions": {"pronk": "1"}})  # fmt: skip


def test_the_report_says_what_was_measured(report):
    exact, near, far = report["variants"]
    log_p = Markov(5, NAMES["exact"]).log_p()
    assert exact["nll"] == pytest.approx(-log_p[IDS[:-1], IDS[1:]].mean())
    assert exact["perplexity"]["value"] == pytest.approx(math.exp(exact["nll"]))
    assert exact["word_perplexity"] == pytest.approx(math.exp(exact["nll"] * 399 / 40))
    assert exact["bits_per_byte"] == pytest.approx(exact["nll"] * 399 / 400 / math.log(2))
    assert exact["kl"]["value"] == 0
    assert 0 < near["kl"]["low"] < near["kl"]["value"] < far["kl"]["value"]
    growth = far["perplexity"]["value"] / exact["perplexity"]["value"] - 1
    assert far["growth"]["value"] == pytest.approx(growth)
    assert far["speed"] == {"rounds": 3, "decode": 13.0, "decode_low": 12.0, "decode_high": 14.0,
                            "prefill": 100.0, "ttft": 0.1, "load_time": 1.0,
                            "peak_memory": 10**8}  # fmt: skip
    assert [len(tests) for tests in report["tests"].values()] == [3, 1, 3]
    test = next(t for t in report["tests"]["perplexity"] if (t["a"], t["b"]) == ("exact", "far"))
    assert test["value"] == pytest.approx(growth)
    assert test["adjusted"] >= test["p"]
    assert json.loads(json.dumps(report)) == report


def test_sentences_claim_what_the_test_shows():
    test = {"a": "x", "b": "y", "value": 0.008, "low": 0.006, "high": 0.01, "p": 2e-4,
            "adjusted": 4e-4}  # fmt: skip
    assert sentence("perplexity", test, 0.05) == (
        "y is worse than x: +0.80% perplexity [+0.60%, +1.00%], p < 0.001"
    )
    turned = seen_from(test, "y", "perplexity")
    assert (turned["a"], turned["b"], turned["value"]) == ("y", "x", pytest.approx(1 / 1.008 - 1))
    assert turned["low"] < turned["value"] < turned["high"]
    assert sentence("arc", {**test, "value": 0.02}, 0.05).startswith("y is better than x: +2.0 p")
    doubtful = {**test, "adjusted": 0.051}
    assert sentence("kl", doubtful, 0.05).startswith("no difference is shown between y and x")
    same = dict.fromkeys(("value", "low", "high"), 0.0)
    assert sentence("perplexity", {**test, **same}, 0.05) == "y equals x (perplexity)"


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 9.0, "small"), (2.0, 9.5, "beaten"), (3.0, 5.0, "middle"), (4.0, 5.0, "even"),
              (9.0, 4.0, "best")]  # fmt: skip
    assert front(points) == ["small", "middle", "best"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_believes_nothing(report):
    text = page(report)
    found = Page(text)
    assert not found.links
    assert "://" not in text
    assert not {"script", "link", "img", "iframe", "name", "cpu"} & set(found.tags)
    # Four plots, and the sensitivity of one variant; the others are marks beside names.
    assert found.tags.count("svg") - text.count('<svg class="dot"') == 5
    assert "odd<name>" in found.text
    assert "prefers-color-scheme:dark" in text
    assert "0.mlp.up_proj" in found.text
    assert "predicted to cost 0.0125 nats, and cost 0.0100" in found.text
    report["variants"][1]["prediction"] = {"kl": "<b>", "measured_kl": 1}
    assert "predicted to cost" not in page(report)
    shown = [*format_report(report), markdown(report)]
    assert all(name in line for name in NAMES for line in shown[-1:])
    assert "| near | 0.0 |" in shown[-1].replace("0.00009", "0.0")


def test_plots_keep_their_marks_inside():
    points = [Point("a", 1e6, 3.0, 0, (9e5, 2e6), (2.0, 4.0)), Point("<b>", 5e8, 90.0, 1)]
    svg = scatter(points, "x", "y", ["a", "<b>"], x_log=True, y_log=True)
    assert "<b>" not in svg
    marks = re.findall(r'class="shape" d="[^"]*" transform="translate\((\S+) (\S+)\)"', svg)
    assert len(marks) == 2
    assert all(0 < float(at) < 560 and 0 < float(up) < 360 for at, up in marks)
    assert scatter(points[:1], "x", "y").count('class="shape"') == 1
    assert len({mark(i) for i in range(32)}) == 32
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(1e-4, 1.0, log=True) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_names_cross_neither_the_front_nor_each_other():
    """Names of 6.4 pixels a letter, as they are placed."""
    sizes = {"three": 59, "four": 76, "four, tuned": 76.5, "eight": 143, "eight, static": 144,
             "float32": 538}  # fmt: skip
    growth = [37, 8, 6, 0.15, 0.05, 0]
    points = [
        Point(name, size, lost, i, y_range=(lost - 1, lost + 1))
        for i, ((name, size), lost) in enumerate(zip(sizes.items(), growth, strict=True))
    ]
    svg = scatter(points, "MB", "%", list(sizes), x_log=True)
    at, front = svg.split('class="front" d="M')[1].split('"')[0].split("H", 1)
    x, y = map(float, at.split())
    lines = []
    for step in front.split("H"):
        across, down = map(float, step.split("V"))
        lines += [
            (min(x, across), y, max(x, across), y),
            (across, min(y, down), across, max(y, down)),
        ]
        x, y = across, down
    names = re.findall(r'class="name (\w+)" x="(\S+)" y="(\S+)">([^<]+)<', svg)
    assert len(names) == len(points)
    boxes = []
    for anchor, held, base, name in names:
        left = float(held) - 6.4 * len(name) * ("start", "middle", "end").index(anchor) / 2
        boxes.append((left, float(base) - 9, left + 6.4 * len(name), float(base)))
    for i, a in enumerate(boxes):
        for b in (*lines, *boxes[:i]):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (names[i], b)


def run(*words: str) -> int:
    return cli.main(["compare", *words, "--threads", "1", "--no-packed-cache"])


def test_the_verb_compares_and_keeps(tiny, tmp_path, capsys):
    other = tiny_llama_dir(tmp_path / "other", seed=1)
    folder = tmp_path / "report"
    words = (str(tiny), f"second={other}", "--max-tokens", "200", "--window", "64", "--limit", "4",
             "--rounds", "1", "--report", str(folder),
             "--plot", str(tmp_path / "p.html"))  # fmt: skip
    assert run(*words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "report.json").read_text()) == shown
    assert [row["name"] for row in shown["variants"]] == ["tiny", "second"]
    assert shown["variants"][0]["bits"] == pytest.approx(32, rel=0.1)
    assert shown["variants"][1]["kl"]["value"] > 0.1
    assert shown["variants"][0]["speed"]["peak_memory"] > 10**7
    assert set(shown["tasks"]) == set(BUILT_IN)
    assert (tmp_path / "p.html").read_text() == (folder / "report.html").read_text()
    # Everything is there: nothing is measured again, and the same is said.
    before = {f.name: f.stat().st_mtime_ns for f in (folder / "results").iterdir()}
    assert run(*words) == 0
    assert {f.name: f.stat().st_mtime_ns for f in (folder / "results").iterdir()} == before
    text = capsys.readouterr().out
    assert "second" in text
    assert "perplexity" in text
    # A third model is the reference, though it is not among those given.
    third = tiny_llama_dir(tmp_path / "third", seed=2)
    assert run(*words, "--reference", str(third), "--rounds", "0", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["reference"] == shown["variants"][0]["name"] == "third"
    assert run(*words, "--reference", "second", "--tasks", "none", "--rounds", "0", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["reference"], len(shown["variants"])) == ("second", 2)


def test_another_way_to_run_is_another_result(tmp_path, capsys, monkeypatch):
    hf = tiny_llama_dir(tmp_path / "hf")
    models = [str(tiny_gguf(tmp_path / f"{dtype}.gguf", hf, dtype)) for dtype in ("q8_0", "q4_1")]
    thresholds = tmp_path / "some.json"
    asked = []

    def bench(module, words):
        asked.append(words)
        return dict.fromkeys(("ttft", "prefill", "decode", "load_time", "peak_memory"), 1.0)

    monkeypatch.setattr("pronk.device.child.run_json", bench)
    found = []
    for options, least in (
        ([], 0), (["--activations", "int8"], 0), (["--sparse-mlp", str(thresholds)], 0.01),
        (["--sparse-mlp", str(thresholds)], 0.02),
    ):  # fmt: skip
        thresholds.write_text(json.dumps({"thresholds": [least]}))
        words = (*models, "--max-tokens", "100", "--window", "64", "--tasks", "none", "--rounds",
                 "1", "--report", str(tmp_path / "report"), "--json")  # fmt: skip
        assert run(*words, *options) == 0
        shown = json.loads(capsys.readouterr().out)
        found.append(shown["variants"][1]["perplexity"]["value"])
        assert len(asked) == 2, "speed was not measured anew"
        for words in (asked.pop(), asked.pop()):
            assert all(option in words for option in options), words
            assert "--no-packed-cache" in words
    assert len(set(found)) == len(found), found


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["{tiny}"], "needs two models"),
        (["{tiny}", "{tiny}"], "two models are called 'tiny'"),
        (["a={tiny}", "b={tiny}", "--window", "2"], "window must be at least 3"),
        (["a={tiny}", "b={tiny}", "--max-tokens", "1"], "--max-tokens must be 2"),
        (["a={tiny}", "b={tiny}", "--rounds", "-1"], "--rounds"),
        (["a={tiny}", "b={tiny}", "--plot", "x.png"], "must end in .html"),
        (["a={tiny}", "b={tiny}", "--tasks", "no-such"], "there is no task 'no-such'"),
        (["a={tiny}", "b={tiny}", "--tasks", "facts,facts"], "a name of its own"),
        (["a={tiny}", "b={tiny}", "--text", "missing.txt"], "does not exist"),
        (["a={tiny}", "missing"], "missing"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(tiny, tmp_path, capsys, monkeypatch, words, why):
    monkeypatch.chdir(tmp_path)
    assert run(*(word.format(tiny=tiny) for word in words)) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_joining_no_scores():
    assert len(Scores.join([])) == 0
