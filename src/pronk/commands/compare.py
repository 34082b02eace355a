"""``pronk compare``: several variants of a model, judged on the same text and questions."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronk.commands import common
from pronk.errors import RequestError

if TYPE_CHECKING:
    from pronk.checkpoint.base import Checkpoint
    from pronk.checkpoint.tokenizer import Tokenizer
    from pronk.evaluate.compare import Reading, Variant
    from pronk.evaluate.corpus import Corpus
    from pronk.evaluate.tasks import Task
    from pronk.model import Model

__all__ = ["configure", "facts", "run"]

_MOST_OF_TOPICS = 16_384  # tokens of the default text
_BENCH = ("--prompt-tokens", "256", "--tokens", "64", "--runs", "1")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="names, addresses or paths; NAME=PATH gives one the name it has in the report",
    )  # fmt: skip
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="what KL and the sentences refer to: one of them, or another (default: the first)",
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: Python's topics)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens at a time")
    parser.add_argument("--stride", type=int, metavar="N", help="default: half the window")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N",
        help=f"use the first N (default: all of FILE, or {_MOST_OF_TOPICS} of Python's topics)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", default="facts,cloze", metavar="NAME,...",
        help="questions: facts and cloze (built in), names in --task-dir, .jsonl files, or none",
    )  # fmt: skip
    parser.add_argument("--task-dir", type=Path, metavar="DIR", help="where NAME.jsonl are")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N",
        help="of speed and memory, in processes of their own, in turns; 0: not measured",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the resampling")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="write the page with plots")
    parser.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write report.json, report.md and report.html, and keep results: a run that was "
        "interrupted, or has another model more, goes on from them",
    )  # fmt: skip
    common.add_runtime(parser)
    common.add_experts(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.commands.progress import Progress
    from pronk.evaluate.compare import ask_all, score_all, take_turns
    from pronk.evaluate.corpus import load_corpus
    from pronk.evaluate.kept import Kept, write_beside
    from pronk.evaluate.report import make_report
    from pronk.evaluate.report_page import page
    from pronk.evaluate.report_text import format_report, markdown

    _check(args)
    tasks = _tasks(args)
    corpus = load_corpus(args.text)
    variants, reference = _variants(args)
    reading = _read(args, corpus, reference)
    kept = Kept(None if args.report is None else args.report / "results")
    engine = _engine(args)

    @contextmanager
    def load(variant: Variant, context: int | None = None) -> Iterator[Model]:
        model, _ = common.open_model(variant.path, args, context)
        with model:
            yield model

    def load_window(variant: Variant) -> AbstractContextManager[Model]:
        return load(variant, args.window)

    with Progress("comparing") as progress:
        groups = _groups(variants, reference, args)
        scores = score_all(groups, reference, reading, load_window, kept, engine, progress.stage)
        answers = ask_all(variants, tasks, load, kept, engine, progress.stage)
        rounds = take_turns(
            variants, args.rounds, lambda v: _bench(v, args), kept,
            {**engine, **_machine(), "sizes": _BENCH, "words": common.runtime_words(args)},
            progress.stage,
        )  # fmt: skip
    report = make_report(
        variants, reference, reading, scores, tasks, answers, rounds,
        seed=args.seed, about=_about(args),
    )  # fmt: skip
    html = page(report)
    if args.plot is not None:
        write_beside(args.plot, html.encode())
    if args.report is not None:
        import json

        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_beside(args.report / "report.json", text.encode())
        write_beside(args.report / "report.md", markdown(report).encode())
        write_beside(args.report / "report.html", html.encode())
    if args.json:
        common.print_json(report)
    else:
        print(*format_report(report), sep="\n")


def _check(args: argparse.Namespace) -> None:
    """Say what is wrong with a request before anything is loaded."""
    from pronk.evaluate.windows import windows

    if args.rounds < 0:
        raise RequestError(f"--rounds must be 0 or more, not {args.rounds}")
    if args.max_tokens is not None and args.max_tokens < 2:
        raise RequestError(f"--max-tokens must be 2 or more, not {args.max_tokens}")
    if args.plot is not None:
        if args.plot.suffix.lower() != ".html":
            raise RequestError(f"--plot writes a page: {args.plot.name!r} must end in .html")
        if not args.plot.absolute().parent.is_dir():
            raise RequestError(
                f"the folder of the plot, {args.plot.absolute().parent}, is not there"
            )
    list(windows([0, 0], args.window, args.stride))


def _tasks(args: argparse.Namespace) -> list[Task]:
    from pronk.evaluate.tasks import load_task

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks = [load_task(n, args.task_dir, args.limit) for n in names if n != "none"]
    if len({task.name for task in tasks}) < len(tasks) or {t.name for t in tasks} & _TAKEN:
        raise RequestError(f"--tasks {args.tasks}: every task needs a name of its own")
    return tasks


_TAKEN = {"perplexity", "kl"}


def _variants(args: argparse.Namespace) -> tuple[list[Variant], Variant]:
    """The variants, the reference among them, and which that is."""
    found = [_variant(text) for text in args.models]
    reference = found[0]
    if args.reference is not None:
        named = zip(args.models, found, strict=True)
        mine = [one for text, one in named if args.reference in (text, one.name)]
        if not mine:
            mine = [_variant(args.reference)]
            found.insert(0, mine[0])
        reference = mine[0]
    if len(found) < 2:
        raise RequestError("comparing needs two models: give another, or --reference")
    names = [variant.name for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two models are called {name!r}: write NAME=PATH to name one")
    return found, reference


def _variant(text: str) -> Variant:
    from pronk.checkpoint.bundle import BUNDLE_FILE, is_bundle
    from pronk.checkpoint.io import read_json
    from pronk.checkpoint.open import open_checkpoint
    from pronk.checkpoint.sources import resolve
    from pronk.evaluate.compare import Variant

    name, equals, address = text.partition("=")
    # An address may hold an equals sign of its own, a name no slash.
    named = bool(equals and name and "/" not in name and not Path(text).exists())
    path = resolve(address if named else text)
    if not named:
        name = text if "/" not in text else path.name or str(path)
    with open_checkpoint(path) as checkpoint:
        about = facts(checkpoint)
        sha256 = _hash(checkpoint)
    if path.is_dir() and is_bundle(path):
        told = read_json(path / BUNDLE_FILE)
        known = ("recipe", "sensitivity", "prediction")
        about |= {key: told[key] for key in known if key in told}
    return Variant(name, os.fspath(path), sha256, about)


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the files of a checkpoint say of its weights.

    ``bytes`` are those of the tensors in a file, as they are stored, without what else it holds:
    of GGUF the tokenizer, of safetensors the table of contents.
    """
    tensors = checkpoint.tensors.values()
    count = sum(info.rows * info.cols for info in tensors)
    size = sum(info.nbytes for info in tensors)
    if checkpoint.format != "gguf":
        heads = (8 + int.from_bytes(os.pread(fd, 8, 0), "little") for fd in checkpoint.files)
        size = sum(os.fstat(fd).st_size for fd in checkpoint.files) - sum(heads)
        head = checkpoint.tensors["model.embed_tokens.weight"]
        tied = checkpoint.format == "bundle" and checkpoint.spec.tie_embeddings
        if tied and head.dtype not in ("f32", "f16", "bf16"):
            # Packed as the head; the copy in float16 is for transformers, and Pronk reads none.
            size -= 2 * head.rows * head.cols
    formats: dict[str, int] = {}
    for info in tensors:
        formats[info.dtype] = formats.get(info.dtype, 0) + info.rows * info.cols
    order = sorted(formats, key=lambda dtype: -formats[dtype])
    return {
        "format": checkpoint.format,
        "parameters": count,
        "bytes": size,
        "bits": 8 * size / count,
        "formats": {dtype: formats[dtype] / count for dtype in order},
    }


def _hash(checkpoint: Checkpoint) -> str:
    """Of the weights, and of the small files beside them that say how they are to be read."""
    import hashlib

    from pronk.checkpoint.packed_cache import content_hash

    total = hashlib.sha256(content_hash(checkpoint.files).encode())
    if checkpoint.path.is_dir():
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            file = checkpoint.path / name
            total.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return total.hexdigest()


def _read(args: argparse.Namespace, corpus: Corpus, reference: Variant) -> Reading:
    """The text as the reference's tokenizer cuts it."""
    from pronk.checkpoint.open import open_checkpoint
    from pronk.evaluate.compare import Reading
    from pronk.evaluate.corpus import encode

    with open_checkpoint(Path(reference.path)) as checkpoint:
        tokenizer: Tokenizer = checkpoint.load_tokenizer()
    most = args.max_tokens or (_MOST_OF_TOPICS if args.text is None else None)
    ids = encode(corpus, tokenizer, most)
    text = tokenizer.decode(ids)
    return Reading(
        corpus.name, ids, len(text.split()), len(text.encode()), args.window,
        args.stride or max(1, args.window // 2), tokenizer.bos_id,
    )  # fmt: skip


def _groups(
    variants: list[Variant], reference: Variant, args: argparse.Namespace
) -> list[list[Variant]]:
    """Variants that are in memory together: the reference is run once for each group."""
    from pronk.checkpoint.open import open_checkpoint
    from pronk.device.host import read_memory
    from pronk.graph.program import Limits
    from pronk.model import compile_checkpoint

    memory = read_memory()
    known = [size for size in (memory.available, memory.limit) if size is not None]
    room = min(known) // 2 if known else 0

    def size(variant: Variant) -> int:
        with open_checkpoint(Path(variant.path)) as checkpoint:
            limits = Limits(args.window, kv_dtype=args.kv, activations=args.activations)
            return compile_checkpoint(checkpoint, limits).memory(0).total

    groups: list[list[Variant]] = [[]]
    taken = size(reference)
    left = room - taken
    for variant in variants:
        need = 0 if variant is reference else size(variant)
        if groups[-1] and need > left:
            groups.append([])
            left = room - taken
        groups[-1].append(variant)
        left -= need
    return groups


def _bench(variant: Variant, args: argparse.Namespace) -> dict[str, Any]:
    from pronk.device.child import run_json

    words = [*common.runtime_words(args), "--no-depth", "--json", *_BENCH]
    return run_json("pronk", ["bench", variant.path, *words])


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a result beside the model and the text."""
    import hashlib

    from pronk import __version__, _native

    native = Path(_native.__file__).read_bytes()
    return {
        "version": __version__,
        "native": hashlib.sha256(native).hexdigest()[:16],
        "isa": _native.isa(os.environ.get("PRONK_ISA", "")),
        "kv": args.kv,
        "activations": args.activations,
        "attention": args.attention,
        "rope_scaling": args.rope_scaling,
        "experts": args.dynamic_experts,
        "sparse_mlp": args.sparse_mlp,
        "thresholds": _thresholds(args),
    }


def _thresholds(args: argparse.Namespace) -> list[float]:
    """Those of a file, which may hold others another time."""
    from pronk.graph.sparse import parse_sparse

    return list(parse_sparse(args.sparse_mlp).thresholds) if args.sparse_mlp else []


def _machine() -> dict[str, Any]:
    import platform

    from pronk import _native
    from pronk.device.cpu import read_cpu
    from pronk.device.host import read_memory

    cpu = read_cpu()
    return {
        "cpu": cpu.model or platform.processor(),
        "architecture": platform.machine(),
        "isa": _native.isa(os.environ.get("PRONK_ISA", "")),
        "memory": read_memory().total,
    }


def _about(args: argparse.Namespace) -> Mapping[str, Any]:
    import time

    from pronk.device.versions import read_versions
    from pronk.model import choose_threads

    options = {key: value for key, value in _engine(args).items() if value}
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": dict(read_versions()),
        "machine": {**_machine(), "threads": choose_threads(args.threads)},
        "engine": options,
    }
