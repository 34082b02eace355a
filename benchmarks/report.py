"""Write docs/performance.md, and the ends of other pages, from benchmarks/results.

python benchmarks/report.py [--check]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import output
import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
ENDS = {
    ROOT / "docs" / "compression.md": ("compression",),
    ROOT / "docs" / "experts.md": ("experts", "moe"),
    ROOT / "docs" / "long-context.md": ("long_context",),
    ROOT / "docs" / "pruning.md": ("pruning",),
    ROOT / "docs" / "sparse-activation.md": ("sparse_mlp",),
}
"""Pages of words whose last section is results, by the names of their files."""

INTRO = """# Performance

This page is written by `python benchmarks/report.py` from the results of runs that are kept in
`benchmarks/results`; a test holds it to them. Rates are tokens a second, and more is better. The
machines that such runs get are shared: before and after every round the machine's own limits are
probed, rounds beside a slow spell are repeated, and what counts is the ratio of engines that took
turns in one run. `a ≥ b` says that a figure reaches its goal, `a < b` that it does not."""

PEERS = """## Beside llama.cpp and OpenVINO GenAI

The same GGUF, the same number of threads, each engine in a process of its own, measurements in
turns. Prompts are random tokens, new in every round of a prefill. llama.cpp runs with and without
flash attention, OpenVINO with its own precision and with float32: the faster in each row counts.
The column "Q4_0" is llama.cpp on the file requantized to the format it is fastest in, and so on a
worse model. Rows with "int8" are Pronk with `--activations int8`: llama.cpp multiplies with 8 bits
too, and Pronk with 12 unless told; what that loses is below. A ratio is Pronk's rate over the
peer's, the median over rounds; in the last two rows less is better and the ratio is turned round.
The limit is the roofline's (below); "planned" is the weights, the cache and 70 MB.

llama-cpp-python compiles on installation. GCC 12 miscompiles its tile kernels (they crash in the
first prefill), so where the CPU has AMX it was built with

```
CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" pip install llama-cpp-python
```"""

ROOFLINE = """## What the limit is

A step cannot be faster than the machine reads what it must read, nor than it multiplies what it
must multiply (the roofline, Williams et al. 2009). For one token every weight is read once and
used once, so decoding is bound by memory:

    tokens/s ≤ bytes/s ÷ (bytes of the weights + bytes of the cache so far)

For a prompt every weight is read once for all of its tokens, so prefill is bound by arithmetic:

    tokens/s ≤ int8 operations/s ÷ (2 · parameters of the layers)

Many sequences that decode together lie between the two. The limits named under the tables are the
best that probes found during the run: one pass over 256 MB, and products on registers alone, in
vectors and, where the CPU has them, in tiles (AMX). Products that keep more than 8 bits
of an activation take more than one int8 product each, and everything that is not a product counts
against the fraction; it is a share of what no program can pass, not of what one could reach."""

GEMMA = """## Gemma 3 270M beside llama.cpp

Three quarters of what a token reads of this model is its output head, of 262,144 entries; greedy
decoding reads half of that ([architecture](architecture.md#the-graph)). Most layers see a window of
512. Measured as above, on the `Q4_K_M` file as it is."""

KERNELS = """## Each kernel

Products of random weights in the shapes of real models, over as many different weights as a model
streams, so that little is left in caches; attention over a cache of 2,048 positions; the rest on
rows of floats. Bytes a second where memory is the nearer limit, operations where arithmetic is,
and the fraction of it."""

SCALING = """## Context, batch, threads, instruction sets

Steps of the runner alone. `PRONK_ISA` forces an instruction set; here all that this machine has
run in turns. NEON is tested for correctness under an emulator, and not measured."""

ACTIVATIONS = """## The precision of activations and of the cache

Against the same weights dequantized, with float32 activations and a float32 cache. What meets
quantized weights are integers of 12 bits with a scale for each group of 32, or, with
`--activations int8`, of 8: half the products."""

KV_CACHE = """## The KV cache in fewer bits

`--kv int8` has a scale for each row of a head, `--kv int4` one for each 32 elements of a row that
was rotated first ([QuaRot](https://arxiv.org/abs/2404.00456)). Divergence is from a float32 cache.
Both are expanded to bf16 to be attended to: where that costs more than the bytes that are not read,
fewer bits are slower. The first layers of Qwen2.5-Coder add biases to their keys that are far
larger than what tells keys apart, and four bits do not hold both, rotated or not. These figures are
older than what takes the mean of such biases from keys ([architecture.md](architecture.md)), and
its rows are to be measured again."""

STATIC = """## Static ranges of activations

The recipes `int8-static-...` set the scale of each matrix's input once, on calibration text, for
engines that want it so; Pronk's own kernels take scales from what they are given. Weights are as
the checkpoint has them: what is measured, in torch, is the rounding of inputs alone. A few tokens
have activations far larger than all others: ranges that leave them out lose the model."""

FITTING = """## What `pronk fit` plans, and what is measured

Budgets are for the peak resident memory of the whole process at a context of 1,024 tokens. The
measurements are those that `fit` makes itself, in processes of their own."""

SPECULATION = """## Drafts from earlier text

The same greedy answers with and without drafts, in turns: a text repeated, a file rewritten with
one method renamed, and a story. The script fails if a token differs."""

SERVE = """## Serving

Clients that ask, read the stream to its end and ask again, over real HTTP and gRPC on the same
machine; prompts of 20 to 300 words, no two the same. `engine` is Pronk's engine alone, fed with
token ids; what the server loses against it is HTTP, JSON and text, and the client itself, which
shares the cores."""

OVERLOAD = """## Overload

Ten times as many requests as the server can do, by themselves (a Poisson process), without and with
`--target-ttft`, on a server of its own each. What it takes it is to serve in time, and what it
refuses, to refuse at once; the client shares the cores with it."""

SOAK = """## Soak

Every kind of load at once: chats, completions and embeddings, whole and streamed, over HTTP and
gRPC; forms, tools, conversations; clients that leave, requests that are none, and bursts that the
queue cannot take; all of it behind a guard, with texts in an audit log of many files. The script
fails if memory grows, a block or a request is left, a request hangs, any is answered with a 5xx
other than 503, or the log does not hold. Time that the machine sleeps does not count. `busy` is a
wrong request that the full queue refused first."""

MEASURED = """## Measured

This section is written by `python benchmarks/report.py`; a test holds it to the results."""

NOTES = {
    "compression": """Recipes that look at text were calibrated on the validation split of the text
they are measured on: on text of another kind they gain less. llama.cpp's files were made without an
importance matrix, and their heads keep more bits than most of the file; Pronk's recipes named by
one number of bits round the head too. The engines agree on float weights; on quantized ones
llama.cpp multiplies with activations of 8 bits, Pronk with 12. Groups of 128 do not divide this
model's rows of 576: those of 96 stand for them. Options stand behind a recipe's name; `samples` are
windows of 512 tokens, 64 unless said otherwise. Of `auto`, `bits` are of all that is stored: codes,
scales, minima, the head, norms. The model's own file is Q4_1: its layers hold 16 values and a
minimum a group, which `int4-g32-min` keeps as they are and formats without minima cannot. For the
same rows of 576, which 256 does not divide, Q3_K_M is 4 and 5 bits in most layers and 8 in the
head: 3 bits throughout come nowhere near it, and the table of sizes says what does. Automatic
bits of 4.56 are as large as int4 in groups of 32. Tuned scales fit the kind of text they are tuned
on: its perplexity falls, divergence does not. `pronk qat`,
which trains instead, is judged in [pruning.md](pruning.md).""",
    "experts": """Real mixtures are too large for a benchmark that anybody can run: this one is
**synthetic**, of random weights in the proportions of OLMoE. Its routers follow the token more than
its context, as real ones are found to ([arXiv:2402.01739](https://arxiv.org/abs/2402.01739)), and
tokens are words of a text, by how often they come. Rates are tokens a second, of runners that took
turns token by token; "found there" and "read" are of the tokens after a prompt. With a cold file,
the system was made to forget the file before every token. Divergence is from the mixture with 8
experts a token: it says how far, not how much worse, since nothing was trained, and the nearly flat
logits of random weights change their favourite easily.""",
    "moe": """What choosing experts costs by itself: a mixture of 8 experts, 2 a token, beside a
dense model that reads as many bytes a token. Both are **synthetic**, of random weights.""",
    "sparse_mlp": """The relu model has random weights; its gates open each by itself, or 32
neighbours together. The machine was busy: ratios of rows in which hardly a group is all zero, which
should be 1, show by how much a single ratio is off.""",
    "long_context": """One number is hidden in each cell, so a cell is all or nothing. A model
that was not trained with windows loses much to them: look at the quality before the speed.""",
}

SECTIONS = (
    ("peers", PEERS),
    ("peers_gemma", GEMMA),
    ("kernels", KERNELS),
    ("scaling", SCALING),
    ("speculation", SPECULATION),
    ("serve", SERVE),
    ("overload", OVERLOAD),
    ("soak", SOAK),
    ("activations", ACTIVATIONS),
    ("kv_cache", KV_CACHE),
    ("static_activations", STATIC),
    ("fitting", FITTING),
)


def page(results: dict[str, dict[str, Any]], plots: set[str]) -> str:
    """The whole page, from results by benchmark, with the plots that there are."""
    parts = [INTRO]
    for name, text in SECTIONS:
        if name not in results:
            continue
        result = results[name]
        command = f"```\n{result['command']} --out benchmarks/results/{name}.json\n```"
        parts += [text, command, f"On {tables.machine(result['machine'])}."]
        parts.append(output.show(result))
        if result["benchmark"] == "peers":
            parts.append(engines(result))
        if name in plots:
            parts.append(f"![{name}](../benchmarks/results/{name}.svg)")
        if name == "peers":
            parts.append(ROOFLINE)
    return "\n\n".join(parts) + "\n"


def engines(result: dict[str, Any]) -> str:
    """Versions and settings of the engines of a `peers.py` result."""
    lines = []
    for name, about in result["peers"].items():
        if name.endswith("_q4_0"):  # the same engine
            continue
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        used = {t["variants"][name] for t in result["tasks"].values() if name in t["variants"]}
        line = f"- {tables.NAMES[name]}: {versions}"
        if used - {"default"}:
            line += f"; {' / '.join(sorted(used))}"
        if about.get("isa"):
            line += f"; `{about['isa']}`"
        lines.append(line)
    return "\n".join(lines)


def load() -> dict[str, dict[str, Any]]:
    """The results that are kept, by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def current() -> str:
    """What the page must be."""
    return page(load(), {path.stem for path in RESULTS.glob("*.svg")})


def with_end(text: str, results: dict[str, dict[str, Any]], plots: set[str]) -> str:
    """A page of words: its text as it is, and the section of results after it."""
    parts = [text.partition("\n## Measured\n")[0].rstrip("\n")]
    parts += [MEASURED] if results else []
    for name, result in results.items():
        command = f"```\n{result['command']} --out benchmarks/results/{name}.json\n```"
        parts += [*([NOTES[name]] if name in NOTES else []), command]
        parts += [f"On {tables.machine(result['machine'])}.", output.show(result)]
        if name in plots:
            parts.append(f"![{name}](../benchmarks/results/{name}.svg)")
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """What every page must be."""
    plots, results = {path.stem for path in RESULTS.glob("*.svg")}, load()
    return {PAGE: current()} | {
        path: with_end(path.read_text(), {n: results[n] for n in names if n in results}, plots)
        for path, names in ENDS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    args = parser.parse_args()
    if args.check:
        for path, text in pages().items():
            if not path.exists() or path.read_text() != text:
                raise SystemExit(f"{path.name} differs: run python benchmarks/report.py")
        return
    for name, result in load().items():
        output.draw(result, RESULTS / f"{name}.svg")
    for path, text in pages().items():
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)


if __name__ == "__main__":
    main()
