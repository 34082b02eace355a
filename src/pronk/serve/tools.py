"""Calls of tools: shown to the model through its template, found in what it writes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["ArgumentText", "CallParser", "CallStart", "ToolFormat", "as_written", "tool_format"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes a call: JSON with a name and arguments, perhaps between marks.

    Parameters
    ----------
    start, end : str
        The marks; without a start, the whole answer is the call.
    arguments : str
        The name of the arguments' field.
    opening : str
        What an answer begins with that must be a call.
    args : str
        What stands between a bare name and the arguments, where a call is not one JSON object.
    shown : bool
        Whether the model's own template shows tools; else a system message does.
    """

    start: str = ""
    end: str = ""
    arguments: str = "arguments"
    opening: str = ""
    args: str = ""
    shown: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be tokens of no text, and must be seen where calls are looked for."""
        marks = (self.start, self.end, *((self.args, _CALL_ID) if self.args else ()))
        return tuple(mark for mark in marks if mark)

    def named(self, name: str) -> str:
        """What an answer begins with that must be a call of a function: its arguments follow."""
        if self.args:
            return f"{self.start}{name}{self.args}"
        return f'{self.opening}{{"name": {json.dumps(name)}, "{self.arguments}":'


_CALL_ID = "[CALL_ID]"
# What a template holds, and how its model writes calls then; the first that is found counts.
_FORMATS = (
    ("<tool_call>", ToolFormat("<tool_call>", "</tool_call>", opening="<tool_call>\n")),
    ("[ARGS]", ToolFormat("[TOOL_CALLS]", opening="[TOOL_CALLS] [", args="[ARGS]")),
    ("[TOOL_CALLS]", ToolFormat("[TOOL_CALLS]", opening="[TOOL_CALLS] [")),
    ("<|python_tag|>", ToolFormat("<|python_tag|>", arguments="parameters")),
    ('"parameters"', ToolFormat("<|python_tag|>", arguments="parameters")),  # Llama 3.2
)


def tool_format(template: str) -> ToolFormat:
    """How the model of a chat template writes calls."""
    if "tools" not in template:
        return replace(_FORMATS[0][1], shown=False)  # as Hermes and Qwen do
    return next((form for mark, form in _FORMATS if mark in template), ToolFormat())


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentText:
    """More of a call's arguments."""

    index: int
    text: str


Found = str | CallStart | ArgumentText
_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(
    rf'\s*[\[,;]?\s*\{{\s*(?:"(?:type|id)"\s*:\s*{_STRING}\s*,\s*)*"name"\s*:\s*({_STRING})\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*'
)
_NAMED = re.compile(
    r"\s*([A-Za-z0-9_.-]{1,64})(?:\[CALL_ID\][A-Za-z0-9_-]{1,64})?(?:\[ARGS\])?\s*(?=\{)"
)
_FIELD = re.compile(rf"\s*,\s*{_STRING}\s*:\s*(?:{_STRING}|[\w.+-]+)\s*(?=[,}}])")
_LONGEST_HEAD = 512


class CallParser:
    """Splits an answer that arrives in pieces into text and calls.

    Parameters
    ----------
    form : ToolFormat
    inside : bool
        Whether the answer begins within a call, as a forced one does.
    names : collection of str
        The functions there are: without a mark before it, only a call of one of them is one.
    name : str or None
        The function that is called, if the answer is its arguments alone.
    """

    def __init__(
        self,
        form: ToolFormat,
        inside: bool = False,
        name: str | None = None,
        names: Collection[str] = (),
    ) -> None:
        self._form, self._names = form, names
        self._buffer = ""
        self._state = "head" if inside else "begin"
        self._bare = False  # the call that comes has no marks
        self._forced = inside or name is not None
        self._value = _Value()
        self.calls = 0
        self._name = name

    def push(self, text: str) -> list[Found]:
        """Take a piece and give what is certain."""
        found: list[Found] = []
        if self._name is not None:
            found.append(self._call(self._name))
            self._name, self._state = None, "arguments"
        self._buffer += text
        while getattr(self, f"_{self._state}")(found):
            pass
        return found

    def flush(self) -> list[Found]:
        """At the end: what was held back is text after all."""
        rest, self._buffer = self._buffer, ""
        if self._state == "head" and not self._forced:
            rest = self._mark + rest
        elif self._state != "text" and self._state != "begin":
            return []
        return [rest] if rest.strip() or (not self.calls and rest) else []

    def _call(self, name: str) -> CallStart:
        self.calls += 1
        self._value = _Value()
        return CallStart(self.calls - 1, f"call_{secrets.token_hex(12)}", name)

    @property
    def _mark(self) -> str:
        """What stood before the call that was looked for."""
        return "" if self._bare else self._form.start

    def _begin(self, found: list[Found]) -> bool:
        """Without marks, an answer is a call if it begins like one; small models forget them."""
        begun = self._buffer.lstrip()
        if not begun:
            return False
        start = self._form.start
        marked = begun.startswith(start) if start else False
        if start.startswith(begun) and not marked:
            return False
        self._bare = begun[0] in "{[" and not marked
        self._state = "head" if self._bare else "text" if self._form.start else "plain"
        return True

    def _plain(self, found: list[Found]) -> bool:
        if self._buffer:
            found.append(self._buffer)
            self._buffer = ""
        return False

    def _text(self, found: list[Found]) -> bool:
        start = self._form.start
        at = self._buffer.find(start)
        if at < 0:
            keep = next((n for n in range(min(len(start) - 1, len(self._buffer)), 0, -1)
                         if start.startswith(self._buffer[-n:])), 0)  # fmt: skip
            # White space may stand before a call: it is text only if text follows.
            certain = self._buffer[: len(self._buffer) - keep].rstrip()
            if certain:
                found.append(certain)
                self._buffer = self._buffer[len(certain) :]
            return False
        before = self._buffer[:at].rstrip()
        if before:
            found.append(before)
        self._buffer, self._state = self._buffer[at + len(start) :], "head"
        return True

    def _head(self, found: list[Found]) -> bool:
        match = _HEAD.match(self._buffer)
        name = _unquoted(match[1]) if match else ""
        if not match and self._form.args and not self._bare:
            match = _NAMED.match(self._buffer)
            name = match[1] if match else ""
        if match and (not self._bare or name in self._names):
            found.append(self._call(name))
            self._buffer, self._state = self._buffer[match.end() :], "arguments"
            return True
        form = self._form
        ended = not self._bare and form.end and form.end in self._buffer
        if ended or match or len(self._buffer) > _LONGEST_HEAD:
            # What is no call is text, its mark with it.
            found.append(self._mark + self._buffer)
            self._buffer, self._state = "", "text" if form.start else "plain"
        return False

    def _arguments(self, found: list[Found]) -> bool:
        begun, end = self._value.begun, self._value.end(self._buffer)
        part = self._buffer if end is None else self._buffer[:end]
        part = part if begun else part.lstrip()
        if part:
            found.append(ArgumentText(self.calls - 1, part))
        if end is None:
            self._buffer = ""
            return False
        self._buffer, self._state = self._buffer[end:], "tail"
        return True

    def _tail(self, found: list[Found]) -> bool:
        if self._form.end and not self._bare:
            at = self._buffer.find(self._form.end)
            if at < 0:
                return False
            self._buffer, self._state = self._buffer[at + len(self._form.end) :], "text"
            return True
        field = _FIELD.match(self._buffer)
        if field:
            self._buffer = self._buffer[field.end() :]
            return True
        self._buffer = self._buffer.lstrip("}] \n\t")
        if self._buffer[:1] in (",", ";"):
            following = self._buffer[1:].lstrip()
            if following[:1] == "{":
                self._state = "head"
                return True
            if following[:1] in ("", '"'):
                return False  # another call, or another field of this one
        start = self._form.start
        if start and self._buffer.startswith(start):
            self._buffer, self._state = self._buffer[len(start) :], "head"
            return True
        if not start.startswith(self._buffer):
            self._buffer = ""
        return False


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:  # an escape that is none
        return text[1:-1]


class _Value:
    """Finds where a JSON value ends that arrives in pieces."""

    def __init__(self) -> None:
        self.begun = False
        self._depth, self._quoted, self._escaped = 0, False, False

    def end(self, text: str) -> int | None:
        """Where it ends in the next piece, if there."""
        for at, char in enumerate(text):
            if not self.begun and char.isspace():
                continue
            scalar_ended = self.begun and self._depth == 0 and not self._quoted and char in ",}]"
            if scalar_ended:
                return at
            self.begun = True
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


def as_written(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], form: ToolFormat
) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: calls and results written out as text."""
    out: list[dict[str, Any]] = []
    if tools:
        shown = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        first = f"You may call functions. They are, as JSON schemas:\n{shown}\n" \
            f"To call one, write only:\n{form.start}\n" \
            f'{{"name": <function-name>, "arguments": <args-json-object>}}\n{form.end}'  # fmt: skip
        out.append({"role": "system", "content": first})
    for message in messages:
        plain = {"role": message["role"], "content": message.get("content") or ""}
        if message["role"] == "tool":
            plain = {"role": "user", "content": f"<tool_response>\n{plain['content']}\n"
                     "</tool_response>"}  # fmt: skip
        for call in message.get("tool_calls", ()):
            written = json.dumps({"name": call["function"]["name"],
                                  "arguments": call["function"]["arguments"]},
                                 ensure_ascii=False)  # fmt: skip
            plain["content"] = f"{plain['content']}\n{form.start}\n{written}\n{form.end}".lstrip()
        if len(out) == 1 and tools and message["role"] == "system":
            out[0]["content"] = f"{plain['content']}\n\n{out[0]['content']}"
        else:
            out.append(plain)
    return out
