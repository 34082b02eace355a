"""A tiny model, its texts, and what tests of making it smaller ask of both."""

from __future__ import annotations

import numpy as np
import torch
from checkpoints import mixed_lines

from pronk.checkpoint.open import open_checkpoint
from pronk.cli import main
from pronk.compress import smaller, training
from pronk.compress.layerwise import cut_windows
from pronk.compress.torch_model import to_transformers

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 20_000)]


WINDOWS = cut_windows(IDS, 48, 8)


TEXT = smaller.Text(IDS[:800], IDS[:-800], IDS[-800:])


def quiet(what, done, total):
    pass


def logits(model, windows=WINDOWS):
    with torch.no_grad():
        return torch.cat([model(window[None]).logits[0] for window in windows])


def off(actual, expected):
    return float(((actual - expected).norm() / expected.norm()).detach())


def twin(path):
    with open_checkpoint(path) as ckpt:
        return to_transformers(ckpt), ckpt.spec


def recipe(steps, **changes):
    fields = {"window": 48, "batch": 4, "learning_rate": 1e-3, "precision": "f32", **changes}
    return training.Recipe(steps, **fields)


def weights_of(path):
    model, _ = twin(path)
    return {name: weight.clone() for name, weight in model.named_parameters()}


def write_text(path):
    path.write_text("\n".join(mixed_lines(300)), encoding="utf-8")
    return path


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("pronk: error: ")
    return sentence
