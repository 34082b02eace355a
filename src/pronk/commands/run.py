"""``pronk run``: one prompt, one streamed answer, one line of figures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from pronk.commands import common
from pronk.commands.session import NAME, Session, add_session
from pronk.device.memory import peak_memory
from pronk.engine.runner import ExpertReads
from pronk.errors import RequestError
from pronk.model import Piece, Speculation
from pronk.units import format_bytes

__all__ = ["Answer", "configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[MODEL] PROMPT",
        help="the model (default: the small instruct model) and the prompt; - reads stdin",
    )
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    add_session(parser)
    common.add_context(parser)
    common.add_runtime(parser)
    common.add_experts(parser)
    common.add_speculation(parser, default=True)
    common.add_sampling(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    from pronk.checkpoint.registry import DEFAULT_MODEL

    if len(args.words) > 2:
        raise RequestError("give a model and a prompt: put the prompt in quotes")
    name, text = args.words if len(args.words) == 2 else (DEFAULT_MODEL, args.words[0])
    prompt = common.first_prompt(text)
    params, session = common.sampling(args), Session(args.session)
    model, load_time = common.open_model(name, args, args.context)
    raw = args.raw or not model.has_chat_template
    session.restore(model, raw, None if raw else args.system)
    start, said = time.perf_counter(), session.said(prompt)
    ids = model.encode(session.text + prompt) if raw else model.render(said)
    name = NAME if args.session else None
    answer = Answer(model.generate(ids, params, session=name), start, show=not args.json)
    if raw:
        session.continued(session.text + prompt + answer.text)
    else:
        session.answered(said, answer.text)
    session.save(model)
    peak, reads = peak_memory(), model.expert_reads()
    figures = {
        "prompt_tokens": len(ids),
        "session_tokens": session.tokens,
        "tokens": answer.tokens,
        "ttft": answer.ttft,
        "decode": answer.decode,
        "drafted": model.speculation.drafted,
        "accepted": model.speculation.accepted,
        "load_time": load_time,
        "peak_memory": peak,
        "expert_reads": reads.to_dict(),
    }
    if args.json:
        common.print_json({"text": answer.text, "finish_reason": answer.finish_reason, **figures})
    else:
        common.note(
            f"{len(ids)} prompt tokens{kept(session)}, first token {answer.ttft * 1000:.0f} ms, "
            f"{answer.tokens} tokens at {answer.decode:.1f}/s{drafts(model.speculation)}, "
            f"{found(reads)}"
            f"peak memory {format_bytes(peak)}, loaded in {load_time:.2f} s"
        )


def kept(session: Session) -> str:
    """What was there of an earlier run, for a line of figures; empty without one."""
    return f" ({session.tokens} kept by the session)" if session.tokens else ""


def drafts(done: Speculation) -> str:
    """How drafting went, for a line of figures; empty where nothing was drafted."""
    return f" ({done.accepted} of {done.drafted} drafted tokens held)" if done.drafted else ""


def found(reads: ExpertReads) -> str:
    """How many experts were in memory, for a line of figures; empty where all are."""
    if reads.slots == reads.experts:
        return ""
    return f"{reads.hit_rate:.0%} of experts found in {format_bytes(reads.memory)}, "


class Answer:
    """Drains a generation, showing it as it comes, and times it.

    Attributes
    ----------
    ttft : float
        Seconds from the request to the first token.
    decode : float
        Tokens a second after the first; 0 for a single token.
    """

    def __init__(self, pieces: Iterator[Piece], start: float, show: bool) -> None:
        parts: list[str] = []
        self.finish_reason: str | None = None
        self.tokens = 0
        first = last = start
        for piece in pieces:
            last = time.perf_counter()
            if not self.tokens:
                first = last
            self.tokens += 1
            self.finish_reason = piece.finish_reason
            parts.append(piece.text)
            if show and piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        if show:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self.text = "".join(parts)
        self.ttft = first - start
        self.decode = (self.tokens - 1) / (last - first) if last > first else 0.0
