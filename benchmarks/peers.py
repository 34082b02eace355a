"""Pronk beside llama.cpp and OpenVINO GenAI on the same GGUF files, in one interleaved run.

Each engine lives in a process of its own and answers one measurement at a time, in turns, between
probes of the machine's own limits; rounds in a slow spell are repeated. Prompts are random tokens.
Prints medians, the medians of the ratios round by round, and the fraction of the limit.

    pip install '.[bench]'
    python benchmarks/peers.py [--llama-python PATH] [--openvino-python PATH] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import output
import tables
from machine import Best, describe, probe

from pronk import resolve
from pronk.checkpoint.open import open_checkpoint
from pronk.errors import PronkError

HERE = Path(__file__).parent
SMALL_CONTEXT = 1024  # where load time and memory are measured


@dataclass(frozen=True)
class Task:
    """A row of the table: what is run, on which model, and what is aimed at.

    ``goals`` maps a peer to the ratio wanted, and ``"limit"`` to the fraction of ``limit``.
    """

    name: str
    title: str
    kind: str
    past: int
    tokens: int = 0
    sequences: int = 1
    model: int = 0
    rounds: int = 0  # 0: as the command line says
    limit: str = ""
    goals: dict[str, float] = field(default_factory=dict)


TASKS = (
    Task("decode", "decode, empty context", "decode", 1, 128, limit="bandwidth",
         goals={"llama_cpp": 2.3, "limit": 0.8}),
    Task("decode_2048", "decode at 2,048 tokens", "decode", 2048, 64, limit="bandwidth",
         goals={"llama_cpp": 3.2, "limit": 0.65}),
    Task("prefill_512", "prefill of 512", "prefill", 512, limit="int8",
         goals={"llama_cpp": 7, "openvino": 1.5, "limit": 0.55}),
    Task("prefill_8192", "prefill of 8,191", "prefill", 8191, rounds=2, limit="int8",
         goals={"llama_cpp_q4_0": 4}),
    Task("together_16", "16 sequences decoding", "together", 128, 48, 16, limit="int8",
         goals={"llama_cpp_q4_0": 3.5, "limit": 0.4}),
    Task("second_decode", "decode, empty context", "decode", 1, 48, model=1, limit="bandwidth",
         goals={"llama_cpp": 1.6, "limit": 0.8}),
    Task("second_prefill_512", "prefill of 512", "prefill", 512, model=1, limit="int8",
         goals={"llama_cpp": 3, "limit": 0.55}),
)  # fmt: skip


GOALS: dict[str, dict[str, dict[str, float]]] = {
    "gemma-3-270m-q4_k_m.gguf": {
        "decode": {"llama_cpp": 2},
        "prefill_512": {"llama_cpp": 3},
        "prefill_8192": {"llama_cpp": 4},
    },
}
"""What is aimed at by file and task, where that is not what the tasks say."""


class PeerError(Exception):
    """A worker ended or refused, in one sentence."""


class CrashError(PeerError):
    """A worker was ended by a signal."""


class Peer:
    """A worker process; started when it is first asked for something."""

    def __init__(self, engine: str, python: str, model: str, threads: int, context: int) -> None:
        self.engine = engine.removesuffix("_q4_0")
        self.command = [python, str(HERE / "engines.py"), self.engine, model,
                        "--threads", str(threads), "--context", str(context)]  # fmt: skip
        if self.engine != engine:
            self.command.append("--requantize")
        self.process: subprocess.Popen[str] | None = None
        self.loaded: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """Load the model; gives what the worker says of itself."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True)  # fmt: skip
            self.loaded = self._read("loading")
        return self.loaded

    def ask(self, timeout: float = 300, **task: Any) -> float:
        """The value of one measurement."""
        self.start()
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading says how it ended
            print(json.dumps(task), file=self.process.stdin, flush=True)
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            return float(self._read(str(task["kind"]))["value"])
        finally:
            timer.cancel()

    def _read(self, doing: str) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {}
        if not line:
            status = self.process.wait()
            self.stop()
            if status < 0:
                raise CrashError(f"{doing}: its process ended with signal {-status}")
            raise PeerError(f"{doing}: its process ended with status {status}")
        if "error" in found:
            self.stop()
            raise PeerError(f"{doing}: {found['error']}")
        return found

    def fall_back(self) -> bool:
        """Whether there is a safer way to run this engine after a crash, which is then taken.

        llama.cpp's tile kernels crash when some compilers built them; it runs without.
        """
        if self.engine != "llama_cpp" or "--plain" in self.command:
            return False
        self.command.append("--plain")
        return True

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.process = None


class Comparison:
    """Runs tasks over peers; everything that ends up in the result."""

    def __init__(self, args: argparse.Namespace, models: Sequence[Path]) -> None:
        self.args, self.models = args, models
        self.best = Best()
        self.draw = random.Random(0)
        self.end = time.monotonic() + 60 * args.minutes
        self.pythons = {
            "pronk": sys.executable,
            "pronk_int8": sys.executable,
            "llama_cpp": args.llama_python,
            "llama_cpp_q4_0": args.llama_python,
            "openvino": args.openvino_python,
        }
        wanted = args.peers.split(",") if args.peers else list(self.pythons)
        self.pythons = {n: p for n, p in self.pythons.items() if n in ("pronk", *wanted)}
        self.absent: dict[str, str] = {}
        self.failures: dict[str, dict[str, str]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.facts = [facts(path) for path in models]
        self.peers: dict[int, dict[str, Peer]] = {}
        self.asked: dict[str, tuple[dict[str, Any], dict[str, int]]] = {}
        self.tasks = [
            t for t in TASKS
            if t.model < len(models) and (not args.only or t.name in args.only.split(","))
        ]  # fmt: skip

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def names(self, model: int) -> list[str]:
        """The engines to try on a model."""
        skipped = {"llama_cpp_q4_0"} if model else set()
        return [name for name in self.pythons if name not in {*skipped, *self.absent}]

    def open(self, model: int) -> dict[str, Peer]:
        """Workers of a model; one that cannot be had is left out with a sentence."""
        if model not in self.peers:
            self.peers[model] = {}
            for name in self.names(model):
                peer = self.peer(name, model, max(t.past for t in TASKS if t.model == model) + 1)
                try:
                    loaded = peer.start()
                except PeerError as error:
                    if name == "pronk":
                        raise
                    self.note(name, self.models[model].name, str(error))
                    if "ModuleNotFoundError" in str(error):
                        self.absent[name] = str(error)
                    continue
                self.versions[name] = {"versions": loaded["versions"], **loaded["about"]}
                self.peers[model][name] = peer
        return self.peers[model]

    def peer(self, name: str, model: int, context: int) -> Peer:
        context = max(context, 4096) if context > SMALL_CONTEXT else SMALL_CONTEXT
        return Peer(name, self.pythons[name], str(self.models[model]), self.args.threads, context)

    def tokens(self, model: int, count: int) -> list[int]:
        vocab = self.facts[model]["vocab"]  # its ends are full of special tokens
        return [self.draw.randrange(vocab // 50, vocab * 9 // 10) for _ in range(count)]

    def request(self, task: Task) -> dict[str, Any]:
        """What is asked of every peer in a round; a prefill is of new tokens each time."""
        if task.kind == "together":
            prompts = [self.tokens(task.model, task.past) for _ in range(task.sequences)]
            return {"kind": task.kind, "prompts": prompts, "tokens": task.tokens}
        prompt = self.tokens(task.model, task.past)
        return {"kind": task.kind, "prompt": prompt, "tokens": task.tokens}

    def variants(self, task: Task, request: dict[str, Any]) -> dict[str, int]:
        """The faster variant of each peer in this task, by trying each (this warms up too)."""
        chosen = {}
        for name, peer in self.open(task.model).items():
            try:
                try:
                    speeds = self.speeds(task, request, peer)
                except CrashError as error:
                    if not peer.fall_back():
                        raise
                    self.note(name, "as built", f"{error}; it ran without tiles and repacking")
                    speeds = self.speeds(task, request, peer)
                chosen[name] = speeds.index(max(speeds))
            except PeerError as error:
                self.note(name, task.name, str(error))
        return chosen

    def speeds(self, task: Task, request: dict[str, Any], peer: Peer) -> list[float]:
        return [
            peer.ask(**{**request, **self.fresh(task)}, variant=v)
            for v in range(len(peer.start()["variants"]))
        ]

    def note(self, name: str, what: str, why: str) -> None:
        """Remember what a peer could not do."""
        self.failures.setdefault(name, {})[what] = why
        self.say(f"{tables.NAMES[name]}, {what}: {why}")

    def fresh(self, task: Task) -> dict[str, Any]:
        return self.request(task) if task.kind == "prefill" else {}

    def measure(self, task: Task) -> dict[str, Any]:
        """Rounds of one task; as many good ones as asked for, if the machine lets us."""
        peers, request = self.open(task.model), self.request(task)
        chosen = self.variants(task, request)
        result: dict[str, Any] = {
            "title": task.title, "model": self.models[task.model].name, "kind": task.kind,
            "goals": self.goals(task), "limit": task.limit, "cost": self.cost(task),
            "variants": {n: peers[n].start()["variants"][v] for n, v in chosen.items()},
            "rounds": [], "wanted": task.rounds or self.args.rounds,
        }  # fmt: skip
        self.asked[task.name] = request, chosen
        self.fill(task, result)
        return result

    def fill(self, task: Task, result: dict[str, Any]) -> None:
        """Add rounds until enough are good, or it takes too long."""
        peers, (request, chosen) = self.open(task.model), self.asked[task.name]
        tries = 0
        while self.good(result) < result["wanted"] and tries < 2 * result["wanted"]:
            if result["rounds"] and time.monotonic() > self.end:
                return
            tries += 1
            request = {**request, **self.fresh(task)}
            before = self.best.see(probe(self.args.threads))
            order = list(chosen) if tries % 2 else list(chosen)[::-1]
            values = {name: peers[name].ask(**request, variant=chosen[name]) for name in order}
            after = self.best.see(probe(self.args.threads))
            result["rounds"].append({"values": values, "probes": [before, after]})
            self.say(f"{task.name}: " + ", ".join(f"{n} {values[n]:.1f}" for n in chosen))

    def goals(self, task: Task) -> dict[str, float]:
        file = self.models[task.model].name
        return GOALS[file].get(task.name, {}) if file in GOALS else task.goals

    def good(self, result: dict[str, Any]) -> int:
        shares = [tables.share(r["probes"], self.best.figures) for r in result["rounds"]]
        return sum(found >= tables.SLOW for found in shares)

    def cost(self, task: Task) -> float:
        """Bytes (or int8 operations) that a token costs at least."""
        known = self.facts[task.model]
        if task.limit == "bandwidth":
            return float(known["weight_bytes"] + task.past * known["kv_bytes"])
        parameters = known["parameters"] + (known["head"] if task.kind == "together" else 0)
        return float(2 * parameters)

    def starts(self) -> dict[str, Any]:
        """Fresh processes: seconds to the first step, and peak memory after some work."""
        rounds: list[dict[str, Any]] = []
        names = [n for n in self.open(0) if n not in ("llama_cpp_q4_0", "pronk_int8")]
        for number in range(self.args.rounds + 1):
            if rounds and time.monotonic() > self.end:
                break
            values: dict[str, dict[str, float]] = {}
            for name in names if number % 2 else names[::-1]:
                peer = self.peer(name, 0, SMALL_CONTEXT)
                if "--plain" in self.open(0)[name].command:
                    peer.fall_back()
                try:
                    loaded = peer.start()
                    found = {key: loaded[key] for key in ("load_time", "import_time")}
                    values[name] = found
                    if number <= 1:
                        peer.ask(kind="prefill", prompt=self.tokens(0, 512))
                        peer.ask(kind="decode", prompt=self.tokens(0, 1), tokens=64)
                        found["peak_memory"] = peer.ask(kind="memory")
                        found["planned"] = loaded["about"].get("memory", {})
                except PeerError as error:
                    self.note(name, "start", str(error))
                peer.stop()
            if number:  # the first one warms the file cache
                rounds.append(values)
                self.say("start: " + ", ".join(
                    f"{n} {v['load_time']:.2f} s" for n, v in values.items()))  # fmt: skip
        return {"rounds": rounds, "context": SMALL_CONTEXT, "model": self.models[0].name}

    def run(self) -> dict[str, Any]:
        """All of it."""
        tasks = {task.name: self.measure(task) for task in self.tasks}
        for task in self.tasks:  # a later probe may have shown that an early spell was slow
            self.fill(task, tasks[task.name])
        starts = self.starts()
        for group in self.peers.values():
            for peer in group.values():
                peer.stop()
        return {
            "benchmark": "peers",
            "command": output.command(),
            "machine": describe(self.args.threads),
            "limits": self.best.figures,
            "models": self.facts,
            "peers": self.versions,
            "failures": self.failures,
            "tasks": tasks,
            "starts": starts,
        }


def facts(path: Path) -> dict[str, Any]:
    """What a token of a model costs at least, from its file's header."""
    with open_checkpoint(path) as checkpoint:
        spec, tensors = checkpoint.spec, checkpoint.tensors
        head = "model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight"
        layers = [t for n, t in tensors.items() if n.startswith("model.layers.") and t.cols > 1]
        matrices = [t for t in layers if len(t.shape) == 2]
        return {
            "file": path.name,
            "vocab": spec.vocab_size,
            "parameters": sum(t.shape[0] * t.shape[1] for t in matrices),
            "head": tensors[head].shape[0] * tensors[head].shape[1],
            "weight_bytes": sum(t.nbytes for t in matrices) + tensors[head].nbytes,
            # Keys and values of one position in 16 bits.
            "kv_bytes": spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 2,
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a GGUF file or a name")
    parser.add_argument("--second-model", default="qwen2.5-coder-0.5b", metavar="MODEL",
                        help="a larger one in other formats; none leaves it out")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=12, help="no repeats after this long")
    parser.add_argument("--only", default="", metavar="TASK,...", help=", ".join(
        t.name for t in TASKS))  # fmt: skip
    parser.add_argument("--peers", default="", metavar="NAME,...", help=", ".join(
        name for name in tables.NAMES if name != "pronk"))  # fmt: skip
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--openvino-python", default=sys.executable, metavar="PATH")
    output.add_output(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    try:
        models = [resolve(args.model)]
        if args.second_model != "none":
            models.append(resolve(args.second_model))
        comparison = Comparison(args, models)
        result = comparison.run()
    except (PronkError, PeerError) as error:
        raise SystemExit(f"peers.py: {error}") from None
    output.finish(result, args)


if __name__ == "__main__":
    main()
