"""Fitting a model to a budget: plan from the header, quantize, measure, and only then keep."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.bundle import BundleWriter
from pronk.checkpoint.bundle_config import check_bundled
from pronk.checkpoint.kinds import tensor_kind
from pronk.checkpoint.open import open_checkpoint
from pronk.compress.quantize import RoundToNearest
from pronk.device import footprint
from pronk.device.child import run_json
from pronk.device.plan import Candidate, candidates, fits, pareto, planned, refusal
from pronk.errors import BudgetError, PronkError
from pronk.graph.program import choose_context
from pronk.spec import MemoryPlan
from pronk.units import format_bytes

__all__ = ["FitReport", "Tools", "fit", "source_formats"]

Progress = Callable[[str, int, int], None]

_ATTEMPTS = 4
_LEAST_WINDOW, _WINDOW = 3, 512
_MOST_TOKENS = 4096  # enough to tell variants apart, in seconds


def _bench(path: Path, context: int, threads: int | None) -> dict[str, Any]:
    extra = [] if threads is None else ["--threads", str(threads)]
    extra += ["--context", str(context), "--tokens", str(max(2, min(128, context // 2)))]
    return run_json("pronk", ["bench", os.fspath(path), "--no-depth", "--json", *extra])


def _evaluate(path: Path, text: str | None, context: int, threads: int | None) -> dict[str, Any]:
    extra = [] if threads is None else ["--threads", str(threads)]
    # No longer than the context fitted to: more would need more memory than the budget.
    extra += ["--window", str(max(_LEAST_WINDOW, min(_WINDOW, context)))]
    if text is not None:
        extra += ["--text", text, "--max-tokens", str(_MOST_TOKENS)]
    return run_json("pronk", ["eval", os.fspath(path), "--json", *extra])


@dataclass(frozen=True, slots=True)
class Tools:
    """The measurements `fit` makes, each in a fresh process.

    Attributes
    ----------
    overhead : callable
        Checkpoint path to bytes.
    bench : callable
        Bundle path, context and threads to the JSON of ``pronk bench``.
    evaluate : callable
        Bundle path, text file, context and threads to the JSON of ``pronk eval``.
    """

    overhead: Callable[[Path], int] = footprint.measure
    bench: Callable[[Path, int, int | None], dict[str, Any]] = _bench
    evaluate: Callable[[Path, str | None, int, int | None], dict[str, Any]] = _evaluate


@dataclass(frozen=True, slots=True)
class FitReport:
    """What was considered, what was written and what was measured; sizes in bytes.

    ``rejected`` holds the variants that were written and took more than the budget, with the
    peak each was measured at.
    """

    source: str
    directory: str
    budget: int
    context: int
    considered: tuple[Candidate, ...]
    chosen: Candidate
    quantization_error: Mapping[str, float]
    measurements: Mapping[str, Any]
    rejected: tuple[tuple[Candidate, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data under stable names, for ``--json``."""
        return {
            "source": self.source,
            "directory": self.directory,
            "budget": {"memory": self.budget, "context": self.context},
            "considered": [one.to_dict() for one in self.considered],
            "rejected": [{**one.to_dict(), "peak_memory": peak} for one, peak in self.rejected],
            "formats": dict(self.chosen.variant.formats),
            "predicted_error": self.chosen.variant.predicted_error,
            "memory": self.chosen.plan.to_dict(),
            "quantization_error": dict(self.quantization_error),
            "measurements": dict(self.measurements),
        }


@dataclass(slots=True)
class _Work:
    """What stays the same from one attempt to the next."""

    ckpt: Checkpoint
    budget: int
    context: int
    text: str | None
    threads: int | None
    tools: Tools
    progress: Progress
    errors: dict[str, float] = field(default_factory=dict)


def source_formats(ckpt: Checkpoint) -> dict[str, dict[str, float]]:
    """Per tensor kind, the dtypes of its tensors and their shares of its parameters."""
    counts: dict[str, dict[str, int]] = {}
    for name, info in ckpt.tensors.items():
        kind = tensor_kind(name)
        # An embedding table that is not the head is not multiplied with.
        if kind is None or (name.endswith("embed_tokens.weight") and not ckpt.spec.tie_embeddings):
            continue
        size = info.shape[0] * info.shape[1] if len(info.shape) == 2 else 0
        by_dtype = counts.setdefault(kind, {})
        by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + size
    return {
        kind: {dtype: size / max(1, sum(sizes.values())) for dtype, size in sizes.items()}
        for kind, sizes in counts.items()
    }


def fit(
    source_path: str | os.PathLike[str],
    memory_bytes: int,
    context: int | None,
    out_dir: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    tools: Tools | None = None,
) -> FitReport:
    """Write the best variant of a model that holds a budget, as a bundle.

    Every variant is planned from the header. The best that fits is written beside `out_dir`
    and measured there; one that takes more than the budget gives way to the best that is
    smaller by the excess. The bundle appears in `out_dir` when all measurements are in it.

    Parameters
    ----------
    source_path : path
        A checkpoint.
    memory_bytes : int
        The budget: peak resident bytes of the whole process.
    context : int or None
        Tokens that must fit at once; 2,048, or all the model can, without.
    out_dir : path
        Where the bundle goes. A bundle that is there is replaced.
    text : path, optional
        UTF-8 text for the perplexity; Python's own documentation otherwise.
    threads : int, optional
        Threads to measure with.
    progress : callable, optional
        Called with what is being done, and how much of how much.
    tools : Tools, optional
        How to measure.

    Raises
    ------
    BudgetError
        If no variant holds the budget; it names the nearest that would.
    RequestError
        If the model is none that bundles are written of, the context is out of range, or
        `out_dir` holds something else than a bundle.
    """
    tools = tools or Tools()
    tell = progress or (lambda what, done, total: None)
    source = Path(source_path)
    with open_checkpoint(source) as ckpt:
        spec = ckpt.spec
        check_bundled(spec)
        context = choose_context(spec, context)
        with BundleWriter(out_dir) as writer:
            tell("measuring the overhead", 0, 1)
            overhead = tools.overhead(source)
            tell("measuring the overhead", 1, 1)
            found = candidates(spec, context, overhead, source_formats(ckpt))
            work = _Work(
                ckpt,
                memory_bytes,
                context,
                None if text is None else os.fspath(text),
                threads,
                tools,
                tell,
            )
            chosen, measurements, rejected = _attempt(work, found, writer)
            directory = writer.commit()
    return FitReport(
        source=os.fspath(source),
        directory=os.fspath(directory),
        budget=memory_bytes,
        context=context,
        considered=tuple(pareto(found)),
        chosen=chosen,
        quantization_error=work.errors,
        measurements=measurements,
        rejected=tuple(rejected),
    )


def _attempt(
    work: _Work, found: list[Candidate], writer: BundleWriter
) -> tuple[Candidate, dict[str, Any], list[tuple[Candidate, int]]]:
    """Write and measure variants until one holds the budget; it is left in `writer`."""
    within = fits(found, work.budget)
    if not within:
        raise refusal(work.ckpt.spec, found, work.budget, work.context)
    rejected: list[tuple[Candidate, int]] = []
    while within and len(rejected) < _ATTEMPTS:
        candidate = within[0]
        settled, peak, measurements = _write_and_measure(work, candidate, writer)
        if peak <= work.budget:
            return Candidate(candidate.variant, settled), measurements, rejected
        rejected.append((candidate, peak))
        limit = candidate.plan.total - (peak - work.budget)
        within = [
            one
            for one in within
            if one.plan.total <= limit and one.plan.weights < candidate.plan.weights
        ]
    smallest, peak = min(rejected, key=lambda pair: pair[1])
    raise BudgetError(
        f"no variant was measured within {format_bytes(work.budget)} at a context of "
        f"{work.context} tokens: the smallest tried took {format_bytes(peak)}, with "
        f"{smallest.variant}; give --memory {peak} or more, or a shorter --context"
    )


def _write_and_measure(
    work: _Work, candidate: Candidate, writer: BundleWriter
) -> tuple[MemoryPlan, int, dict[str, Any]]:
    """Write a variant; its plan as a bundle, its peak in bytes, and what was measured."""
    ckpt, formats = work.ckpt, candidate.variant.formats
    rounding = RoundToNearest()
    writer.write(
        ckpt,
        formats,
        quantize=rounding,
        meta={
            "source": {"name": ckpt.spec.name, "file": ckpt.path.name, "format": ckpt.format},
            "budget": {"memory": work.budget, "context": work.context},
            "plan": candidate.plan.to_dict(),
            "predicted_error": candidate.variant.predicted_error,
        },
        progress=lambda done, total: work.progress("quantizing", done, total),
    )
    work.errors = rounding.errors
    work.progress("measuring", 0, 2)
    # The bundle's tokenizer may be larger in memory than the source's, or smaller.
    overhead = work.tools.overhead(writer.path)
    settled = planned(ckpt.spec, formats, work.context).memory(overhead)
    if settled.total > work.budget:
        return settled, settled.total, {}
    bench = work.tools.bench(writer.path, work.context, work.threads)
    peak = bench.get("peak_memory")
    if type(peak) is not int or peak <= 0:
        raise PronkError("pronk bench --json did not give peak_memory")
    work.progress("measuring", 1, 2)
    bench.pop("model", None)  # a temporary path
    measurements: dict[str, Any] = {"bench": bench}
    if peak <= work.budget:
        measurements["eval"] = work.tools.evaluate(
            writer.path, work.text, work.context, work.threads
        )
        measurements["eval"].pop("model", None)
    work.progress("measuring", 2, 2)
    writer.update(
        plan=settled.to_dict(), measurements=measurements, quantization_error=rounding.errors
    )
    return settled, peak, measurements
