"""Compressing a checkpoint by a recipe: step by step, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.base import Checkpoint, row_bytes
from pronk.checkpoint.bundle import BundleWriter
from pronk.checkpoint.bundle_config import check_bundled
from pronk.checkpoint.gguf_write import check_gguf, write_gguf
from pronk.checkpoint.kinds import EMBEDDING, EMBEDDING_DTYPE, HEAD
from pronk.checkpoint.open import open_checkpoint
from pronk.checkpoint.storage import Storage, parse_storage
from pronk.compress.bits import (
    Goal,
    choose,
    divergence,
    probe_steps,
    sensitivity,
)
from pronk.compress.calibrate import Calibration, Inputs, batches, read_calibration
from pronk.compress.forward import Decoder, embedded, import_torch, native_precision
from pronk.compress.layers import (
    Made,
    compress_layer,
    compress_plainly,
    is_matrix,
    read_floats,
)
from pronk.compress.quantize import CHUNK_BYTES, quantize_tensor
from pronk.compress.recipes import Recipe
from pronk.compress.report import CompressReport
from pronk.compress.stages import Compressed, Stages
from pronk.compress.static import observe
from pronk.compress.tune import Tuner
from pronk.errors import PronkError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressReport", "check_groups", "compress"]

Progress = Callable[[str, int, int], None]

_HEAD_TOKENS = 1 << 12  # most tokens whose logits an output head that comes first is fitted to


@dataclass(slots=True)
class _Work:
    """What stays the same from step to step."""

    ckpt: Checkpoint
    recipe: Recipe
    storages: dict[str, Storage]
    calibration: Calibration | None
    seed: int
    stages: Stages
    progress: Progress
    decoders: dict[str, Decoder] = field(default_factory=dict)  # by precision
    dtypes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    sensitivity: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return EMBEDDING if self.ckpt.spec.tie_embeddings else HEAD


def check_groups(ckpt: Checkpoint, storages: Mapping[str, Storage]) -> None:
    """Refuse groups that do not divide the rows of a matrix.

    Raises
    ------
    RequestError
        It names the groups that would.
    """
    widths = {ckpt.tensors[name].cols for name in storages}
    for name, storage in storages.items():
        cols = ckpt.tensors[name].cols
        if storage.kind == "int" and cols % storage.unit:
            good = [str(g) for g in range(32, 257, 32) if not any(w % g for w in widths)]
            what = f"groups of {storage.group}" if storage.group else "blocks of 32"
            also = f"give --group-size {', '.join(good)} or channel" if good else "take fp8 or bf16"
            raise RequestError(f"{what} do not divide the rows of {name} ({cols}): {also}")


def compress(
    source_path: str | os.PathLike[str],
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    group: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    samples: int = 64,
    seed: int = 0,
    goal: Goal | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Write a checkpoint in fewer bits, as a bundle or, by its name, as a GGUF file.

    Layers are compressed one after the other, each on what the compressed ones before it
    give; memory holds one of them in float32, and the windows of calibration text between two.
    Finished layers are kept beside the output, and the same call goes on behind them.

    Parameters
    ----------
    source_path : path
        A checkpoint.
    recipe : Recipe
    output : path
        A directory, or a file that ends in ``.gguf``; what is there is replaced at the end.
    group : str, optional
        ``g64`` or ``channel``, in the place of the recipe's own.
    calibration : path, optional
        UTF-8 text; Python's own documentation otherwise.
    samples, seed : int
        Most windows of it, and the seed of their draw.
    goal : Goal, optional
        What automatic bits are to meet; for recipes that choose formats, and only those.
    progress : callable, optional
        Called with what is being done, and how many weights of how many are done.

    Raises
    ------
    RequestError
        If the text, a group or the output will not do.
    PronkError
        If torch is missing, or the disk is full; what was there is untouched.
    """
    import_torch()
    begun = time.monotonic()
    source, target = Path(source_path), Path(os.path.realpath(output))
    tell = progress or (lambda what, done, total: None)
    if (goal is None) == recipe.automatic:
        raise RequestError(
            f"recipe {recipe.name} needs one of --bits, --size and --kl"
            if recipe.automatic
            else f"recipe {recipe.name} has its formats: --bits, --size and --kl are for auto"
        )
    with open_checkpoint(source) as ckpt:
        to_gguf = target.suffix == ".gguf"
        names = [n for n in ckpt.tensors if is_matrix(ckpt, n)]
        if not ckpt.spec.tie_embeddings and not to_gguf:
            names.remove(EMBEDDING)  # of which a bundle keeps floats
        storages = _storages(ckpt, names, recipe, group)
        if recipe.tune and all(storage.kind != "int" for storage in storages.values()):
            raise RequestError(f"recipe {recipe.name} has no scales to tune")
        if to_gguf:
            if recipe.automatic:
                raise RequestError("bits are chosen for bundles only yet: give -o a directory")
            if recipe.static:
                raise RequestError("no GGUF file holds scales of inputs: give -o a directory")
            check_gguf(ckpt, target, storages)
        else:
            check_bundled(ckpt.spec, {name: str(storage) for name, storage in storages.items()})
            _check_bundle(storages)
            BundleWriter(target).check()
        text = None
        if recipe.calibrated:
            text = read_calibration(ckpt, calibration, samples, seed)
        key = {**_key(ckpt, recipe, storages, text, seed), "goal": str(goal)}
        with Stages(target, key) as stages:
            work = _Work(ckpt, recipe, storages, text, seed, stages, tell)
            prediction = _automatic(work, goal) if goal is not None else {}
            _run(work)
            tuning = _tune(work) if recipe.tune else None
            view = _view(work)
            if text is not None and goal is not None:
                prediction["measured_kl"] = divergence(ckpt, view, _decoder(work), text.windows)
            report = CompressReport(
                source=os.fspath(source),
                output=os.fspath(target),
                recipe=recipe,
                group=group or recipe.group,
                formats={name: str(storage) for name, storage in storages.items()},
                weight_bytes=sum(
                    view.tensors[n].nbytes
                    if to_gguf
                    else s.row_bytes(ckpt.tensors[n].cols) * ckpt.tensors[n].rows
                    for n, s in storages.items()
                ),
                weights=sum(_size(work, name) for name in storages),
                errors=work.errors,
                provenance=_provenance(key, text),
                seconds=time.monotonic() - begun,
                prediction=prediction or None,
                sensitivity=work.sensitivity,
                tuning=tuning,
            )
            if to_gguf:
                write_gguf(view, ckpt, target)
            else:
                _write_bundle(view, work, target, report)
            stages.remove()
    return report


def _storages(
    ckpt: Checkpoint, names: list[str], recipe: Recipe, group: str | None
) -> dict[str, Storage]:
    """The format of each matrix; where those are chosen later, the largest that may be."""
    if recipe.automatic:
        storages = dict.fromkeys(names, parse_storage("int8-g32"))
        check_groups(ckpt, storages)
        return storages
    storages = {name: recipe.storage(name, ckpt.tensors[name].cols, group) for name in names}
    check_groups(ckpt, storages)
    return storages


def _check_bundle(storages: Mapping[str, Storage]) -> None:
    for name, storage in storages.items():
        if storage.kind == "k":
            raise RequestError(
                f"no bundle holds {name} as {storage}: give -o a file that ends in .gguf"
            )


def _automatic(work: _Work, goal: Goal) -> dict[str, float]:
    """Measure what each matrix costs, and set the formats that meet a goal."""
    ckpt, decoder = work.ckpt, _decoder(work)
    if work.calibration is None:
        raise ValueError("there is no calibration")
    measured: dict[str, Any] = {}
    steps = probe_steps(ckpt, decoder, work.calibration.windows)
    count = ckpt.spec.num_layers + 1
    if work.stages.done(f"probe-{count - 1}") is None:
        for i, step in enumerate(steps):
            found = work.stages.done(f"probe-{i}")
            if found is None:
                found = step()
                work.stages.finish(f"probe-{i}", {}, found)
            work.progress("measuring sensitivity", i + 1, count)
    for i in range(count):
        measured |= work.stages.done(f"probe-{i}") or {}
    costs = {
        name: sensitivity(measured[name], ckpt.tensors[name].rows, ckpt.tensors[name].cols)
        for name in work.storages
        if name in measured
    }
    work.sensitivity = {name: dict(cost.kl) for name, cost in costs.items()}
    # What no output was measured of, an embedding that is not the head, stays as it is.
    vectors = sum(info.cols for info in ckpt.tensors.values() if len(info.shape) == 1)
    count = vectors + sum(_size(work, name) for name in costs)
    chosen, kl = choose(costs, count, goal, rest=4 * vectors)
    work.storages |= {name: parse_storage(text) for name, text in chosen.items()}
    return {"kl": kl}


def _view(work: _Work) -> Compressed:
    """The source with what is finished in place of its own."""
    return Compressed(work.ckpt, {
        name: (work.dtypes[name], work.stages.tensor(step, name))
        for name, step in work.steps.items()
    })  # fmt: skip


def _key(
    ckpt: Checkpoint,
    recipe: Recipe,
    storages: Mapping[str, Storage],
    text: Calibration | None,
    seed: int,
) -> dict[str, Any]:
    """What the finished layers depend on."""
    import torch

    import pronk

    digests = []
    for fd in ckpt.files:
        with open(os.dup(fd), "rb") as file:  # noqa: PTH123 (a descriptor is no path)
            file.seek(0)
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return {
        "recipe": {name: getattr(recipe, name) for name in recipe.__slots__},
        "formats": {name: str(storage) for name, storage in storages.items()},
        "source_sha256": digests,
        "calibration_sha256": text.digest if text else None,
        "seed": seed,
        "precision": native_precision(),
        "versions": {"pronk": pronk.__version__, "torch": torch.__version__},
    }


def _provenance(key: Mapping[str, Any], text: Calibration | None) -> dict[str, Any]:
    out = {name: key[name] for name in ("source_sha256", "seed", "precision", "versions")}
    calibration = None
    if text is not None:
        calibration = {"text": text.name, "sha256": text.digest,
                       "windows": len(text.windows), "window": text.windows.shape[1]}  # fmt: skip
    return {**out, "calibration": calibration}


def _run(work: _Work) -> None:
    """Finish every step that is not finished."""
    layers = range(work.ckpt.spec.num_layers)
    by_layer = [[n for n in work.storages if n.startswith(f"model.layers.{i}.")] for i in layers]
    heads = [name for name in work.storages if name in (EMBEDDING, HEAD)]
    total = sum(_size(work, name) for name in work.storages)
    work.progress("compressing", 0, total)
    done = 0
    # A tied head is the embedding too, and what it loses there the layers can make up for.
    tied = work.ckpt.spec.tie_embeddings
    order = [f"layer-{i}" for i in layers]
    order = ["head", *order] if tied else [*order, "head"]
    x: Tensor | None = None
    for step in order:
        index = int(step.partition("-")[2]) if step != "head" else len(by_layer)
        names = heads if step == "head" else by_layer[index]
        report = work.stages.done(step)
        if report is None:
            if work.calibration is None:
                made = Made()
                for name in names:
                    compress_plainly(work.ckpt, name, work.storages[name], work.recipe, made, None)
            elif step == "head":
                made = _head(work, x)
            else:
                made, x = _layer(work, index, x)
            report = {"dtypes": made.dtypes, "errors": made.errors}
            work.stages.finish(step, made.blocks, report)
            if step != "head":
                work.stages.drop_inputs(index)
            del made
        work.dtypes |= report["dtypes"]
        work.errors |= report["errors"]
        work.steps |= dict.fromkeys(report["dtypes"], step)
        done += sum(_size(work, name) for name in names)
        work.progress("compressing", done, total)


def _size(work: _Work, name: str) -> int:
    info = work.ckpt.tensors[name]
    return info.rows * info.cols


def _decoder(work: _Work, precision: str = "f32") -> Decoder:
    """What measures, unless told otherwise: small divergences drown in bfloat16."""
    if precision not in work.decoders:
        work.decoders[precision] = Decoder(work.ckpt.spec, precision)
    return work.decoders[precision]


def _quick(work: _Work) -> Decoder:
    """What calibrates and learns."""
    exact = work.recipe.method == "signround"  # it goes by the sign of small differences
    return _decoder(work, "f32" if exact else native_precision())


def _layer(work: _Work, index: int, x: Tensor | None) -> tuple[Made, Tensor]:
    decoder = _quick(work)
    if x is None:
        x = _kept(work, index) if index else _embedded(work)
    made, out = compress_layer(
        work.ckpt, decoder, index, x, work.recipe, work.storages, work.seed + index
    )
    work.stages.keep_inputs(index + 1, out.numpy())
    return made, out


def _kept(work: _Work, layer: int) -> Tensor:
    """What an earlier run kept of a layer's inputs."""
    import torch

    kept = work.stages.inputs(layer)
    if kept is None:
        raise PronkError(f"{work.stages.path} is damaged: remove it, and begin anew")
    return torch.from_numpy(kept)


def _embedded(work: _Work) -> Tensor:
    """The windows as the first layer is given them, from the table as it will run."""
    if work.calibration is None:
        raise ValueError("there is no calibration")
    return embedded(_view(work), _decoder(work), work.calibration.windows)


def _head(work: _Work, x: Tensor | None) -> Made:
    """The output head, on what the layers give: those of the source, where it comes first."""
    import torch

    decoder, layers = _quick(work), work.ckpt.spec.num_layers
    met = Inputs(work.ckpt.spec.hidden_size)
    with torch.no_grad():
        if work.head == EMBEDDING:
            x = _embedded(work)
            x = x[: max(1, _HEAD_TOKENS // x.shape[1])]
            for layer in range(layers):
                weights = read_floats(work.ckpt, decoder.names(layer))
                x = torch.cat([decoder.run(layer, part, weights) for _, part in batches(x)])
        elif x is None:
            x = _kept(work, layers)
        weights = read_floats(
            work.ckpt, [n for n in decoder.names(layers) if not is_matrix(work.ckpt, n)]
        )
        decoder.run(layers, x, weights, lambda name, inputs: met.add(inputs), until=work.head)
        made = Made()
        for name in [n for n in work.storages if n in (EMBEDDING, HEAD)]:
            of = met if name == work.head else None
            compress_plainly(work.ckpt, name, work.storages[name], work.recipe, made, of)
    return made


def _tune(work: _Work) -> dict[str, float]:
    """Learn scales and norms end to end; the mean loss of the first and the last steps."""
    recipe, stages, text = work.recipe, work.stages, work.calibration
    if text is None:
        raise ValueError("there is no calibration")
    report = stages.done("tuned")
    if report is None:
        tuner = Tuner(
            work.ckpt, _view(work), _quick(work), work.storages,
            text.windows, steps=recipe.tune, rate=recipe.rate, seed=work.seed,
        )  # fmt: skip
        kept = stages.latest("tuning")
        if kept is not None:
            losses = (stages.done(kept) or {})["losses"]
            tuner.resume(losses, lambda name: stages.tensor(kept, name))

        def keep(tuner: Tuner) -> None:
            before = stages.latest("tuning")
            losses = tuner.losses
            stages.finish(f"tuning-{len(losses)}", tuner.state(), {"losses": losses})
            if before is not None:
                stages.forget(before)

        tuner.run(lambda done, total: work.progress("tuning scales", done, total), keep)
        made, some = tuner.made(), max(1, recipe.tune // 8)
        report = {
            "dtypes": {name: work.dtypes.get(name, "f32") for name in made},
            "loss": {
                "steps": recipe.tune,
                "first": sum(tuner.losses[:some]) / some,
                "last": sum(tuner.losses[-some:]) / some,
            },
        }
        stages.finish("tuned", made, report)
    work.dtypes |= report["dtypes"]
    work.steps |= dict.fromkeys(report["dtypes"], "tuned")
    loss: dict[str, float] = report["loss"]
    return loss


def _write_bundle(view: Compressed, work: _Work, target: Path, report: CompressReport) -> None:
    ckpt = work.ckpt

    def rows(of: Checkpoint, name: str, dtype: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        if name == EMBEDDING and name not in work.storages:
            yield from quantize_tensor(of, name, EMBEDDING_DTYPE)
            return
        info = of.tensors[name]
        step = max(1, CHUNK_BYTES // row_bytes(info.dtype, info.cols))
        for at in range(0, info.rows, step):
            yield at, of.read_rows(name, at, min(at + step, info.rows))

    formats = {name: str(storage) for name, storage in work.storages.items()}
    formats.setdefault(EMBEDDING, "f16")
    meta = {
        "source": {"name": ckpt.spec.name, "file": ckpt.path.name, "format": ckpt.format},
        "recipe": {name: getattr(work.recipe, name) for name in work.recipe.__slots__},
        **report.provenance,
        "errors": report.errors,
        **report.learnt,
    }
    inputs = None
    if work.recipe.static and work.calibration is not None:
        seen = observe(view, _decoder(work), work.calibration.windows)
        inputs = {name: found.scale(work.recipe.static) for name, found in seen.items()}
    with BundleWriter(target) as writer:
        writer.write(view, formats, quantize=rows, meta=meta, inputs=inputs)
        writer.commit()
