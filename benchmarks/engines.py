"""One engine in a process of its own, for `peers.py`: a line of JSON in, a line of JSON out.

Needs the standard library, NumPy and the engine's package only, so that each engine may live in
an environment of its own. All decode greedily, tokens in and tokens out: no text is handled.

    python engines.py ENGINE MODEL --threads N --context N [--requantize]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Tokens = list[int]
now = time.perf_counter


class Pronk:
    """The public interface, as a program would use it."""

    variants = ("default",)
    activations = "int12"

    def __init__(self, path: str, threads: int, context: int) -> None:
        from pronk import load

        self.model = load(path, threads=threads, context=context, speculate=False,
                          activations=self.activations)  # fmt: skip
        self.about = {"isa": self.model.isa, "memory": self.model.memory.to_dict()}

    def start(self, prompt: Tokens, count: int, session: str | None = None) -> Any:
        from pronk import SamplingParams

        params = SamplingParams(max_tokens=count, ignore_eos=True)
        return self.model.generate(prompt, params, session=session)

    def prefill(self, prompt: Tokens, variant: int) -> float:
        start = now()
        next(self.start(prompt, 1))
        return len(prompt) / (now() - start)

    def decode(self, prompt: Tokens, count: int, variant: int) -> float:
        pieces = self.start(prompt, count + 1, "decode")  # the session keeps the prompt's cache
        next(pieces)
        start = now()
        for _ in pieces:
            pass
        return count / (now() - start)

    def together(self, prompts: list[Tokens], count: int, variant: int) -> float:
        for keep in (True, False):  # first the prompts into the cache, then only decoding
            tokens = 1 if keep else count + 1
            group = [self.start(p, tokens, f"together {i}") for i, p in enumerate(prompts)]
            for pieces in group:
                next(pieces)
            start = now()
            for _ in range(tokens - 1):
                for pieces in group:
                    next(pieces)
        return len(prompts) * count / (now() - start)


class PronkInt8(Pronk):
    """With activations of 8 bits, which is what llama.cpp multiplies with."""

    activations = "int8"


class LlamaCpp:
    """llama-cpp-python's C interface, so that no wrapper slows it down."""

    variants = ("flash attention", "no flash attention")

    def __init__(self, path: str, threads: int, context: int, plain: bool = False) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        self.silent = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.silent, None)
        api.llama_backend_init()
        self.threads, self.context = threads, context
        params = api.llama_model_default_params()
        params.use_extra_bufts = not plain
        self.model = api.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load this file")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.contexts: dict[tuple[int, int], Any] = {}
        self.held: dict[Any, list[Tokens]] = {}
        self.about = {"isa": api.llama_print_system_info().decode().strip(" |")}

    def open(self, variant: int, sequences: int = 1) -> Any:
        """The context of a variant; several sequences share its cells."""
        if (variant, sequences) not in self.contexts:
            api = self.api
            params = api.llama_context_default_params()
            params.n_ctx = self.context
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self.threads
            params.flash_attn_type = (
                api.LLAMA_FLASH_ATTN_TYPE_DISABLED if variant
                else api.LLAMA_FLASH_ATTN_TYPE_ENABLED
            )  # fmt: skip
            made = api.llama_init_from_model(self.model, params)
            if not made:
                raise RuntimeError(f"llama.cpp cannot make a context of {self.context}")
            self.contexts[variant, sequences] = made
        return self.contexts[variant, sequences]

    def run(self, ctx: Any, rows: list[tuple[int, int, int]], heads: int) -> Tokens:
        """Decode (token, position, sequence) rows; the greedy next tokens of the last ones."""
        api = self.api
        at_once = api.llama_n_batch(ctx)
        for at in range(0, len(rows), at_once):
            part = rows[at : at + at_once]
            batch = api.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, (token, position, sequence) in enumerate(part):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = at + i >= len(rows) - heads
            failed = api.llama_decode(ctx, batch)
            api.llama_batch_free(batch)
            if failed:
                raise RuntimeError(f"llama_decode gave {failed}")
        found = []
        for i in range(len(part) - heads, len(part)):
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(ctx, i), (self.vocab,))
            found.append(int(logits.argmax()))
        return found

    def hold(self, ctx: Any, prompts: list[Tokens]) -> None:
        """Leave exactly these prompts in the cache, computed anew only if they are others."""
        memory = self.api.llama_get_memory(ctx)
        if self.held.get(ctx) != prompts:
            self.api.llama_memory_clear(memory, True)
            for sequence, prompt in enumerate(prompts):
                self.run(ctx, [(t, i, sequence) for i, t in enumerate(prompt)], 1)
            self.held[ctx] = prompts
        for sequence, prompt in enumerate(prompts):
            self.api.llama_memory_seq_rm(memory, sequence, len(prompt), -1)

    def prefill(self, prompt: Tokens, variant: int) -> float:
        ctx = self.open(variant)
        self.hold(ctx, [])
        self.held.pop(ctx)
        rows = [(t, i, 0) for i, t in enumerate(prompt)]
        start = now()
        self.run(ctx, rows, 1)
        return len(prompt) / (now() - start)

    def decode(self, prompt: Tokens, count: int, variant: int) -> float:
        return self.together([prompt], count, variant)

    def together(self, prompts: list[Tokens], count: int, variant: int) -> float:
        ctx = self.open(variant, len(prompts))
        self.hold(ctx, prompts)
        tokens = [p[-1] for p in prompts]
        start = now()
        for step in range(count):
            rows = [(t, len(prompts[i]) + step, i) for i, t in enumerate(tokens)]
            tokens = self.run(ctx, rows, len(rows))
        return len(prompts) * count / (now() - start)


class OpenVino:
    """OpenVINO GenAI's pipeline, which reads GGUF itself; it caches prefixes on its own."""

    variants = ("default precision", "f32")

    def __init__(self, path: str, threads: int, context: int) -> None:
        import openvino
        import openvino_genai

        self.ov, self.api = openvino, openvino_genai
        self.path, self.threads = path, threads
        self.pipes: dict[int, Any] = {}
        self.about: dict[str, Any] = {}
        self.open(0)

    def open(self, variant: int) -> Any:
        if variant not in self.pipes:
            options: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads}
            if variant:
                options["INFERENCE_PRECISION_HINT"] = "f32"
            self.pipes[variant] = self.api.LLMPipeline(self.path, "CPU", **options)
        return self.pipes[variant]

    def generate(self, prompts: list[Tokens], count: int, variant: int) -> list[float]:
        """Times of the start, of each token of a single prompt, and of the end."""
        api, stamps = self.api, []

        class Clock(api.StreamerBase):
            def write(self, token: Any) -> Any:
                stamps.extend([now()] * (len(token) if isinstance(token, list) else 1))
                return api.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        config = api.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos = True
        ids = np.array(prompts, np.int64)
        inputs = api.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(np.ones_like(ids)))
        pipe, clock = self.open(variant), Clock() if len(prompts) == 1 else None
        start = now()
        pipe.generate(inputs, config, clock)
        return [start, *stamps, now()]

    def prefill(self, prompt: Tokens, variant: int) -> float:
        start, first, *_ = self.generate([prompt], 1, variant)
        return len(prompt) / (first - start)

    def decode(self, prompt: Tokens, count: int, variant: int) -> float:
        _, first, *rest, _ = self.generate([prompt], count + 1, variant)
        return count / (rest[-1] - first)

    def together(self, prompts: list[Tokens], count: int, variant: int) -> float:
        # There are no times of single tokens: the difference of two runs is decoding alone.
        times = []
        for tokens in (1, 2, count + 2):
            start, *_, end = self.generate(prompts, tokens, variant)
            times.append(end - start)
        return len(prompts) * count / (times[-1] - times[-2])


ENGINES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "pronk": (Pronk, ("pronk",)),
    "pronk_int8": (PronkInt8, ("pronk",)),
    "llama_cpp": (LlamaCpp, ("llama_cpp",)),
    "openvino": (OpenVino, ("openvino", "openvino_genai")),
}


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))


def requantized(path: str) -> str:
    """The model in llama.cpp's fastest 4-bit format, in the system's temporary folder."""
    import llama_cpp as api

    target = Path(tempfile.gettempdir()) / f"{Path(path).stem}.requantized.Q4_0.gguf"
    if not target.exists() or target.stat().st_mtime < Path(path).stat().st_mtime:
        part = target.with_suffix(f".{os.getpid()}.part")
        params = api.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = api.LLAMA_FTYPE_MOSTLY_Q4_0, True
        if api.llama_model_quantize(path.encode(), str(part).encode(), params):
            raise RuntimeError("llama.cpp cannot requantize this file")
        part.replace(target)
    return str(target)


def answer(engine: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Carry out one measurement."""
    kind, variant = task["kind"], task.get("variant", 0)
    if kind == "prefill":
        return {"value": engine.prefill(task["prompt"], variant)}
    if kind == "decode":
        return {"value": engine.decode(task["prompt"], task["tokens"], variant)}
    if kind == "together":
        return {"value": engine.together(task["prompts"], task["tokens"], variant)}
    if kind == "memory":
        return {"value": peak_memory()}
    raise ValueError(f"there is no measurement {kind!r}")


def serve(args: argparse.Namespace, out: TextIO) -> None:
    """Load, say so, and answer until the input ends."""

    def reply(data: dict[str, Any]) -> None:
        print(json.dumps(data), file=out, flush=True)

    make, packages = ENGINES[args.engine]
    try:
        start = now()
        versions = {name: importlib.import_module(name).__version__ for name in packages}
        imported = now()
        path = requantized(args.model) if args.requantize else args.model
        loading = now()
        options = {"plain": True} if args.plain else {}
        engine = make(path, args.threads, args.context, **options)
        engine.prefill([args.first], 0)
        reply({
            "import_time": imported - start,
            "load_time": now() - loading,
            "versions": versions,
            "variants": engine.variants,
            "about": engine.about,
        })  # fmt: skip
        for line in sys.stdin:
            reply(answer(engine, json.loads(line)))
    except Exception as error:  # any package may raise anything: the driver says it in a sentence
        text = str(error).strip().splitlines()
        reply({"error": f"{type(error).__name__}: {text[-1] if text else ''}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--first", type=int, default=1000, help="the token of the first step")
    parser.add_argument("--requantize", action="store_true", help="to Q4_0 (llama.cpp only)")
    parser.add_argument("--plain", action="store_true", help="without tiles or repacked weights "
                        "(llama.cpp only)")  # fmt: skip
    args = parser.parse_args()
    # What packages print must not mix with the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(args, out)
    # Some engines crash when the interpreter takes them down; nothing is left to lose.
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
