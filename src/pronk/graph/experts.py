"""How many experts a token goes to, as the user asks for it."""

from __future__ import annotations

import math
from dataclasses import replace

from pronk.errors import RequestError
from pronk.spec import ModelSpec

__all__ = ["apply_experts"]


def apply_experts(spec: ModelSpec, text: str) -> ModelSpec:
    """A model whose tokens go to as many experts as they need.

    Parameters
    ----------
    spec : ModelSpec
    text : str
        ``top-p=P``, and ``min=N`` and ``max=N`` behind commas: a token takes its likeliest
        experts until their weights make up the share P of all, at least N of them (1) and at
        most so many (as many as the model takes). ``P:N`` is short for ``top-p=P,min=N``.

    Returns
    -------
    ModelSpec

    Raises
    ------
    RequestError
        If the model has no experts, or the text asks for what cannot be.
    """
    moe = spec.moe
    if moe is None:
        raise RequestError("this model has no experts to choose from")
    share, least, most = 1.0, 1, moe.top_k
    short, _, count = text.partition(":")
    parts = text.split(",")
    if "=" not in text:
        parts = [f"top-p={short}", *([f"min={count}"] if count or ":" in text else [])]
    seen = set()
    for part in parts:
        name, _, value = part.strip().partition("=")
        try:
            if name in seen:
                raise ValueError
            seen.add(name)
            if name == "top-p":
                share = float(value)
            elif name == "min":
                least = int(value)
            elif name == "max":
                most = int(value)
            else:
                raise ValueError
        except ValueError:
            raise RequestError(
                f"experts are asked for like 'top-p=0.8,min=1,max=4' or '0.8:1', not {text!r}"
            ) from None
    if not math.isfinite(share) or not 0 < share <= 1:
        raise RequestError(f"the share of experts' weights must be in (0, 1], not {share:g}")
    if not 1 <= most <= moe.experts:
        raise RequestError(f"this model has {moe.experts} experts: a token cannot go to {most}")
    if not 1 <= least <= most:
        raise RequestError(f"a token that goes to at most {most} experts cannot go to {least}")
    return replace(spec, moe=replace(moe, top_k=most, threshold=share, least=least))
