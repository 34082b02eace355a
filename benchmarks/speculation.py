"""What drafting from earlier text buys: tokens a second with and without, on the same answers.

One loaded model answers greedily with and without, in turns, and must give the same tokens.
Prints medians, and medians of the ratios of neighbours.

    python benchmarks/speculation.py [--model MODEL] [--rounds 3] [--tokens 256] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import output
from machine import describe

from pronk import Model, SamplingParams, load, resolve

CODE = '''import json
from pathlib import Path


class Ledger:
    """Income and expenses, kept in a file."""

    def __init__(self, path):
        self.path = Path(path)
        self.entries = []
        if self.path.exists():
            self.entries = json.loads(self.path.read_text())

    def add_entry(self, name, amount, category="other"):
        if not name:
            raise ValueError("an entry needs a name")
        if amount == 0:
            raise ValueError("an entry needs an amount")
        self.entries.append({"name": name, "amount": amount, "category": category})
        self.save()

    def add_entries(self, rows):
        for name, amount in rows:
            self.add_entry(name, amount)

    def save(self):
        self.path.write_text(json.dumps(self.entries, indent=2))

    def balance(self):
        return sum(entry["amount"] for entry in self.entries)

    def by_category(self):
        totals = {}
        for entry in self.entries:
            category = entry["category"]
            totals[category] = totals.get(category, 0) + entry["amount"]
        return totals

    def largest(self, count=3):
        ordered = sorted(self.entries, key=lambda entry: -abs(entry["amount"]))
        return ordered[:count]


def main():
    ledger = Ledger("ledger.json")
    ledger.add_entry("salary", 3000, "income")
    ledger.add_entry("rent", -1200, "housing")
    ledger.add_entry("food", -400, "living")
    print("balance", ledger.balance())
    for category, total in ledger.by_category().items():
        print(category, total)
    for entry in ledger.largest():
        print(entry["name"], entry["amount"])


if __name__ == "__main__":
    main()
'''

TEXT = (
    "The bridge was built in the spring of 1887 by a company of forty men. They cut the stone in "
    "the quarry above the village and brought it down on sledges before the snow had melted. The "
    "foreman, a quiet man from the coast, kept a diary in which he wrote down the weather, the "
    "number of stones and the names of those who were ill. On the last day of May the arch was "
    "closed, and the frame was taken away in front of the whole village. Nobody spoke until the "
    "last beam had fallen. Then the teacher walked across with her pupils, and the foreman wrote: "
    "it holds. The diary is now in the museum of the town, in a case near the door, open at that "
    "page. Visitors often ask why there is no entry for the first of June. The guide tells them "
    "that the men slept until noon, and that the foreman had nothing to count."
)

TASKS = {
    "quote": f"Repeat this text verbatim, word for word:\n\n{TEXT}",
    "rename": "Rewrite this file with the method `add_entry` renamed to `record`, and print the "
    f"whole file:\n\n```python\n{CODE}```",
    "free": "Write a story about a lighthouse keeper who finds a message in a bottle.",
}


def answer(model: Model, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
    """Tokens of an answer, and how many came each second after the first."""
    tokens, first, last = [], 0.0, 0.0
    for piece in model.generate(prompt, params):
        last = time.perf_counter()
        first = first or last
        tokens.append(piece.token)
    return tokens, (len(tokens) - 1) / max(last - first, 1e-9)


def measure(model: Model, task: str, params: SamplingParams, rounds: int) -> dict[str, Any]:
    """One task in turns."""
    message = [{"role": "user", "content": task}]
    prompt = model.render(message) if model.has_chat_template else model.encode(task)
    before = model.speculation
    rates: dict[str, list[float]] = {"without": [], "with": []}
    count = 0
    for number in range(rounds):
        found = {}
        for side in rates if number % 2 else reversed(rates):
            model.speculate = side == "with"
            found[side], rate = answer(model, prompt, params)
            rates[side].append(rate)
        if found["with"] != found["without"]:
            raise SystemExit("the tokens differ: speculation is not exact")
        count = len(found["with"])
    done = model.speculation.since(before)
    pairs = zip(rates["with"], rates["without"], strict=True)
    return {
        "prompt_tokens": len(prompt),
        "tokens": count,
        "without": statistics.median(rates["without"]),
        "with": statistics.median(rates["with"]),
        "ratio": statistics.median(w / wo for w, wo in pairs),
        "drafted": done.drafted // rounds,
        "accepted": done.accepted // rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name, an address or a path")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    output.add_output(parser)
    args = parser.parse_args()
    params = SamplingParams(max_tokens=args.tokens, temperature=args.temperature, seed=1)
    path = resolve(args.model)
    model = load(path, args.threads, context=2048)
    answer(model, model.encode("Once upon a time"), SamplingParams(max_tokens=32))
    result = {
        "benchmark": "speculation",
        "command": output.command(),
        "machine": describe(model.threads),
        "model": path.name,
        "rounds": args.rounds,
        "tasks": {n: measure(model, task, params, args.rounds) for n, task in TASKS.items()},
    }
    output.finish(result, args)


if __name__ == "__main__":
    main()
