"""A sequence's logits are the same bits whatever shares its step, however it is cut or threaded."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_gguf, tiny_llama_dir
from engines import isas, make_runner, run_whole

FORMATS = ("f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
CASES = [(dtype, "int12") for dtype in FORMATS] + [(dtype, "int8") for dtype in FORMATS[2:]]
RNG = np.random.default_rng(3)
PROMPTS = [[int(i) for i in RNG.integers(0, 320, n)] for n in (70, 33, 1, 48)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    path = tiny_llama_dir(
        folder / "hf",
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=256,
    )
    return {"f32": path} | {
        dtype: tiny_gguf(folder / f"{dtype}.gguf", path, dtype) for dtype in FORMATS[1:]
    }


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("dtype", "activations"), CASES)
def test_chunks_and_threads_do_not_matter(models, dtype, activations, isa):
    options = {"isa": isa, "activations": activations}
    expected = run_whole(make_runner(models[dtype], threads=1, **options), PROMPTS[0])
    for threads, chunk in ((1, 7), (2, 32), (3, 70), (2, 1)):
        runner = make_runner(models[dtype], threads=threads, **options)
        np.testing.assert_array_equal(run_whole(runner, PROMPTS[0], chunk), expected)


@pytest.mark.parametrize(("dtype", "activations"), CASES)
def test_company_does_not_matter(models, dtype, activations):
    limits = {"kv_tokens": 512, "max_tokens": 40, "max_rows": 3, "activations": activations}
    runner = make_runner(models[dtype], **limits)
    alone = [
        run_whole(
            make_runner(models[dtype], **limits), prompt, len(prompt) if len(prompt) < 40 else 40
        )
        for prompt in PROMPTS
    ]
    # All four at once, each taking a different number of tokens a step.
    blocks = [[[4 * i + j for j in range(4)]] for i in range(4)]
    done = [0] * 4
    got = [[] for _ in PROMPTS]
    turn = 0
    while any(done[i] < len(p) for i, p in enumerate(PROMPTS)):
        ids, positions, sequences = [], [], []
        for i, prompt in enumerate(PROMPTS):
            n = min(1 + (turn + 3 * i) % 11, len(prompt) - done[i])
            ids += prompt[done[i] : done[i] + n]
            positions += range(done[i], done[i] + n)
            sequences += [i] * n
            done[i] += n
        logits = runner.step(ids, positions, sequences, blocks, list(range(len(ids))))
        for i, row in zip(sequences, logits, strict=True):
            got[i].append(row)
        turn += 1
    for rows, expected in zip(got, alone, strict=True):
        np.testing.assert_array_equal(np.stack(rows), expected)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("isa", isas())
def test_a_long_past_cut_over_threads_does_not_matter(models, isa, kv_dtype):
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 320, 1100)]
    limits = {"context": 1152, "isa": isa, "kv_dtype": kv_dtype}
    whole = run_whole(make_runner(models["q4_1"], threads=1, **limits), ids)
    runner = make_runner(models["q4_1"], threads=4, **limits)
    blocks = [[list(range(36))]]
    # A few tokens at a time, whose past is cut in three; the chunks before them are not cut.
    run_whole(runner, ids[:1020])
    for start, stop in ((1020, 1021), (1021, 1026), (1026, 1027)):
        positions, n = list(range(start, stop)), stop - start
        got = runner.step(ids[start:stop], positions, [0] * n, blocks, list(range(n)))
        np.testing.assert_array_equal(got, whole[start:stop])


def test_steps_are_repeatable(models):
    runner = make_runner(models["q4_1"])
    np.testing.assert_array_equal(run_whole(runner, PROMPTS[0]), run_whole(runner, PROMPTS[0]))
