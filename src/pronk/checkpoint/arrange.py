"""Stored tensors under canonical names: what a spec calls for, and which rows of what it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pronk.checkpoint.base import TensorInfo, row_bytes
from pronk.checkpoint.families import Family, Names
from pronk.checkpoint.rows import MoreByOne, Paired, Part, Rows, Strip, Tensor, Transposed, joined
from pronk.errors import CheckpointError
from pronk.spec import ModelSpec

__all__ = ["GGUF_NAMES", "arrange", "check_tensors", "expected_tensors", "gguf_parts", "rotated"]

GGUF_NAMES: Names = MappingProxyType(
    {
        "token_embd": ("model.embed_tokens",),
        "output_norm": ("model.norm",),
        "output": ("lm_head",),
        "attn_norm": ("input_layernorm",),
        "ffn_norm": ("post_attention_layernorm",),
        "post_attention_norm": ("post_attention_layernorm",),
        "post_ffw_norm": ("post_feedforward_layernorm",),
        "attn_q": ("self_attn.q_proj",),
        "attn_k": ("self_attn.k_proj",),
        "attn_v": ("self_attn.v_proj",),
        "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_output": ("self_attn.o_proj",),
        "attn_q_norm": ("self_attn.q_norm",),
        "attn_k_norm": ("self_attn.k_norm",),
        "ffn_gate": ("mlp.gate_proj",),
        "ffn_up": ("mlp.up_proj",),
        "ffn_down": ("mlp.down_proj",),
        "ffn_gate_inp": ("mlp.router",),
        "ffn_gate_exps": ("mlp.experts.gate_proj",),
        "ffn_up_exps": ("mlp.experts.up_proj",),
        "ffn_down_exps": ("mlp.experts.down_proj",),
        "ffn_gate.*": ("mlp.experts.gate_proj",),
        "ffn_up.*": ("mlp.experts.up_proj",),
        "ffn_down.*": ("mlp.experts.down_proj",),
        "ffn_gate_shexp": ("mlp.shared.gate_proj",),
        "ffn_up_shexp": ("mlp.shared.up_proj",),
        "ffn_down_shexp": ("mlp.shared.down_proj",),
    }
)
"""Modules of GGUF files; those named ``*`` are from before experts were put together."""

_ROTATED = ("q_proj", "k_proj")


def expected_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors a model of this spec consists of."""
    hidden = spec.hidden_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield "model.embed_tokens.weight", (spec.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    attention["o_proj"] = (hidden, q)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if spec.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i, kind in enumerate(spec.layers):
        if kind.weights is not None:
            continue
        layer = f"model.layers.{i}."
        for norm in norms:
            yield f"{layer}{norm}.weight", (hidden,)
        for part, shape in attention.items():
            yield f"{layer}self_attn.{part}.weight", shape
            if spec.output_bias if part == "o_proj" else spec.attention_bias:
                yield f"{layer}self_attn.{part}.bias", shape[:1]
        if kind.qk_norm in ("head", "full"):
            whole = kind.qk_norm == "full"
            yield f"{layer}self_attn.q_norm.weight", (q if whole else spec.head_dim,)
            yield f"{layer}self_attn.k_norm.weight", (kv if whole else spec.head_dim,)
        yield from _mlp(spec, kind.mlp, f"{layer}mlp.")


def _mlp(spec: ModelSpec, kind: str, at: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = spec.hidden_size, spec.intermediate_size
    if kind == "moe":
        if spec.moe is None:
            raise ValueError("a layer has experts, but the spec has no sizes of them")
        experts = spec.moe.experts
        yield f"{at}router.weight", (experts, hidden)
        yield from _projections(f"{at}experts.", spec.moe.intermediate_size, hidden, experts)
        at, width = f"{at}shared.", spec.moe.shared_size
        if not width:
            return
    yield from _projections(at, width, hidden, gated=kind != "plain")


def _projections(
    at: str, width: int, hidden: int, count: int = 1, gated: bool = True
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if gated:
        yield f"{at}gate_proj.weight", (count * width, hidden)
    yield f"{at}up_proj.weight", (count * width, hidden)
    yield f"{at}down_proj.weight", (count * hidden, width)


def check_tensors(path: Path, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those its spec calls for."""
    found = 0
    for name, shape in expected_tensors(spec):
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{path} has no tensor {name!r}, which a model of {spec.num_layers} layers needs"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{path} has tensor {name!r} of shape {info.shape} where its header "
                f"calls for {shape}"
            )
        found += 1
    if found != len(tensors):
        known = {name for name, _ in expected_tensors(spec)}
        extra = next(name for name in tensors if name not in known)
        raise CheckpointError(
            f"{path} has a tensor {extra[:80]!r} that is no part of the {spec.family} architecture"
        )


@dataclass(slots=True)
class _Arranging:
    path: Path
    family: Family
    spec: ModelSpec
    gguf: bool
    expected: dict[str, tuple[int, ...]]
    out: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    strip: Strip = field(default_factory=Strip)

    def refuse(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} has tensor {name[:80]!r} {what}")

    def put(self, name: str, tensor: Tensor) -> None:
        if name in self.out:
            raise CheckpointError(f"{self.path} has the tensor {name[:80]!r} twice")
        if name in self.expected:
            tensor = self.rotated(name, self.counted(name, tensor))
        self.out[name] = tensor

    def rotated(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of heads in halves, where the file has their rotary pairs side by side."""
        family, (info, rows) = self.family, tensor
        adjacent = family.pairs_adjacent if self.gguf else family.hf_pairs_adjacent
        if not adjacent or not rotated(name):
            return tensor
        if info.shape != self.expected[name]:
            return tensor  # refused later, by its shape
        item = 0 if len(info.shape) > 1 else info.nbytes // info.cols
        return info, Paired(rows, self.spec.head_dim, item)

    def counted(self, name: str, tensor: Tensor) -> Tensor:
        """Weights of norms as factors, where the file has them less by one."""
        info, rows = tensor
        if self.gguf or not self.family.norm_adds_one or "norm" not in name.split(".")[-2]:
            return tensor
        info = TensorInfo(name, "f32", info.shape, 4 * info.rows * info.cols)
        return info, MoreByOne(rows, tensor[0].dtype, info.cols)

    def whole(self, name: str, tensor: Tensor) -> None:
        """A tensor that is one canonical one; experts one after the other are rows."""
        info, rows = tensor
        shape = info.shape
        want = self.expected.get(name)
        if len(shape) == 3 and want is not None and ".experts." in name:
            moe = self.spec.moe
            if moe is not None and shape[0] == moe.experts:
                shape = (shape[0] * shape[1], shape[2])
        self.put(name, (TensorInfo(name, info.dtype, shape, info.nbytes), rows))

    def split(self, stored: str, names: list[str], tensor: Tensor) -> None:
        """Several canonical tensors whose rows are one after the other in a stored one."""
        info, rows = tensor
        wanted = [self.expected.get(name) for name in names]
        total = sum(math.prod(want[:-1]) for want in wanted if want)
        if len(info.shape) != 2 or not all(want and len(want) == 2 for want in wanted):
            raise self.refuse(stored, f"of shape {info.shape}, which Pronk cannot take apart")
        if info.shape[0] != total:
            raise self.refuse(stored, f"of {info.shape[0]} rows where its header calls for {total}")
        width, first = row_bytes(info.dtype, info.cols), 0
        for name, want in zip(names, wanted, strict=True):
            count = want[0] if want else 0
            shape = (count, info.cols)
            part = Part(rows, first, count, width)
            self.put(name, (TensorInfo(name, info.dtype, shape, count * width), part))
            first += count

    def transpose(self, stored: str, names: list[str], tensor: Tensor) -> None:
        """Llama 4's experts, [experts, columns, rows] of the matrices that others store."""
        info, rows = tensor
        moe, span = self.spec.moe, rows.span()
        if moe is None or span is None or info.dtype not in ("f32", "f16", "bf16"):
            raise self.refuse(stored, "of a type that Pronk cannot transpose")
        each = [(self.expected.get(name) or (0, 0))[0] // moe.experts for name in names]
        height = (self.expected.get(names[0]) or (0, 0))[1]
        if info.shape != (moe.experts, height, sum(each)):
            raise self.refuse(
                stored,
                f"of shape {info.shape} where its header calls for "
                f"{(moe.experts, height, sum(each))}",
            )
        item, first = row_bytes(info.dtype, 1), 0
        for name, count in zip(names, each, strict=True):
            made = Transposed(
                self.path, span.fd, span.offset, height, sum(each), item, first, count, self.strip
            )
            shape = (moe.experts * count, height)
            self.put(name, (TensorInfo(name, info.dtype, shape, math.prod(shape) * item), made))
            first += count

    def join(self, name: str, found: dict[int, Tensor]) -> None:
        """One tensor of experts that are stored one by one."""
        moe = self.spec.moe
        count = moe.experts if moe is not None else 0
        if sorted(found) != list(range(count)):
            raise CheckpointError(
                f"{self.path} has {len(found)} experts in {name!r} where its header calls for "
                f"{count}"
            )
        infos = [found[i][0] for i in range(count)]
        first = infos[0]
        if any((info.dtype, info.shape) != (first.dtype, first.shape) for info in infos):
            raise CheckpointError(
                f"{self.path} has experts in {name!r} that differ in shape or type"
            )
        if len(first.shape) != 2:
            raise self.refuse(name, f"of shape {first.shape}, which is no matrix")
        shape = (count * first.shape[0], first.shape[1])
        rows: Rows = joined([found[i][1] for i in range(count)], first.shape[0])
        self.put(name, (TensorInfo(name, first.dtype, shape, count * first.nbytes), rows))


def arrange(
    path: Path, family: Family, spec: ModelSpec, stored: Mapping[str, Tensor], gguf: bool = False
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under canonical names, none of them read.

    What has no canonical name keeps its own, and `check_tensors` refuses it.
    """
    a = _Arranging(path, family, spec, gguf, dict(expected_tensors(spec)))
    names = {**GGUF_NAMES, **family.gguf_names} if gguf else family.hf_names
    prefix = "blk." if gguf else family.layer_prefix
    for name, tensor in stored.items():
        at, module, leaf, expert = _parse(name, prefix, gguf)
        new = names.get(module)
        if new is None:
            if gguf:
                raise CheckpointError(
                    f"{path} has a tensor {name[:80]!r} that is no part of the {family.gguf} "
                    f"architecture"
                )
            a.whole(name, tensor)
            continue
        canonical = [f"{at}{one}.{leaf or 'weight'}" for one in new]
        if "*" in module:
            a.experts.setdefault(canonical[0], {})[expert] = tensor
        elif not leaf:
            a.transpose(name, canonical, tensor)
        elif len(canonical) > 1:
            a.split(name, canonical, tensor)
        else:
            a.whole(canonical[0], tensor)
    for name, found in a.experts.items():
        a.join(name, found)
    return a.out


def rotated(name: str) -> bool:
    """Whether a tensor's rows are those of heads that rotary embedding turns."""
    return name.split(".")[-2] in _ROTATED


def gguf_parts(name: str, family: Family) -> list[str]:
    """The canonical tensors, one after the other, that a stored tensor of a GGUF file holds."""
    at, module, leaf, _ = _parse(name, "blk.", True)
    new = {**GGUF_NAMES, **family.gguf_names}.get(module, ())
    return [f"{at}{one}.{leaf}" for one in new]


def _parse(name: str, prefix: str, gguf: bool) -> tuple[str, str, str, int]:
    """Layer prefix, module, leaf and expert of a stored name."""
    at, rest = "", name
    if name.startswith(prefix):
        number, _, inner = name[len(prefix) :].partition(".")
        if number.isascii() and number.isdigit():
            at, rest = f"model.layers.{number}.", inner
    module, _, leaf = rest.rpartition(".")
    if leaf not in ("weight", "bias"):
        module, leaf = rest, ""
    expert, parts = -1, module.split(".")
    for i, part in enumerate(parts):
        if at and part.isascii() and part.isdigit() and len(part) < 6:
            expert, parts[i] = int(part), "*"
    return at, ".".join(parts), leaf, expert
