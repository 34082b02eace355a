"""The graph: values with one symbolic dimension, ops, weights. Plain frozen data.

A value is a matrix of ``rows`` x ``width``: ``rows`` is ``"T"`` (the tokens of a step), ``"R"``
(the rows whose logits are asked for) or ``"X"`` (the rows of experts: one for each of a token's
choices). Its dtype is ``"f32"``, or ``"a8"`` or ``"a12"``, the forms in which activations meet
quantized weights: integers of 8 or 12 bits in groups of 32 with a float scale each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pronk.graph.pack import ACT_RANGE, ACT_ROWS, GROUPED, act_row_bytes, align, block_dtype

__all__ = ["Attr", "Graph", "Op", "Ref", "Value", "Weight"]

Attr = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Value:
    """A matrix that an op produces."""

    name: str
    rows: str
    width: int
    dtype: str = "f32"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the arena, a multiple of 64."""
        return align(act_row_bytes(self.width, self.dtype))

    @property
    def quantized(self) -> bool:
        """Whether rows are integers rather than floats."""
        return self.dtype in ACT_RANGE

    def bytes_of(self, rows: int) -> int:
        """Bytes of so many rows; quantized ones come in blocks."""
        return self.row_bytes * (align(rows, ACT_ROWS) if self.quantized else rows)


@dataclass(frozen=True, slots=True)
class Ref:
    """An input: a value from a column on."""

    value: str
    column: int = 0


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the checkpoint (or computed from the spec) as the ops use it.

    ``dtype`` is the packed format of a matrix; a vector (``rows`` 1) is always float32.
    """

    name: str
    rows: int
    cols: int
    dtype: str

    @property
    def grouped(self) -> bool:
        """Whether the format is quantized in groups, so that it meets quantized activations."""
        return block_dtype(self.dtype) in GROUPED


@dataclass(frozen=True, slots=True)
class Op:
    """One step: ``output`` = kind(inputs, weights, attrs)."""

    kind: str
    inputs: tuple[Ref, ...]
    output: str
    weights: tuple[str, ...] = ()
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def with_attrs(self, **attrs: Attr) -> Op:
        """A copy with attributes added or changed."""
        return replace(self, attrs={**self.attrs, **attrs})

    def integer(self, name: str) -> int:
        """An attribute that must be an integer."""
        return int(self.attrs[name])


@dataclass(frozen=True, slots=True)
class Graph:
    """Ops in execution order, and what they name. ``output`` is the logits' value."""

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, Weight]
    output: str

    def uses(self) -> dict[str, int]:
        """How many ops read each value (the output counts as one more)."""
        count = dict.fromkeys(self.values, 0)
        for op in self.ops:
            for name in {ref.value for ref in op.inputs}:
                count[name] += 1
        count[self.output] += 1
        return count

    def with_ops(self, ops: list[Op], values: Mapping[str, Value]) -> Graph:
        """The same graph with other ops; values that nothing produces are dropped."""
        kept = {op.output for op in ops}
        return replace(self, ops=tuple(ops), values={k: v for k, v in values.items() if k in kept})

    def check(self) -> None:
        """Raise ValueError unless every name is defined before it is used."""
        seen: set[str] = set()
        for op in self.ops:
            for ref in op.inputs:
                if ref.value not in seen:
                    raise ValueError(f"{op.kind} reads {ref.value} before it is produced")
            missing = [w for w in op.weights if w not in self.weights]
            if missing or op.output not in self.values:
                raise ValueError(f"{op.kind} names {missing or op.output}, which is not there")
            seen.add(op.output)
        if self.output not in seen:
            raise ValueError(f"nothing produces the output {self.output}")

    def format(self) -> str:
        """One line an op, as ``pronk inspect --graph`` prints it."""
        lines = []
        for op in self.ops:
            value = self.values[op.output]
            inputs = [r.value + (f"[{r.column}:]" if r.column else "") for r in op.inputs]
            weights = [
                f"{name}:{w.dtype}[{w.rows}x{w.cols}]"
                for name in op.weights
                for w in (self.weights[name],)
            ]
            attrs = [f"{k}={v}" for k, v in op.attrs.items()]
            arguments = ", ".join(inputs + weights + attrs)
            lines.append(
                f"{value.name}: {value.dtype}[{value.rows}x{value.width}] = {op.kind}({arguments})"
            )
        return "\n".join(lines)
