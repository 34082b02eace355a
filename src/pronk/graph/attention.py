"""What a user changes of a model at load: which layers attend to everything, and rope's reach."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pronk.errors import RequestError
from pronk.spec import LayerSpec, ModelSpec, RopeSpec

__all__ = [
    "AttentionPolicy",
    "adapted",
    "apply_policy",
    "apply_rope_scaling",
    "parse_policy",
]

_MOST_POSITIONS = 1 << 24
_MOST_FACTOR = 1024.0
_SCALINGS = ("yarn", "linear", "dynamic", "none")


@dataclass(frozen=True, slots=True)
class AttentionPolicy:
    """Full attention on some layers, a window and attention sinks on the others.

    Parameters
    ----------
    window : int
        Positions, the token's own included.
    sinks : int
        First positions of a sequence that every token sees (arXiv:2309.17453).
    every : int
        Layers ``every - 1``, ``2 * every - 1`` and so on stay global; 0: this names none.
    layers : tuple of int
        Layers that stay global besides.
    auto : int
        So many more are to be chosen by measured divergence; 0: the policy says all.
    """

    window: int
    sinks: int = 0
    every: int = 0
    layers: tuple[int, ...] = ()
    auto: int = 0

    def keeps(self, layer: int) -> bool:
        """Whether a layer stays as it is."""
        return layer in self.layers or (self.every > 0 and (layer + 1) % self.every == 0)


def parse_policy(text: str) -> AttentionPolicy:
    """A policy from ``window=512,global-every=4,sinks=4``.

    Instead of ``global-every=4``, the layers that stay global may be listed, ``global=0:4:8``,
    or be chosen by measured divergence, ``global=auto:8``; without either, none stays.

    Raises
    ------
    RequestError
        If the text is no policy.
    """
    fields: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in ("window", "sinks", "global-every", "global"):
            raise RequestError(
                f"the attention policy has {part.strip()!r}: write window=N, then perhaps "
                "global-every=N, global=LAYER:LAYER:... or global=auto:N, and sinks=N"
            )
        if name in fields:
            raise RequestError(f"the attention policy says {name} twice")
        fields[name] = value
    if "window" not in fields:
        raise RequestError("the attention policy has no window: write window=N")
    if "global" in fields and "global-every" in fields:
        raise RequestError("the attention policy has both global and global-every: give one")
    window = _number("window", fields["window"], 1)
    sinks = _number("sinks", fields.get("sinks", "0"), 0)
    every = _number("global-every", fields["global-every"], 1) if "global-every" in fields else 0
    kind, _, count = fields.get("global", "").partition(":")
    if kind == "auto":
        return AttentionPolicy(window, sinks, auto=_number("global=auto", count, 1))
    listed = fields["global"].split(":") if "global" in fields else []
    layers = sorted({_number("global", layer, 0) for layer in listed})
    return AttentionPolicy(window, sinks, every, tuple(layers))


def _number(name: str, text: str, least: int) -> int:
    # int() takes more than digits, and takes long for very many of them.
    if text.isascii() and text.isdigit() and len(text) <= 9:
        value = int(text)
        if least <= value <= _MOST_POSITIONS:
            return value
    raise RequestError(
        f"{name} of the attention policy must be a whole number from {least} to "
        f"{_MOST_POSITIONS}, not {text[:40]!r}"
    )


def apply_policy(spec: ModelSpec, policy: AttentionPolicy) -> ModelSpec:
    """The model with a window and sinks on every layer that the policy does not keep.

    A layer that has a window at most as long, or chunks, stays as it is.

    Raises
    ------
    RequestError
        If the policy names a layer that the model does not have, or leaves layers to be chosen.
    """
    beyond = [layer for layer in policy.layers if layer >= spec.num_layers]
    if beyond:
        raise RequestError(
            f"the attention policy names layer {beyond[0]}, but the model's layers are 0 to "
            f"{spec.num_layers - 1}"
        )
    if policy.auto:
        raise RequestError(
            "the attention policy's global layers have not been chosen: list them, as "
            "global=0:4:8 (the command line measures which do most)"
        )
    layers = tuple(
        layer if policy.keeps(i) else _windowed(layer, policy)
        for i, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def _windowed(layer: LayerSpec, policy: AttentionPolicy) -> LayerSpec:
    narrow = layer.attention == "window" and layer.window <= policy.window
    if narrow or layer.attention == "chunked":
        return layer
    return replace(layer, attention="window", window=policy.window, sinks=policy.sinks)


def apply_rope_scaling(spec: ModelSpec, text: str) -> ModelSpec:
    """The model with its context multiplied by a scaling of rope: ``yarn:4``.

    What layers with a window or chunks alone turn by stays: their reach does not grow.

    Parameters
    ----------
    spec : ModelSpec
    text : str
        ``yarn``, ``linear`` or ``dynamic``, a colon, and the factor; ``none`` lets a model go
        past its context as it is, to see what the others mend.

    Raises
    ------
    RequestError
        If the text is no scaling, or the model's rope cannot be scaled.
    """
    kind, _, number = text.partition(":")
    try:
        factor = float(number[:40])
    except ValueError:
        factor = 0.0
    if kind not in _SCALINGS or not 1 < factor <= _MOST_FACTOR:
        raise RequestError(
            f"rope scaling must be {', '.join(_SCALINGS[:-1])} or {_SCALINGS[-1]}, a colon and a "
            f"factor above 1 and at most {_MOST_FACTOR:g}, as in yarn:4, not {text[:40]!r}"
        )
    turned = {layer.rope for layer in spec.layers if layer.rope is not None}
    reaching = {
        layer.rope
        for layer in spec.layers
        if layer.rope is not None and layer.attention == "global"
    }
    if not turned:
        raise RequestError("this model has no rope to scale")
    ropes = list(spec.ropes)
    for index in (reaching or turned) if kind != "none" else ():
        if ropes[index].kind != "default":
            raise RequestError(
                f"this model's rope is scaled already ({ropes[index].kind}): it cannot be scaled "
                "again"
            )
        ropes[index] = _scaled(ropes[index], kind, factor, spec.context_length)
    context = int(spec.context_length * factor)
    return replace(spec, ropes=tuple(ropes), context_length=context)


def _scaled(rope: RopeSpec, kind: str, factor: float, context: int) -> RopeSpec:
    temperature = 0.1 * math.log(factor) + 1 if kind == "yarn" else rope.attention_factor
    return replace(
        rope, kind=kind, factor=factor, original_context=context, attention_factor=temperature
    )


def adapted(
    spec: ModelSpec, attention: str | AttentionPolicy | None, rope_scaling: str | None
) -> ModelSpec:
    """A model as the user wants it: its rope scaled, then the policy applied.

    Raises
    ------
    RequestError
        If it cannot be so.
    """
    if rope_scaling is not None:
        spec = apply_rope_scaling(spec, rope_scaling)
    if attention is None:
        return spec
    policy = parse_policy(attention) if isinstance(attention, str) else attention
    return apply_policy(spec, policy)
