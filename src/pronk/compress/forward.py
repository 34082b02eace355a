"""The decoder's plain graph in torch, a layer at a time, over windows of calibration text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.kinds import EMBEDDING
from pronk.device.cpu import read_cpu
from pronk.errors import PronkError, RequestError
from pronk.graph.build import build_decoder
from pronk.graph.ir import Op
from pronk.graph.reference import alibi_slopes
from pronk.graph.rope import rope_frequencies
from pronk.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Decoder",
    "Look",
    "embedded",
    "import_torch",
    "native_precision",
    "products",
    "set_threads",
]

Look = Callable[[str, "Tensor"], None]
"""Called with the name of a matrix and what it is about to be multiplied with, [tokens, cols]."""


def import_torch() -> None:
    """See that the ``torch`` package is there.

    Raises
    ------
    PronkError
        If it is not installed.
    """
    try:
        import torch  # noqa: F401 (whether it is there)
    except ImportError:
        raise PronkError(
            "compressing needs torch: pip install torch==2.13.0, then 'pronk[compress]'"
        ) from None


def set_threads(count: int) -> None:
    """Threads of what follows.

    Raises
    ------
    PronkError
        If torch is not installed.
    """
    import_torch()
    import torch

    torch.set_num_threads(count)


def native_precision() -> str:
    """``bf16`` where the CPU multiplies it natively, else ``f32``."""
    return "f32" if {"avx512_bf16", "amx_bf16"}.isdisjoint(read_cpu().features) else "bf16"


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """A context in which products are of this precision, ``bf16`` or ``f32``."""
    import torch

    # Casts are not kept: parameters change between steps, and in float32 they change unseen.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        yield


class Decoder:
    """A model's ops by layer; it holds no weights.

    Windows are rows of ids of one length, each a sequence from its first position on.

    Parameters
    ----------
    spec : ModelSpec
    precision : {"f32", "bf16"}
        Of products; sums, norms and what goes from layer to layer are float32.

    Raises
    ------
    RequestError
        If the model has experts, or layers that share weights.
    """

    def __init__(self, spec: ModelSpec, precision: str = "f32") -> None:
        import_torch()
        if spec.moe is not None or any(layer.weights is not None for layer in spec.layers):
            raise RequestError(
                f"{spec.name} has experts or shared layers, which compress cannot calibrate yet: "
                f"take a recipe that needs no calibration"
            )
        self.spec, self.precision = spec, precision
        self.graph = build_decoder(spec, lambda name: "f32")
        self.layers: list[list[Op]] = [[] for _ in spec.layers]
        self.head: list[Op] = []
        for op in self.graph.ops:
            at, dot, _ = op.output.partition(".")
            if op.kind == "attention":  # what caches take from keys changes nothing in floats
                op = replace(op, weights=())
            if dot and at.isdigit():
                self.layers[int(at)].append(op)
            elif op.kind in ("rms_norm", "layer_norm", "matmul", "softcap"):
                self.head.append(op)

    def names(self, layer: int) -> list[str]:
        """The tensors of a layer; those of the head for ``num_layers``."""
        return [name for op in self._ops(layer) for name in op.weights]

    def matrices(self, layer: int) -> list[list[str]]:
        """The matrices of a layer in the order they run, those of one input together."""
        stages: dict[str, list[str]] = {}
        for op in self._ops(layer):
            if op.kind == "matmul":
                stages.setdefault(op.inputs[0].value, []).append(op.weights[0])
        return list(stages.values())

    def scaled_by(self, layer: int, name: str) -> list[str] | None:
        """The tensors whose rows or elements scale a matrix's input; None if none alone do.

        That of a norm; the up projection, and its bias, of a gated MLP.
        """
        ops = {op.output: op for op in self._ops(layer)}
        source = next(op.inputs[0].value for op in ops.values() if name in op.weights)
        op = ops.get(source)
        if op is not None and op.kind in ("rms_norm", "layer_norm"):
            return list(op.weights)
        if op is not None and op.kind == "activate" and len(op.inputs) == 2:
            return list(ops[op.inputs[1].value].weights)
        return None

    def _ops(self, layer: int) -> list[Op]:
        return self.layers[layer] if layer < len(self.layers) else self.head

    def embed(self, table: Tensor) -> Tensor:
        """Rows of the embedding table as the first layer takes them."""
        return table * self.spec.embedding_scale

    def run(
        self,
        layer: int,
        x: Tensor,
        weights: Mapping[str, Tensor],
        look: Look | None = None,
        until: str = "",
    ) -> Tensor:
        """What a layer gives for windows; of the head, the logits.

        Parameters
        ----------
        layer : int
        x : float32 [windows, tokens, hidden]
            What the layer before gave.
        weights : Mapping
            Float32 tensors by name.
        look : callable, optional
            Is shown the inputs of matrices, each once for those that share it.
        until : str
            Stop once this matrix's input has been shown.

        Returns
        -------
        float32 [windows, tokens, width]
        """
        with products(self.precision):
            return self._run(self._ops(layer), x, weights, look, until)

    def _run(
        self, ops: list[Op], x: Tensor, weights: Mapping[str, Tensor], look: Look | None, until: str
    ) -> Tensor:
        values: dict[str, Tensor] = {ops[0].inputs[0].value: x}
        shown: set[str] = set()
        for op in ops:
            inputs = [values[ref.value] for ref in op.inputs if ref.value in values]
            if op.kind == "matmul" and look is not None and op.inputs[0].value not in shown:
                shown.add(op.inputs[0].value)
                look(op.weights[0], inputs[0].reshape(-1, inputs[0].shape[-1]).float())
                if until == op.weights[0]:
                    return inputs[0]
            values[op.output] = self._apply(op, inputs, [weights[n] for n in op.weights])
        return values[ops[-1].output].float()

    def _apply(self, op: Op, x: list[Tensor], w: list[Tensor]) -> Tensor:
        import torch
        import torch.nn.functional as fn

        match op.kind:
            case "rms_norm":
                return fn.rms_norm(x[0], x[0].shape[-1:], w[0], float(op.attrs["eps"]))
            case "layer_norm":
                return fn.layer_norm(x[0], x[0].shape[-1:], w[0], None, float(op.attrs["eps"]))
            case "head_norm":
                heads = x[0].unflatten(-1, (op.integer("heads"), -1))
                scale = w[0] if w else None
                return fn.rms_norm(heads, heads.shape[-1:], scale, float(op.attrs["eps"])).flatten(
                    -2
                )
            case "matmul":
                out = fn.linear(x[0], w[0], w[1] if len(w) > 1 else None)
                return out * float(op.attrs["scale"]) if "scale" in op.attrs else out
            case "rope":
                return self._rope(op, x[0])
            case "attention":
                return self._attention(op, *x)
            case "activate":
                out = _ACTIVATIONS[str(op.attrs["fn"])](x[0])
                return out * x[1] if len(x) > 1 else out
            case "add":
                return x[0] + x[1]
            case "softcap":
                cap = float(op.attrs["cap"])
                return cap * torch.tanh(x[0] / cap)
            case _:
                raise ValueError(f"compress cannot run {op.kind}")

    def _rope(self, op: Op, x: Tensor) -> Tensor:
        import torch

        rope = self.spec.ropes[int(op.inputs[1].value.partition(".")[2])]
        tokens = x.shape[1]
        frequencies = torch.from_numpy(rope_frequencies(rope, self.spec.head_dim, tokens))
        angles = torch.arange(tokens, dtype=torch.float32)[:, None, None] * frequencies
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        a, b = x.unflatten(-1, (op.integer("heads"), 2, -1)).unbind(-2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def _attention(self, op: Op, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        import torch

        spec, tokens = self.spec, q.shape[1]
        q, k, v = (part.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2) for part in (q, k, v))
        if "growth" in op.attrs:
            spans = (torch.arange(1, tokens + 1) // op.integer("growth_span")).float()
            q = q * (1 + float(op.attrs["growth"]) * torch.log1p(spans))[:, None]
        scale = float(op.attrs["scale"])
        if not {"window", "softcap", "alibi"} & set(op.attrs):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2).flatten(-2)
        groups = spec.num_heads // spec.num_kv_heads
        scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
        if "softcap" in op.attrs:
            scores = float(op.attrs["softcap"]) * torch.tanh(scores / float(op.attrs["softcap"]))
        at = torch.arange(tokens)
        back = at[:, None] - at
        slopes = torch.from_numpy(alibi_slopes(spec.num_heads, float(op.attrs.get("alibi", 0))))
        scores = scores - slopes[:, None, None] * back
        seen = back >= 0
        window = int(op.attrs.get("window", 0))
        if window:
            near = at[:, None] // window == at // window if op.attrs["chunked"] else back < window
            seen = seen & (near | (at < int(op.attrs.get("sinks", 0))))
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (p @ v.repeat_interleave(groups, 1)).transpose(1, 2).flatten(-2)


def _gelu_tanh(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.gelu(x, approximate="tanh")


def _functional(name: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        import torch

        out: Tensor = getattr(torch.nn.functional, name)(x)
        return out

    return call


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": _functional("silu"),
    "gelu": _functional("gelu"),
    "gelu_tanh": _gelu_tanh,
    "relu": _functional("relu"),
}


def embedded(of: Checkpoint, decoder: Decoder, windows: NDArray[np.int64]) -> Tensor:
    """Windows of ids as the first layer is given them, float32 [windows, tokens, hidden]."""
    import torch

    ids, where = np.unique(windows, return_inverse=True)
    table = np.concatenate([of.read_float(EMBEDDING, int(i), int(i) + 1) for i in ids])
    return decoder.embed(torch.from_numpy(table[where.reshape(windows.shape)]))
