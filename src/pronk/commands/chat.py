"""``pronk chat``: a conversation whose history stays in the KV cache."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing

from pronk.commands import common
from pronk.commands.run import Answer
from pronk.commands.session import NAME, Session, add_session
from pronk.errors import PronkError, RequestError
from pronk.model import Model
from pronk.spec import SamplingParams

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a name, an address or a path")
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

    params, session = common.sampling(args), Session(args.session)
    model, _ = common.open_model(args.model or DEFAULT_MODEL, args, args.context)
    if not model.has_chat_template:
        raise RequestError("this model has no chat template: use pronk run --raw")
    session.restore(model, raw=False, system=args.system)
    interactive = sys.stdin.isatty() and not args.json
    if session.tokens:
        common.note(f"pronk: going on after {session.tokens} tokens")
    if interactive:
        common.note("Enter sends, /reset forgets the conversation, Ctrl-D ends.")
    try:
        _talk(model, session, params, interactive, args.json)
    finally:  # what was interrupted is kept up to the last whole turn
        session.save(model)


def _talk(
    model: Model, session: Session, params: SamplingParams, interactive: bool, as_json: bool
) -> None:
    """Take turns until the input ends."""
    opening = [m for m in session.messages if m["role"] == "system"]
    while (line := _read(interactive)) is not None:
        text = line.strip()
        if text == "/reset":
            session.messages = list(opening)
        elif text:
            try:
                _turn(model, session, text, params, as_json)
            except PronkError as error:
                if not interactive:
                    raise
                common.note(f"pronk: {error}; /reset starts anew")


def _read(interactive: bool) -> str | None:
    if interactive:
        sys.stdout.write("> ")
        sys.stdout.flush()
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        raise RequestError("standard input is not UTF-8 text") from None
    return line or None


def _turn(model: Model, session: Session, text: str, params: SamplingParams, as_json: bool) -> None:
    start, before = time.perf_counter(), model.speculation
    said = session.said(text)
    with closing(model.chat(said, params, session=NAME)) as pieces:
        answer = Answer(pieces, start, show=not as_json)
    session.answered(said, answer.text)  # before it is told: whoever reads it may interrupt at once
    if as_json:
        import json

        done = model.speculation.since(before)
        turn = {"text": answer.text, "finish_reason": answer.finish_reason,
                "tokens": answer.tokens, "ttft": answer.ttft, "decode": answer.decode,
                "drafted": done.drafted, "accepted": done.accepted}  # fmt: skip
        print(json.dumps(turn, ensure_ascii=False), flush=True)
