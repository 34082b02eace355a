"""Automatic bits: what each matrix costs in each format, and the formats that cost least.

A matrix's sensitivity is the KL divergence of the model's output when that matrix alone is
rounded, to a probe format. Divergence grows with the square of a small change, so those of
other formats follow from the ratio of output errors; and matrices add up. An integer program
then picks a format for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.kinds import EMBEDDING, HEAD
from pronk.checkpoint.storage import Storage, parse_storage
from pronk.compress.calibrate import Inputs, batches
from pronk.compress.forward import Decoder, embedded
from pronk.compress.gptq import damped, output_error
from pronk.compress.grid import fit_grid
from pronk.compress.layers import meet, read_floats
from pronk.errors import BudgetError, RequestError
from pronk.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Goal",
    "Sensitivity",
    "candidates",
    "choose",
    "divergence",
    "probe_steps",
    "sensitivity",
]

_CANDIDATES = ("int3-g64", "int3-g32", "int4-g64", "int4-g32", "int4-g32-min", "int8-g32")
_PROBE = "int3-g32"
_PROBE_TOKENS = 512  # whose logits are compared
_PROBE_WINDOW = 256
_TOKENS = 4096  # that output errors are taken over


@dataclass(frozen=True, slots=True)
class Goal:
    """What the formats are to meet; one of these.

    Parameters
    ----------
    bits : float, optional
        Most bits a weight, scales included, over all matrices that formats are chosen for, the
        output head among them, and all vectors.
    size : int, optional
        Most bytes of the same.
    kl : float, optional
        Most predicted divergence, in nats a token, at the smallest size.
    """

    bits: float | None = None
    size: int | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.size, self.kl) if value is not None]
        if len(given) != 1 or not 0 < given[0] < float("inf"):
            raise RequestError("give one of --bits, --size and --kl, above zero")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A matrix: predicted divergence in nats a token, and bytes, by format."""

    kl: Mapping[str, float]
    nbytes: Mapping[str, int]


def candidates(cols: int) -> list[str]:
    """The formats that a matrix of such rows may take."""
    return [text for text in _CANDIDATES if not cols % (parse_storage(text).group or 32)]


def _rounded(weight: Tensor, storage: Storage, met: Inputs) -> Tensor:
    grid = fit_grid(weight, storage, damped(met.hessian, 0.01).diagonal())
    return grid.values(grid.codes(weight))


def _kl(reference: Tensor, logits: Tensor) -> float:
    """Mean KL divergence over rows, in nats."""
    total = 0.0
    for p, q in zip(reference.split(256), logits.split(256), strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(reference)


class _Probe:
    """The exact model's values between layers, and the suffixes of it."""

    def __init__(self, ckpt: Checkpoint, decoder: Decoder, windows: NDArray[np.int64]) -> None:
        self.ckpt, self.decoder = ckpt, decoder
        self.layers = ckpt.spec.num_layers
        self.head = EMBEDDING if ckpt.spec.tie_embeddings else HEAD
        self.windows = _cut(windows)
        self.count = max(1, _PROBE_TOKENS // self.windows.shape[1])

    def weights(self, layer: int) -> dict[str, Tensor]:
        return read_floats(self.ckpt, self.decoder.names(layer))

    def logits(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        out = self.decoder.run(self.layers, x, weights)
        return out.reshape(-1, out.shape[-1])

    def through(self, x: Tensor, layer: int) -> Tensor:
        """From before a layer to before the head."""
        import torch

        for at in range(layer, self.layers):
            weights = self.weights(at)
            x = torch.cat([self.decoder.run(at, part, weights) for _, part in batches(x)])
        return x

    def errors(self, name: str, weight: Tensor, met: Inputs) -> dict[str, float]:
        """Output error of each format; none where a matrix is in it already."""
        out = dict.fromkeys(candidates(weight.shape[1]), 0.0)
        for text in out:
            storage = parse_storage(text)
            if not storage.holds(self.ckpt.tensors[name].dtype):
                out[text] = output_error(_rounded(weight, storage, met) - weight, met.hessian)
        return out


def _cut(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    width = min(windows.shape[1], _PROBE_WINDOW)
    return windows[: max(1, _TOKENS // width), :width]


def probe_steps(
    ckpt: Checkpoint, decoder: Decoder, windows: NDArray[np.int64]
) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """What measures each layer, and last the head; each gives ``kl`` and ``errors`` by matrix.

    A step that is not called is passed over, but for the values it hands to the next.

    Parameters
    ----------
    ckpt : Checkpoint
    decoder : Decoder
    windows : int64 [windows, tokens]
        Calibration text.
    """
    import torch

    probe = _Probe(ckpt, decoder, windows)
    y = embedded(ckpt, decoder, probe.windows)
    with torch.no_grad():
        final = probe.through(y[: probe.count], 0)
        top = probe.weights(probe.layers)
        reference = probe.logits(final, top)
    for layer in range(probe.layers):
        given = y

        def measure(layer: int = layer, given: Tensor = given) -> dict[str, dict[str, Any]]:
            with torch.no_grad():
                return _layer(probe, layer, given, reference, top)

        yield measure
        with torch.no_grad():
            weights = probe.weights(layer)
            y = torch.cat([decoder.run(layer, part, weights) for _, part in batches(y)])

    def last() -> dict[str, dict[str, Any]]:
        with torch.no_grad():
            return _head(probe, y, reference, top)

    yield last


def _layer(
    probe: _Probe, layer: int, x: Tensor, reference: Tensor, top: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    import torch

    decoder, weights = probe.decoder, probe.weights(layer)
    stages = decoder.matrices(layer)
    met = meet(decoder, layer, x, weights, [stage[0] for stage in stages])
    first = x[: probe.count]
    out: dict[str, dict[str, Any]] = {}
    tried = []
    for stage in stages:
        for name in stage:
            errors = probe.errors(name, weights[name], met[stage[0]])
            out[name] = {"errors": errors}
            changed = _rounded(weights[name], parse_storage(_PROBE), met[stage[0]])
            tried.append(decoder.run(layer, first, {**weights, name: changed}))
    ends = probe.through(torch.cat(tried), layer + 1).split(len(first))
    for name, end in zip(out, ends, strict=True):
        out[name]["kl"] = _kl(reference, probe.logits(end, top))
    return out


def _head(
    probe: _Probe, x: Tensor, reference: Tensor, top: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    import torch

    met = Inputs(probe.ckpt.spec.hidden_size)
    layers, head = probe.layers, probe.head
    probe.decoder.run(layers, x, top, lambda name, inputs: met.add(inputs), until=head)
    weight = top[head]
    rows = weight[:: max(1, len(weight) // 4096)]  # enough to tell formats apart
    changed = _rounded(weight, parse_storage(_PROBE), met)
    first = x[: probe.count]
    if head == EMBEDDING:
        # What is embedded with the rounded table goes through all layers.
        ids = torch.from_numpy(probe.windows[: probe.count])
        first = probe.through(probe.decoder.embed(changed[ids]), 0)
    kl = _kl(reference, probe.logits(first, {**top, head: changed}))
    return {head: {"errors": probe.errors(head, rows, met), "kl": kl}}


def sensitivity(measured: Mapping[str, Any], rows: int, cols: int) -> Sensitivity:
    """Costs of a matrix from what a step measured."""
    errors = measured["errors"]
    probe = max(errors[_PROBE], 1e-30)
    return Sensitivity(
        {text: measured["kl"] * error / probe for text, error in errors.items()},
        {text: parse_storage(text).row_bytes(cols) * rows for text in errors},
    )


def choose(
    costs: Mapping[str, Sensitivity], weights: int, goal: Goal, rest: int = 0
) -> tuple[dict[str, str], float]:
    """The format of each matrix that meets a goal at the best of the other, and its divergence.

    Parameters
    ----------
    costs : Mapping
        By matrix.
    weights : int
        How many there are in all of them and the rest.
    goal : Goal
    rest : int
        Bytes that count too and that nothing is chosen for.

    Raises
    ------
    BudgetError
        If nothing meets it.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    pairs = [(name, text) for name, cost in costs.items() for text in cost.kl]
    kl = np.array([costs[name].kl[text] for name, text in pairs])
    nbytes = np.array([costs[name].nbytes[text] for name, text in pairs], dtype=float)
    row = {name: i for i, name in enumerate(costs)}
    rows = [row[name] for name, _ in pairs]
    one = coo_array((np.ones(len(pairs)), (rows, range(len(pairs)))))
    each = LinearConstraint(one, 1, 1)
    if goal.kl is not None:
        aim, other, most = nbytes / nbytes.max(), kl, goal.kl
    else:
        limit = goal.size if goal.size is not None else (goal.bits or 0) / 8 * weights
        aim, other, most = kl / max(kl.max(), 1e-30), nbytes, limit - rest
    # In shares of the limit, and to one part in ten thousand: the rest is below the prediction's.
    found = milp(
        aim,
        constraints=[each, LinearConstraint(other[None] / max(most, 1e-30), -np.inf, 1)],
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if found.x is None:
        least = rest + sum(min(cost.nbytes.values()) for cost in costs.values())
        best = sum(min(cost.kl.values()) for cost in costs.values())
        raise BudgetError(
            f"no formats meet the goal: the smallest take {format_bytes(least)}, "
            f"{8 * least / weights:.2f} bits a weight; the best a KL of {best:.5f}"
        )
    picked = [pair for pair, taken in zip(pairs, found.x, strict=True) if taken > 0.5]
    return dict(picked), float(sum(costs[name].kl[text] for name, text in picked))


def divergence(
    ckpt: Checkpoint, view: Checkpoint, decoder: Decoder, windows: NDArray[np.int64]
) -> float:
    """KL divergence of a compressed model from its source, in nats a token, a layer at a time.

    Parameters
    ----------
    ckpt, view : Checkpoint
        The source and what was made of it.
    decoder : Decoder
    windows : int64 [windows, tokens]
    """
    import torch

    windows = _cut(windows)
    last = ckpt.spec.num_layers
    with torch.no_grad():
        logits = []
        for of in (ckpt, view):
            x = embedded(of, decoder, windows)
            for layer in range(last):
                weights = read_floats(of, decoder.names(layer))
                x = torch.cat([decoder.run(layer, part, weights) for _, part in batches(x)])
            logits.append((x, read_floats(of, decoder.names(last))))
        total = 0.0
        for at in range(len(windows)):
            exact, close = (decoder.run(last, x[at : at + 1], weights)[0] for x, weights in logits)
            total += _kl(exact, close)
    return total / len(windows)
