"""What `compression.py` asks of llama.cpp, in an environment of its own: a line of JSON out.

    python llama_worker.py quantize SOURCE.gguf TARGET.gguf Q4_K_M
    python llama_worker.py score MODEL.gguf WINDOWS.json --threads N

Needs llama-cpp-python alone. WINDOWS.json is a list of ``{"ids", "first", "targets"}``: row
``first`` predicts ``targets[0]``, and so on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np


def quantize(source: Path, target: Path, kind: str) -> dict[str, Any]:
    """Write a GGUF file in another type; the source is of floats."""
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit(f"llama.cpp cannot quantize {source.name} to {kind}")
    return {"version": api.__version__}


def score(model: Path, windows: Path, threads: int) -> dict[str, Any]:
    """Mean negative log-likelihood of the targets, in nats."""
    plan = json.loads(windows.read_text())
    loaded = api.llama_model_load_from_file(str(model).encode(), api.llama_model_default_params())
    if not loaded:
        raise SystemExit(f"llama.cpp cannot load {model.name}")
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = max(len(one["ids"]) for one in plan)
    params.n_threads = params.n_threads_batch = threads
    ctx = api.llama_init_from_model(loaded, params)
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    total, count = 0.0, 0
    for one in plan:
        ids, first, targets = one["ids"], one["first"], one["targets"]
        api.llama_memory_clear(api.llama_get_memory(ctx), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = first <= i < first + len(targets)
        failed = api.llama_decode(ctx, batch)
        api.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"llama_decode gave {failed}")
        for i, target in enumerate(targets, first):
            row = np.ctypeslib.as_array(api.llama_get_logits_ith(ctx, i), (vocab,))
            x = row.astype(np.float64)
            top = x.max()
            total += top + np.log(np.exp(x - top).sum()) - x[target]
        count += len(targets)
    return {"nll": total / count, "tokens": count, "version": api.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("quantize")
    make.add_argument("source", type=Path)
    make.add_argument("target", type=Path)
    make.add_argument("kind")
    read = verbs.add_parser("score")
    read.add_argument("model", type=Path)
    read.add_argument("windows", type=Path)
    read.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, None)
    api.llama_backend_init()
    if args.verb == "quantize":
        result = quantize(args.source, args.target, args.kind)
    else:
        result = score(args.model, args.windows, args.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
