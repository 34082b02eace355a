"""The command line: a verb, the module that carries it out, and how errors end."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from pronk import __version__
from pronk.errors import PronkError

__all__ = ["VERBS", "main"]

# verb -> (module with configure(parser) and run(args), what it does); imported when called.
VERBS = {
    "run": ("pronk.commands.run", "answer one prompt"),
    "chat": ("pronk.commands.chat", "talk with a model"),
    "serve": ("pronk.commands.serve", "serve models over HTTP, as OpenAI's clients expect"),
    "audit": ("pronk.commands.audit", "check an audit log of pronk serve"),
    "pull": ("pronk.commands.pull", "fetch a model into the cache"),
    "list": ("pronk.commands.list", "show the models at hand"),
    "inspect": ("pronk.commands.inspect", "show what a model is and what memory it needs"),
    "fit": ("pronk.commands.fit", "find, write and measure the variant that holds a budget"),
    "compress": ("pronk.commands.compress", "write a model in fewer bits, by a recipe"),
    "prune": ("pronk.commands.prune", "remove layers, heads, neurons or weights, and recover"),
    "distill": ("pronk.commands.distill", "train a model on the predictions of a larger one"),
    "qat": ("pronk.commands.qat", "train a model on the grid that it will be stored on"),
    "bench": ("pronk.commands.bench", "measure speed and memory"),
    "doctor": ("pronk.commands.doctor", "examine this machine, and say what slows Pronk down"),
    "eval": ("pronk.commands.eval", "measure perplexity and divergence on a text"),
    "compare": (
        "pronk.commands.compare",
        "say which variant of a model is better, and by how much",
    ),
}


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: pronk [--help] [--version] VERB ...\n\n"
        "Llama-family models on the device you have, under a budget you state.\n\n"
        f"verbs:\n{verbs}\n\n'pronk VERB --help' tells more."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for an error the user can mend, 130."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"pronk {__version__}")
        return 0
    if arguments[0] not in VERBS:
        print(f"pronk: error: there is no verb {arguments[0]!r}: choose from {', '.join(VERBS)}",
              file=sys.stderr)  # fmt: skip
        return 2
    # NumPy's linear algebra is not used, but its threads would take the cores from ours.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    module_name, what = VERBS[arguments[0]]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"pronk {arguments[0]}", description=what + ".")
    module.configure(parser)
    # Options may stand between a model and its prompt, but after -- everything is a word.
    parse = parser.parse_args if "--" in arguments else parser.parse_intermixed_args
    try:
        code = int(module.run(parse(arguments[1:])) or 0)
        sys.stdout.flush()
        return code
    except PronkError as error:
        print(f"pronk: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pronk: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left; nothing can be said to it.
        sys.stderr.close()
        return 141
    except OSError as error:
        print(f"pronk: error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"pronk: error: memory ran out ({error}): use a shorter context, window or prompt",
              file=sys.stderr)  # fmt: skip
        return 2
