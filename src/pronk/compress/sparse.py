"""Unstructured and n:m sparsity: magnitude, Wanda, SparseGPT, layer by layer.

Pronk has no sparse kernel: what comes out is stored and runs dense, as fast as before. What it
would take as sparse int4 is arithmetic (`stored_bits`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pronk.compress.layerwise import Stream
from pronk.errors import RequestError

__all__ = ["METHODS", "Pattern", "parse_pattern", "sparsify", "sparsify_matrix", "stored_bits"]

METHODS = ("magnitude", "wanda", "sparsegpt")

Progress = Callable[[str, int, int], None]

# Linear modules of a layer by the one whose input they share.
_INPUTS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
_BLOCK = 128
_DAMPING = 0.01
_SCALE_BITS = 16 / 32  # int4 in groups of 32, as Pronk writes it


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights may be zero: a share of each matrix, or `zeros` of each `of` in a row."""

    sparsity: float
    zeros: int = 0
    of: int = 0

    def __str__(self) -> str:
        """``2:4`` (kept : all, as hardware has it) or ``unstructured``."""
        return f"{self.of - self.zeros}:{self.of}" if self.of else "unstructured"


def parse_pattern(text: str, sparsity: float | None) -> Pattern:
    """``unstructured`` with a sparsity, or ``n:m``: n of m weights side by side are kept.

    Raises
    ------
    RequestError
        If it is neither, or the sparsity is another than the pattern's.
    """
    if text == "unstructured":
        share = 0.5 if sparsity is None else sparsity
        if not 0 < share < 1:
            raise RequestError(f"--sparsity must be between 0 and 1, not {share:g}")
        return Pattern(share)
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text, re.ASCII)
    kept, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < of or 32 % of:
        raise RequestError(
            f"--pattern {text[:40]} is neither unstructured nor n:m such as 2:4, m a divisor of 32"
        )
    share = 1 - kept / of
    if sparsity is not None and abs(sparsity - share) > 1e-6:
        raise RequestError(f"--sparsity {sparsity:g} is not that of the pattern {text}: {share:g}")
    return Pattern(share, of - kept, of)


def stored_bits(pattern: Pattern) -> float:
    """Bits a weight would take as sparse int4: values kept, where they are, scales of 32.

    Places cost an index each in an n:m group (2 bits in 2:4), else a bit for every weight.
    Dense int4 takes 4.5.
    """
    kept = 1 - pattern.sparsity
    places = kept * math.ceil(math.log2(pattern.of)) if pattern.of else 1.0
    return 4 * kept + places + _SCALE_BITS


def sparsify_matrix(weight: Any, gram: Any, method: str, pattern: Pattern) -> Any:
    """A matrix with zeros by one of `METHODS`.

    ``magnitude`` zeroes the smallest weights of the matrix. ``wanda`` those smallest times the
    norm of their input, row by row (arXiv:2306.11695). ``sparsegpt`` goes through the columns,
    zeroes what the output misses least and lets the columns to the right make up for it
    (arXiv:2301.00774).

    Parameters
    ----------
    weight : float32 [rows, columns]
    gram : float32 [columns, columns]
        Sum of ``x.T @ x`` over the inputs; for magnitude it is not read.
    method : {"magnitude", "wanda", "sparsegpt"}
    pattern : Pattern
    """
    import torch

    if method == "sparsegpt":
        return _sparsegpt(weight, gram, pattern)
    score = weight.abs()
    if method == "wanda":
        score = score * gram.diagonal().sqrt()
    if pattern.of:
        return weight.masked_fill(_smallest(score, pattern), 0)
    if method == "wanda":
        return weight.masked_fill(_smallest_of_rows(score, pattern.sparsity), 0)
    flat = torch.zeros(weight.numel(), dtype=torch.bool)
    flat[score.reshape(-1).argsort()[: round(pattern.sparsity * weight.numel())]] = True
    return weight.masked_fill(flat.reshape(weight.shape), 0)


def _smallest(score: Any, pattern: Pattern) -> Any:
    """The `zeros` smallest of each `of` neighbours."""
    import torch

    groups = score.reshape(-1, pattern.of)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.argsort(1)[:, : pattern.zeros], True)
    return mask.reshape(score.shape)


def _smallest_of_rows(score: Any, share: float) -> Any:
    import torch

    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, score.argsort(1)[:, : round(share * score.shape[1])], True)


def _sparsegpt(weight: Any, gram: Any, pattern: Pattern) -> Any:
    import torch

    w, gram = weight.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    w[:, dead] = 0
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    columns = w.shape[1]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        part, local = w[:, start:stop], inverse[start:stop, start:stop]
        errors = torch.zeros_like(part)
        mask = torch.zeros_like(part, dtype=torch.bool)
        if not pattern.of:
            score = part.square() / local.diagonal().square()
            count = round(pattern.sparsity * score.numel())
            mask.view(-1)[score.reshape(-1).argsort()[:count]] = True
        for i in range(stop - start):
            if pattern.of and i % pattern.of == 0:
                span = slice(i, i + pattern.of)
                score = part[:, span].square() / local.diagonal()[span].square()
                mask[:, span] = _smallest(score, pattern)
            column = part[:, i]
            errors[:, i] = column.masked_fill(~mask[:, i], 0) / local[i, i]
            part[:, i:] -= errors[:, i : i + 1] * local[i, i:]
            part[:, i].masked_fill_(mask[:, i], 0)
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return w


def sparsify(
    model: Any, windows: Any, method: str, pattern: Pattern, tell: Progress
) -> dict[str, float]:
    """Make the linear modules of all layers sparse, in place; embedding and head stay.

    Each layer is fitted to the inputs that the sparse layers before it give.

    Returns
    -------
    dict
        ``sparsity``: the zeros' share of the layers' weights. ``error``: the mean over modules
        of the squared error of outputs, relative to the outputs' square.
    """
    import torch

    stream = Stream(model, windows)
    zeros = total = 0
    errors: list[float] = []
    layers = model.model.layers
    with torch.no_grad():
        for i, layer in enumerate(layers):
            tell("making layers sparse", i, len(layers))
            grams = stream.grams(layer, list(_INPUTS))
            for name, modules in _INPUTS.items():
                for module in map(layer.get_submodule, modules):
                    old, gram = module.weight, grams[name]
                    new = sparsify_matrix(old, gram, method, pattern)
                    off = new - old
                    norm = float((old @ gram * old).sum())
                    errors.append(float((off @ gram * off).sum()) / max(norm, 1e-30))
                    old.copy_(new)
                    zeros += int((new == 0).sum())
                    total += new.numel()
            stream.advance(layer)
        tell("making layers sparse", len(layers), len(layers))
    return {"sparsity": zeros / total, "error": sum(errors) / len(errors)}
