"""Sparse activation: skipping changes no bit, and what is asked for is refused where it must be."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from engines import isas, run_whole
from test_graph import IDS
from test_rowwise import SPEC, random_weights

from pronk.engine.runner import Runner
from pronk.errors import RequestError
from pronk.evaluate.sparsity import activity
from pronk.graph.passes import CPU_PASSES, skip_inactive
from pronk.graph.program import Limits, compile_program
from pronk.graph.sparse import apply_sparse
from pronk.spec import LayerSpec


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("mlp", ["gated", "plain"])
def test_skipping_changes_no_bit(mlp, threshold, isa):
    layer = LayerSpec(mlp=mlp, mlp_threshold=threshold)
    spec = replace(SPEC, activation="relu", layers=(layer,) * 2)
    found = []
    for skip, chunk in ((False, 32), (True, 32), (True, 1)):
        passes = tuple(p for p in CPU_PASSES if skip or p is not skip_inactive)
        program = compile_program(spec, lambda _: "q8_0", Limits(256, max_tokens=32), passes)
        runner = Runner(program, 2, isa)
        random_weights(runner, "q8_0")
        runner.watch()
        found.append((run_whole(runner, IDS[:32], chunk), runner.activity()))
    for logits, counts in found[1:]:
        np.testing.assert_array_equal(logits, found[0][0])
        np.testing.assert_array_equal(counts, found[0][1])
    zeros = activity(found[0][1])
    assert min(zeros.zeros) == 1 if threshold == 1e9 else 0.2 < min(zeros.zeros) < 1


def test_what_cannot_be_is_refused(tmp_path):
    file = tmp_path / "t.json"
    for text, said in (
        ("kl=0", "kl of"), ("keep=2", "keep of"), ("threshold=-1", "threshold of"),
        ("kl=nan", "kl of"), ("often", "takes"), ("kl=0.01", "calibrated"),
        (str(tmp_path / "none.json"), "cannot be read"), (str(file), "thresholds"),
    ):  # fmt: skip
        file.write_text(json.dumps({"thresholds": []}))
        with pytest.raises(RequestError, match=said):
            apply_sparse(SPEC, text)
    with pytest.raises(RequestError, match="3 thresholds were given for 2"):
        apply_sparse(SPEC, [1, 2, 3])
    with pytest.raises(RequestError, match="experts in every layer"):
        apply_sparse(replace(SPEC, layers=(LayerSpec(mlp="moe"),) * 2), "threshold=1")
    file.write_text(json.dumps({"thresholds": [0.5, 0.25]}))
    assert [x.mlp_threshold for x in apply_sparse(SPEC, str(file)).layers] == [0.5, 0.25]
