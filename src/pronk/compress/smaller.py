"""Making a model smaller: pruned, distilled or trained on a grid, measured and written."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pronk.checkpoint.arrange import expected_tensors
from pronk.checkpoint.bundle import BundleWriter
from pronk.checkpoint.kinds import tensor_kind
from pronk.checkpoint.open import open_checkpoint
from pronk.compress import fake_quant, sparse, structured
from pronk.compress import shape as shapes
from pronk.compress.layerwise import cut_windows
from pronk.compress.torch_model import ModelWriter, from_spec, state_of, to_transformers
from pronk.compress.training import Recipe, Trainer, compare, precision_of
from pronk.errors import RequestError
from pronk.spec import ModelSpec

__all__ = ["Pruning", "Text", "distill", "prune", "qat"]

Progress = Callable[[str, int, int], None]

_JUDGED = 2048  # tokens
_SPARSE = 0.25  # a matrix with such a share of zeros keeps them


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids: to calibrate on, to learn from, and to judge on, which neither of them holds."""

    calibration: Sequence[int]
    learned: Sequence[int]
    judged: Sequence[int]


@dataclass(frozen=True, slots=True)
class Pruning:
    """What to prune; sizes as `pronk.compress.shape.parse_keep` reads them.

    Parameters
    ----------
    layers, heads, mlp, hidden : str or None
        How many to keep.
    parameters : str or None
        How many parameters to keep; `pronk.compress.shape.shape_for` chooses the rest.
    sparsity : float or None
        Share of zeros in the layers' matrices.
    pattern : str or None
        ``unstructured`` or ``n:m``.
    method : str
        One of `pronk.compress.sparse.METHODS`.
    samples, window : int
        Calibration windows and their tokens.
    dtype : {"bfloat16", "float32"}
        Of the weights written.
    """

    layers: str | None = None
    heads: str | None = None
    mlp: str | None = None
    hidden: str | None = None
    parameters: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    method: str = "sparsegpt"
    samples: int = 16
    window: int = 512
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RequestError(f"--samples must be 1 window or more, not {self.samples}")

    def shape(self, spec: ModelSpec) -> shapes.Shape:
        """The shape asked for.

        Raises
        ------
        RequestError
            If a size is out of range.
        """
        have = shapes.shape_of(spec)
        if self.parameters is not None:
            if any((self.layers, self.heads, self.mlp, self.hidden)):
                raise RequestError("--parameters chooses all sizes: leave the others out")
            count = shapes.count_parameters(spec)
            return shapes.shape_for(
                spec, shapes.parse_keep(self.parameters, count, 1, "--parameters")
            )

        def keep(text: str | None, most: int, step: int, option: str) -> int:
            return most if text is None else shapes.parse_keep(text, most, step, option)

        return shapes.Shape(
            keep(self.layers, have.layers, 1, "--layers"),
            keep(self.heads, have.kv_heads, 1, "--heads"),
            keep(self.mlp, have.mlp, shapes.STEP, "--mlp"),
            keep(self.hidden, have.hidden, shapes.STEP, "--hidden"),
        )

    def zeros(self) -> sparse.Pattern | None:
        """The sparsity asked for, if any."""
        if self.sparsity is None and self.pattern is None:
            return None
        return sparse.parse_pattern(self.pattern or "unstructured", self.sparsity)


def prune(
    source: Path,
    pruning: Pruning,
    text: Text,
    directory: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    tell: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write a smaller model: pruned to a shape, made sparse, and distilled from what it was.

    Parameters
    ----------
    source : Path
        A checkpoint of a Llama, Mistral or Qwen2.
    pruning : Pruning
    text : Text
    directory : path
        Where the Hugging Face directory goes; one that Pronk made smaller before is replaced.
    recipe : Recipe, optional
        How to recover, by distillation from the model as it was.
    tell : callable
        Called with a stage, what is done and what is to do.

    Returns
    -------
    dict
        Plain data: sizes, sparsity, and what was measured before and after the recovery.

    Raises
    ------
    RequestError
        If the model, a size or the text is none that this can be done with.
    """
    with open_checkpoint(source) as ckpt, ModelWriter(directory) as writer:
        spec, shape, zeros = ckpt.spec, pruning.shape(ckpt.spec), pruning.zeros()
        small = shapes.resized(spec, shape)
        if small == spec and zeros is None:
            raise RequestError("nothing to prune: give --parameters, --layers, --heads, --mlp, "
                               "--hidden or --sparsity")  # fmt: skip
        _matchable(recipe, spec, small)
        windows = cut_windows(text.calibration, pruning.window, pruning.samples)
        judged = _to_judge(text, pruning.window)
        teacher = to_transformers(ckpt)
        student = copy.deepcopy(teacher)
        kept = structured.prune(student, windows, shape, tell)
        student = _settled(student, small)
        report: dict[str, Any] = {
            "verb": "prune",
            "source": spec.name,
            "pruning": asdict(pruning),
            "shape": {"before": asdict(shapes.shape_of(spec)), "after": asdict(shape)},
            "parameters": _counts(spec, small),
            "kept": kept,
        }
        if zeros is not None:
            made = sparse.sparsify(student, windows, pruning.method, zeros, tell)
            report["sparse"] = {**made, **_sparse_sizes(small, zeros)}
        report["measured"] = {"pruned": compare(student, teacher, judged)}
        trainer = None
        if recipe is not None:
            layers = kept.get("layers", range(spec.num_layers))
            pairs = list(enumerate(layers))
            trainer = _train(student, teacher, text, recipe, writer.target, pairs, tell)
            report |= _trained(trainer, recipe)
            report["measured"]["recovered"] = compare(student, teacher, judged)
        writer.write(student, small, ckpt.load_tokenizer(), report, pruning.dtype)
        if trainer is not None:
            trainer.done()
    return {**report, "directory": os.fspath(writer.target)}


def distill(
    student_path: Path,
    teacher_path: Path,
    text: Text,
    directory: str | os.PathLike[str],
    recipe: Recipe,
    *,
    dtype: str = "bfloat16",
    tell: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train a model on the predictions of another and write the result.

    A matrix with a quarter of zeros or more keeps them. Where both models are equally wide,
    hidden states can be matched: those of the student's layers with evenly spaced ones of the
    teacher's, the last with the last.

    Raises
    ------
    RequestError
        If the vocabularies differ; see `prune`.
    """
    with (
        open_checkpoint(student_path) as ckpt,
        open_checkpoint(teacher_path) as other,
        ModelWriter(directory) as writer,
    ):
        spec, wide = ckpt.spec, other.spec
        if spec.vocab_size != wide.vocab_size:
            raise RequestError(
                f"the student has {spec.vocab_size} tokens in its vocabulary and the teacher "
                f"{wide.vocab_size}: they must share one"
            )
        _matchable(recipe, wide, spec)
        judged = _to_judge(text, recipe.window)
        student, teacher = to_transformers(ckpt), to_transformers(other)
        ratio = wide.num_layers / spec.num_layers
        pairs = [(i, max(0, round((i + 1) * ratio) - 1)) for i in range(spec.num_layers)]
        measured = {"before": compare(student, teacher, judged)}
        trainer = _train(student, teacher, text, recipe, writer.target, pairs, tell)
        measured["distilled"] = compare(student, teacher, judged)
        report = {
            "verb": "distill",
            "source": spec.name,
            "teacher": wide.name,
            "parameters": _counts(wide, spec),
            **_trained(trainer, recipe),
            "measured": measured,
        }
        writer.write(student, spec, ckpt.load_tokenizer(), report, dtype)
        trainer.done()
    return {**report, "directory": os.fspath(writer.target)}


def qat(
    source: Path,
    grid: fake_quant.Grid,
    text: Text,
    directory: str | os.PathLike[str],
    recipe: Recipe,
    *,
    tell: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train a model's matrices on a grid, on its own predictions, and write a bundle.

    The teacher is the model in float (self-distillation, as in LLM-QAT, arXiv:2305.17888). The
    bundle holds exactly the trained codes and scales: those of 2 to 4 bits as int4, since Pronk
    runs nothing narrower. Embedding and head are int8.

    Raises
    ------
    RequestError
        If the groups do not divide the rows; see `prune`.
    """
    with open_checkpoint(source) as ckpt, BundleWriter(directory) as writer:
        judged = _to_judge(text, recipe.window)
        teacher = to_transformers(ckpt)
        student = copy.deepcopy(teacher)
        names = fake_quant.attach(student, grid, clip=False)
        measured = {"rounded": compare(student, teacher, judged)}
        for name in names:
            module = student.get_submodule(name.removesuffix(".weight"))
            held = module.parametrizations.weight
            held[0].scale.data.copy_(fake_quant.fit_scales(held.original.detach(), grid))
        measured["clipped"] = compare(student, teacher, judged)
        trainer = _train(student, teacher, text, recipe, writer.target, [], tell, "training")
        measured["trained"] = compare(student, teacher, judged)
        blocks = fake_quant.GridBlocks(student, grid)
        report = {
            "verb": "qat",
            "source": ckpt.spec.name,
            "format": str(grid),
            "formats": blocks.formats,
            "bits": {"stored": 4.5 if grid.bits <= 4 else 8.5, "packed": grid.bits_a_weight},
            **_trained(trainer, recipe),
            "measured": measured,
        }
        writer.write(ckpt, blocks.formats, quantize=blocks, meta={"changes": report})
        writer.commit()
        trainer.done()
    return {**report, "directory": os.fspath(writer.target)}


def _matchable(recipe: Recipe | None, teacher: ModelSpec, student: ModelSpec) -> None:
    if recipe is not None and recipe.hidden and teacher.hidden_size != student.hidden_size:
        raise RequestError(
            f"the teacher is {teacher.hidden_size} wide and the student {student.hidden_size}: "
            "hidden states can be matched only where they are equally wide; leave "
            "--hidden-weight out"
        )


def _to_judge(text: Text, window: int) -> Any:
    return cut_windows(text.judged, window, max(1, _JUDGED // window), "text to judge on")


def _settled(model: Any, spec: ModelSpec) -> Any:
    """The model as its new config makes it, its weights those of `model`."""
    import torch

    made = from_spec(spec)
    own = dict(made.named_parameters())
    with torch.no_grad():
        for name, values in state_of(model, spec).items():
            own[name].copy_(values)
    return made


def _train(
    student: Any,
    teacher: Any,
    text: Text,
    recipe: Recipe,
    target: Path,
    pairs: list[tuple[int, int]],
    tell: Progress,
    what: str = "distilling",
) -> Trainer:
    masks = {}
    for name, weight in student.named_parameters():
        if tensor_kind(name) and float((weight == 0).float().mean()) >= _SPARSE:
            masks[name] = weight.detach() != 0
    trainer = Trainer(
        student, teacher, text.learned, recipe, target.parent / f".{target.name}.training",
        matched=pairs, masks=masks,
    )  # fmt: skip
    trainer.run(tell, what)
    return trainer


def _trained(trainer: Trainer, recipe: Recipe) -> dict[str, Any]:
    return {
        "recipe": {**asdict(recipe), "precision": precision_of(recipe)},
        "resumed_at": trainer.resumed,
        "losses": trainer.losses,
    }


def _counts(before: ModelSpec, after: ModelSpec) -> dict[str, Any]:
    old, new = shapes.count_parameters(before), shapes.count_parameters(after)
    return {"before": old, "after": new, "removed": 1 - new / old}


def _sparse_sizes(spec: ModelSpec, pattern: sparse.Pattern) -> dict[str, Any]:
    """Bytes of the sparse matrices: dense, as they are stored and run, and as sparse int4."""
    count = sum(
        math.prod(dims)
        for name, dims in expected_tensors(spec)
        if tensor_kind(name) not in (None, "head")
    )
    return {
        "pattern": str(pattern),
        "weights": count,
        "bytes_dense_int4": int(count * 4.5 / 8),
        "bytes_sparse_int4": int(count * sparse.stored_bits(pattern) / 8),
    }
