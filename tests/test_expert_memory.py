"""Experts that are read when they are chosen: the same logits, in the memory that was planned."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import tiny_dir, tiny_gguf, tiny_llama_dir
from engines import Held

import pronk.engine.packing as packing
from pronk import SamplingParams, _native, load
from pronk.checkpoint import packed_cache
from pronk.checkpoint.open import open_checkpoint
from pronk.cli import main
from pronk.errors import BudgetError, CheckpointError, RequestError
from pronk.evaluate.experts import expert_traffic
from pronk.graph.program import Limits, compile_program
from pronk.graph.slots import ExpertSet, plan_slots
from pronk.model import compile_checkpoint
from pronk.spec import LayerSpec, ModelSpec, MoeSpec

LAYERS, EXPERTS = 3, 12
IDS = [int(i) for i in np.random.default_rng(0).integers(3, 320, 90)]
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture(autouse=True)
def cache_of_everything(home, monkeypatch):
    """An empty cache that even a tiny model is kept in."""
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)
    monkeypatch.setattr(packed_cache, "_SPARE", 0)
    return home


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A directory whose experts are put together, and so packed, by Python."""
    return tiny_dir(
        tmp_path_factory.mktemp("moe"), "mixtral", num_local_experts=EXPERTS,
        num_hidden_layers=LAYERS, sliding_window=None)  # fmt: skip


@pytest.fixture(scope="module", params=["q4_0", "mxfp4", "hf"])
def path(request, moe, tmp_path_factory):
    """Experts as they lie in the file, others that are converted, and a directory."""
    if request.param == "hf":
        return moe
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", moe, request.param)


@pytest.fixture(scope="module")
def q4(moe, tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("q4") / "m.gguf", moe, "q4_0")


def layout_of(path, **limits):
    with open_checkpoint(path) as checkpoint:
        return compile_checkpoint(checkpoint, Limits(128, **limits)).layout


def opened(path, memory=None, **options):
    return load(path, context=128, expert_memory=memory, **options)


def slots_of(path, count):
    """Memory for so many experts, or a little more."""
    return count * max(one.nbytes for one in layout_of(path).experts) + 60


def held(model):
    return model._open().executor.experts_held


@pytest.mark.parametrize("count", [EXPERTS, 20, LAYERS * EXPERTS - 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_logits_are_those_of_experts_that_are_in_memory(path, count, threads):
    with opened(path) as model:
        expected = model.logits(IDS)
        said = [p.token for p in model.generate(IDS[:40], GREEDY)]
        assert (model.expert_reads().misses, model.expert_reads().hit_rate) == (0, 1.0)
    with opened(path, slots_of(path, count), threads=threads) as model:
        for _ in range(2):
            np.testing.assert_array_equal(model.logits(IDS), expected)
        assert [p.token for p in model.generate(IDS[:40], GREEDY)] == said
        reads = model.expert_reads()
        assert (reads.slots, reads.experts) == (count, LAYERS * EXPERTS)
        assert reads.misses > 0 < reads.hits
        one = layout_of(path).experts[0].nbytes
        assert reads.read == reads.misses * one
        ids = [i for i in held(model) if i >= 0]
        assert len(set(ids)) == len(ids) <= count


def test_company_does_not_matter(q4):
    prompts = [IDS[:30], IDS[30:75], IDS[10:12]]
    with opened(q4) as model:
        alone = [[p.token for p in model.generate(prompt, GREEDY)] for prompt in prompts]
    with opened(q4, slots_of(q4, EXPERTS + 1)) as model:
        runs = [model.generate(prompt, GREEDY) for prompt in prompts]
        together = [[] for _ in runs]
        for _ in range(GREEDY.max_tokens):
            for tokens, pieces in zip(together, runs, strict=True):
                tokens.append(next(pieces).token)
    assert together == alone


def test_tokens_may_go_to_fewer_experts(q4):
    with opened(q4, experts="0.4:1") as model:
        expected = model.logits(IDS)
    with opened(q4, slots_of(q4, EXPERTS), experts="0.4:1") as model:
        np.testing.assert_array_equal(model.logits(IDS), expected)


def test_the_file_is_the_same_whoever_writes_it(path, home):
    with opened(path) as model:
        assert model.packed_cache == "kept packed for the next start"
        losses = model.conversions
    (file,) = (home / "packed").glob("*.weights")
    whole = file.read_bytes()
    packed_cache.clear()
    with opened(path, slots_of(path, 13)) as model:
        assert model.conversions == losses
    assert file.read_bytes() == whole
    # And so it serves both, whatever the memory.
    for memory in (None, slots_of(path, 15)):
        with opened(path, memory) as model:
            assert model.packed_cache == "read from the packed cache"
    assert [p.name for p in (home / "packed").glob("*.weights")] == [file.name]


class Rule:
    """What makes room, plainly: what fewest tokens chose lately, of those the farthest turn."""

    def __init__(self, slots):
        self.held = [-1] * slots
        self.uses = [0] * (LAYERS * EXPERTS)
        self.chosen = 0

    def step(self, counts):
        for layer, row in enumerate(counts):
            wanted = {layer * EXPERTS + e: int(n) for e, n in enumerate(row) if n}
            for expert, n in wanted.items():
                self.uses[expert] += n
            for expert in wanted:
                if expert not in self.held:
                    self.held[self.room(layer, wanted)] = expert
            self.chosen += sum(wanted.values())
            if self.chosen >= 16 * LAYERS * EXPERTS:
                self.chosen = 0
                self.uses = [n // 2 for n in self.uses]

    def room(self, layer, wanted):
        def worth(slot):
            expert = self.held[slot]
            if expert < 0:
                return (-1, 0)
            return self.uses[expert], -((expert // EXPERTS - layer - 1) % LAYERS)

        return min((s for s in range(len(self.held)) if self.held[s] not in wanted), key=worth)


def test_what_was_chosen_least_makes_room(q4):
    with opened(q4, slots_of(q4, 17)) as model:
        runner = model._open()
        rule, tables = Rule(17), Held(runner, 1)
        before = runner.expert_counts()
        at, steps = 0, [30, 1, 1, 1, 20, *[1] * 60]
        for tokens in steps:
            places = list(range(at, at + tokens))
            at += tokens
            ids = [IDS[p % len(IDS)] for p in places]
            blocks = tables.tables(places, [0] * tokens)
            runner.run(ids, places, [0] * tokens, blocks)
            now = runner.expert_counts()
            rule.step((now - before).astype(int))
            before = now
            assert runner.executor.experts_held == rule.held
        assert runner.expert_reads().hits > 0


def test_the_memory_is_the_planned_one(q4, capsys):
    memory = slots_of(q4, 16)
    layout = layout_of(q4, expert_memory=memory)
    one = layout.experts[0].nbytes
    assert (layout.slots.count, layout.slots.nbytes) == (16, one)
    assert layout.weight_bytes == layout.file_bytes - (LAYERS * EXPERTS - 16) * one
    assert layout.dense_bytes == layout.slots.offset
    with opened(q4, memory) as model:
        assert model._open().executor.weight_bytes == model.memory.weights == layout.weight_bytes
    assert main(["inspect", str(q4), "--context", "128", "--expert-memory", str(memory),
                 "--json"]) == 0  # fmt: skip
    shown = json.loads(capsys.readouterr().out)
    assert shown["memory"]["weights"] == layout.weight_bytes
    assert shown["experts"] == {
        "experts": LAYERS * EXPERTS, "in_memory": 16, "bytes": LAYERS * EXPERTS * one,
        "memory": 16 * one, "least": EXPERTS * one}  # fmt: skip
    assert main(["inspect", str(q4), "--context", "128"]) == 0
    assert f"{LAYERS * EXPERTS} of {LAYERS * EXPERTS} experts" in capsys.readouterr().out


def measured(*arguments):
    command = [sys.executable, "-m", "pronk", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def test_the_process_takes_no_more_whether_it_packs_or_reads(tmp_path, home):
    source = tiny_dir(
        tmp_path / "hf", "mixtral", num_local_experts=16, hidden_size=256, intermediate_size=1024,
        sliding_window=None)  # fmt: skip
    path = tiny_gguf(tmp_path / "m.gguf", source, "q8_0")
    experts = layout_of(path).expert_bytes
    assert experts > 25e6
    run = ("run", path, "hello there", "--raw", "--max-tokens", 20, "--context", 128)
    whole = measured(*run)
    for _ in range(2):  # the first packs
        some = measured(*run, "--expert-memory", experts // 2)
        saved = whole["peak_memory"] - some["peak_memory"]
        assert saved == pytest.approx(experts / 2, abs=2.5e6)
        assert some["text"] == whole["text"]
        assert some["expert_reads"]["misses"] > 0
        planned = measured("inspect", path, "--context", 128, "--expert-memory", experts // 2)
        assert some["peak_memory"] <= planned["memory"]["total"]


def test_too_little_memory_is_refused_with_the_least(q4, capsys):
    least = layout_of(q4).least
    with pytest.raises(BudgetError, match=f"11 experts.* 12 of a layer.*--expert-memory {least} "):
        opened(q4, least - 1)
    assert main(["run", str(q4), "hello", "--expert-memory", "1kB"]) == 2
    assert f"give --expert-memory {least} or more" in capsys.readouterr().err
    with opened(q4, str(least), threads=1) as model:
        assert np.isfinite(model.logits(IDS)).all()


def test_a_short_step_does_with_less():
    one = ExpertSet(8, ("gate", "up", "down"), (128, 128, 192))
    assert plan_slots([one], None, 8 * 448, 64) is None
    assert plan_slots([one], 8 * 448, 8 * 448, 64) is None  # all of them
    found = plan_slots([one, replace(one, sizes=(128, 128, 64))], 3000, 2 * 448, 64)
    assert (found.offset, found.count, found.nbytes) == (64, 6, 448)  # any fits any slot
    with pytest.raises(RequestError, match="no experts"):
        plan_slots([], 1000, 0, 0)


def test_layers_that_share_weights_share_their_experts():
    moe = MoeSpec(experts=8, top_k=2, intermediate_size=96)
    layers = (LayerSpec(mlp="moe"), LayerSpec(mlp="moe", weights=0), LayerSpec(mlp="moe"))
    spec = ModelSpec(
        family="mixtral", name="", vocab_size=320, hidden_size=64, intermediate_size=160,
        num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-5, context_length=512,
        tie_embeddings=True, layers=layers, moe=moe)  # fmt: skip
    layout = compile_program(spec, lambda _: "f32", Limits(64)).layout
    assert [one.matrices[0].split(".")[2] for one in layout.experts] == ["0", "2"]
    assert layout.expert_bytes == 2 * 8 * 3 * 96 * 64 * 4


def test_all_experts_in_memory_need_no_file(q4):
    with opened(q4, layout_of(q4).expert_bytes, packed_cache=False) as model:
        assert model.expert_reads().slots == LAYERS * EXPERTS
        assert model._open().program.layout.slots is None


def test_a_model_without_experts_takes_no_memory_for_them(tmp_path, capsys):
    path = tiny_llama_dir(tmp_path / "llama")
    assert main(["inspect", str(path), "--expert-memory", "1MB"]) == 2
    assert "no experts" in capsys.readouterr().err
    assert main(["run", str(path), "hello", "--expert-memory", "some"]) == 2
    assert "'some' is not a size" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["byte", "short"])
def test_a_file_that_changes_is_told_and_made_anew(q4, home, kind):
    memory = slots_of(q4, EXPERTS)
    with opened(q4) as model:
        expected = model.logits(IDS)
    (file,) = (home / "packed").glob("*.weights")
    whole = file.read_bytes()
    layout = layout_of(q4)
    with opened(q4, memory) as model:
        with file.open("r+b") as out:  # as it lies, under the model that runs
            if kind == "byte":
                for name in layout.experts[1].matrices:
                    out.seek(layout.weight_offsets[name])
                    out.write(bytes(layout.file_bytes // LAYERS // 8))
            else:
                out.truncate(layout.dense_bytes + 64)
        with pytest.raises(CheckpointError, match=r"expert cannot be read .*: start again") as told:
            model.logits(IDS)
        assert ("another" if kind == "byte" else "shorter") in str(told.value)
        assert set(held(model)) == {-1}
        assert not file.exists()
    with opened(q4, memory) as model:
        np.testing.assert_array_equal(model.logits(IDS), expected)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("kind", ["weights", "sums", "short"])
def test_a_file_that_was_damaged_before_is_packed_again(q4, home, kind):
    memory = slots_of(q4, EXPERTS)
    with opened(q4, memory) as model:
        expected = model.logits(IDS)
    (file,) = (home / "packed").glob("*.weights")
    whole = bytearray(file.read_bytes())
    raw = bytearray(whole)
    if kind == "short":
        del raw[len(raw) // 2 :]
    else:
        raw[100 if kind == "weights" else -100] ^= 1
    file.write_bytes(raw)
    with opened(q4, memory) as model:
        np.testing.assert_array_equal(model.logits(IDS), expected)
    assert file.read_bytes() == whole


def test_a_file_that_is_removed_stays_readable(q4, home):
    with opened(q4, slots_of(q4, EXPERTS)) as model:
        expected = model.logits(IDS)
        packed_cache.clear()
        np.testing.assert_array_equal(model.logits(IDS), expected)


def test_without_a_place_on_disk_it_is_one_sentence(q4, home, monkeypatch, capsys):
    memory = str(slots_of(q4, EXPERTS))
    run = ["run", str(q4), "hello", "--raw", "--max-tokens", "2", "--expert-memory", memory]

    def told(*extra):
        assert main([*run, *extra]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        return said[0]

    assert "turned off: leave out --no-packed-cache" in told("--no-packed-cache")
    monkeypatch.setenv(packed_cache.ENVIRONMENT, "0")
    assert "turned off" in told()
    monkeypatch.setenv(packed_cache.ENVIRONMENT, "10kB")
    assert "above its limit of 10.0 kB" in told()
    monkeypatch.delenv(packed_cache.ENVIRONMENT)
    monkeypatch.setattr(packed_cache, "_SPARE", 1 << 60)
    assert "too little room" in told()
    monkeypatch.setattr(packed_cache, "_SPARE", 0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(_native, "save_weights", full)
        assert "No space left" in told()
    assert not list((home / "packed").glob("*.weights")) + list((home / "packed").glob("*.tmp"))
    assert main(run) == 0


def test_packing_can_be_interrupted(q4, home, monkeypatch):
    save, calls = _native.save_weights, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return save(*arguments)

    monkeypatch.setattr(_native, "save_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(q4, slots_of(q4, EXPERTS))
    assert not list((home / "packed").glob("*.weights")) + list((home / "packed").glob("*.tmp"))
    with opened(q4, slots_of(q4, EXPERTS)) as model:
        assert np.isfinite(model.logits(IDS)).all()


def test_progress_reaches_the_end_once(path):
    for _ in range(2):  # packed, then read
        seen: list[tuple[int, int]] = []

        def watch(*at: int, to=seen) -> None:
            to.append(at)

        with opened(path, slots_of(path, 13), progress=watch):
            assert seen == sorted(seen)
            assert seen[-1][0] == seen[-1][1] > 0


def test_what_answers_and_prompts_read_is_told_apart(q4, capsys):
    with opened(q4, slots_of(q4, EXPERTS), speculate=False) as model:
        before = model.expert_reads()
        found = expert_traffic(model, IDS[:40], 12)
        after = model.expert_reads().since(before)
    prompt, answer = found.prompt, found.answer
    assert (prompt.tokens, answer.tokens) == (40, 11)
    assert prompt.hits + prompt.misses <= LAYERS * EXPERTS
    assert answer.hits + answer.misses == 11 * LAYERS * 2
    assert prompt.misses + answer.misses == after.misses
    assert f"{answer.hit_rate:.1%} there" in found.format()
    assert main(["bench", str(q4), "--runs", "1", "--tokens", "6", "--prompt-tokens", "30",
                 "--context", "64", "--no-depth", "--experts", "--threads", "1",
                 "--expert-memory", str(slots_of(q4, 20)), "--json"]) == 0  # fmt: skip
    traffic = json.loads(capsys.readouterr().out)["experts"]["traffic"]
    assert traffic["answer"]["slots"] == 20
    assert traffic["answer"]["read_per_token"] >= 0
    assert 0 <= traffic["answer"]["hit_rate"] <= 1


def test_what_is_measured_is_the_same_model(q4, capsys):
    def scored(*extra):
        assert main(["eval", str(q4), "--max-tokens", "120", "--window", "64", "--threads", "1",
                     "--json", *extra]) == 0  # fmt: skip
        return json.loads(capsys.readouterr().out)

    some = scored("--expert-memory", str(slots_of(q4, EXPERTS)), "--reference", str(q4))
    assert some["perplexity"] == scored()["perplexity"]
    assert (some["kl"], some["top1_agreement"]) == (0, 1)
