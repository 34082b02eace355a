"""Layers that see a part of the past, and queries and keys that are normed, capped or biased."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from engines import Held, isas, random_runner, run_whole

from pronk.graph.reference import Reference
from pronk.spec import LayerSpec, ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama", name="", vocab_size=96, hidden_size=64, intermediate_size=96, num_heads=6,
    num_kv_heads=2, head_dim=32, norm_eps=1e-5, context_length=2048, tie_embeddings=True,
    layers=(LayerSpec(),) * 3)  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 96, 600)]


def layers(*kinds: LayerSpec, **changes: object) -> ModelSpec:
    return replace(SPEC, layers=kinds, **changes)


SPECS = {
    "window": layers(LayerSpec("window", 50), LayerSpec(), LayerSpec("window", 513)),
    "sinks": layers(LayerSpec("window", 40, 4), LayerSpec("window", 64, 100)),
    "chunked": layers(
        LayerSpec("chunked", 100), LayerSpec(rope=None), query_growth=(0.3, 16),
    ),
    "no rope": layers(LayerSpec(rope=None), LayerSpec("window", 33, rope=None)),
    "two ropes": layers(
        LayerSpec("window", 96, rope=1), LayerSpec(),
        ropes=(RopeSpec(1e6, attention_factor=1.4), RopeSpec(1e4)),
    ),
    "norm of heads": layers(LayerSpec(qk_norm="head"), LayerSpec(qk_norm="head", rope=None)),
    "norm over heads": layers(LayerSpec(qk_norm="full"), LayerSpec("window", 9, qk_norm="full")),
    "unit heads": layers(LayerSpec("chunked", 64, qk_norm="l2"), LayerSpec(rope=None)),
    "soft caps": layers(LayerSpec("window", 70), LayerSpec(), attention_softcap=1.5),
    "alibi": layers(LayerSpec(rope=None), LayerSpec("window", 64, 3, rope=None), alibi=8.0),
    "wide heads": layers(
        LayerSpec("window", 64), LayerSpec(), num_heads=4, num_kv_heads=1, head_dim=256,
        attention_scale=0.1, attention_softcap=20.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", SPECS)
def test_native_computes_what_the_interpreter_says(name, isa):
    limits = {"context": 640, "isa": isa, "max_tokens": 100}
    runner, weights = random_runner(SPECS[name], kv_dtype="f32", **limits)
    reference = Reference(runner.program.graph, weights)
    count = len(IDS)
    expected = reference.step(IDS, range(count), [0] * count, range(count))
    native = run_whole(runner, IDS)
    assert np.abs(native - expected).max() < 3e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", ["window", "sinks", "chunked", "soft caps", "alibi"])
def test_chunks_threads_and_parts_do_not_matter(name, isa, kv_dtype):
    limits = {"context": 640, "isa": isa, "kv_dtype": kv_dtype}
    whole = run_whole(random_runner(SPECS[name], threads=1, **limits)[0], IDS)
    for threads, chunk in ((3, 37), (4, 128)):
        runner = random_runner(SPECS[name], threads=threads, **limits)[0]
        np.testing.assert_array_equal(run_whole(runner, IDS, chunk), whole)
    # A few tokens at a time: pasts of more than one chunk are cut over threads.
    held = Held(runner, 1)
    cuts = [*range(0, 508, 100), 508, 509, 516, 520, 521, 540, 542, 599, 600]
    for start, stop in itertools.pairwise(cuts):
        positions, count = list(range(start, stop)), stop - start
        tables = held.tables(positions, [0] * count)
        got = runner.step(IDS[start:stop], positions, [0] * count, tables, list(range(count)))
        np.testing.assert_array_equal(got, whole[start:stop])


@pytest.mark.parametrize("name", ["window", "sinks", "chunked"])
def test_company_does_not_matter(name):
    limits = {"context": 192, "max_tokens": 40, "kv_tokens": 768}
    prompts = [IDS[:150], IDS[200:233], IDS[300:301], IDS[400:520]]
    alone = [run_whole(random_runner(SPECS[name], **limits)[0], prompt) for prompt in prompts]
    runner = random_runner(SPECS[name], **limits)[0]
    held = Held(runner, 4)
    done = [0] * 4
    got = [[] for _ in prompts]
    for turn in range(1000):
        ids, positions, sequences = [], [], []
        for i, prompt in enumerate(prompts):
            n = min(1 + (turn + 3 * i) % 10, len(prompt) - done[i])
            ids += prompt[done[i] : done[i] + n]
            positions += range(done[i], done[i] + n)
            sequences += [i] * n
            done[i] += n
        if not ids:
            break
        tables = held.tables(positions, sequences)
        logits = runner.step(ids, positions, sequences, tables, list(range(len(ids))))
        for i, row in zip(sequences, logits, strict=True):
            got[i].append(row)
    for rows, expected in zip(got, alone, strict=True):
        np.testing.assert_array_equal(np.stack(rows), expected)
