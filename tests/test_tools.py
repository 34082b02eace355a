"""Calls found in what a model writes, wherever the pieces are cut."""

from __future__ import annotations

import json
import random

import pytest

from pronk.serve.tools import (
    ArgumentText,
    CallParser,
    CallStart,
    ToolFormat,
    as_written,
    tool_format,
)

HERMES = ToolFormat("<tool_call>", "</tool_call>")
BARE = ToolFormat("", "", "parameters")


def parsed(parser: CallParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    found = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    text, calls, ids = "", [], set()
    for part in found:
        if isinstance(part, CallStart):
            assert part.index == len(calls)
            ids.add(part.id)
            calls.append([part.name, ""])
        elif isinstance(part, ArgumentText):
            assert part.index == len(calls) - 1
            calls[-1][1] += part.text
        else:
            text += part
    assert len(ids) == len(calls)
    return text, [(name, arguments) for name, arguments in calls]


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


NESTED = '{"a": {"b": ["}", "\\"{"]}, "c": "</tool_call>"}'
CASES = [
    (HERMES, "just text, a < b", ("just text, a < b", [])),
    (HERMES, call("f", "{}"), ("", [("f", "{}")])),
    (HERMES, f"Let me see.\n{call('f', NESTED)}", ("Let me see.", [("f", NESTED)])),
    (HERMES, f"{call('f', '{}')}\n{call('g', '[1, 2]')}", ("", [("f", "{}"), ("g", "[1, 2]")])),
    (HERMES, "<tool_call>\nnot json\n</tool_call>", ("<tool_call>\nnot json\n</tool_call>", [])),
    (HERMES, "a <tool_call", ("a <tool_call", [])),
    (HERMES, '<tool_call>\n{"name": "f", "argum', ('<tool_call>\n{"name": "f", "argum', [])),
    (HERMES, '<tool_call>{"name":"f","arguments":{"x": 1', ("", [("f", '{"x": 1')])),
    (BARE, ' {"name": "f", "parameters": {"x": 1}}', ("", [("f", '{"x": 1}')])),
    (BARE, '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": null}]',
     ("", [("f", "{}"), ("g", "null")])),
    (HERMES, '\n{"name": "f", "arguments": {"x": 1}}\n', ("", [("f", '{"x": 1}')])),
    (HERMES, '{"name": "other", "arguments": {}}', ('{"name": "other", "arguments": {}}', [])),
    (HERMES, '{"a": 1} and text', ('{"a": 1} and text', [])),
    (BARE, "no call {}", ("no call {}", [])),
    (BARE, '{"answer": 3}', ('{"answer": 3}', [])),
    (BARE, "{" + "x" * 1000, ("{" + "x" * 1000, [])),
]  # fmt: skip


@pytest.mark.parametrize(("form", "answer", "expected"), CASES, ids=range(len(CASES)))
def test_wherever_an_answer_is_cut(form, answer, expected):
    rng = random.Random(0)
    assert parsed(CallParser(form, names=("f", "g")), [answer]) == expected
    assert parsed(CallParser(form, names=("f", "g")), list(answer)) == expected
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(answer) + 1), min(3, len(answer))))
        pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert parsed(CallParser(form, names=("f", "g")), pieces) == expected


def test_a_forced_call():
    inside = '{"name": "f", "arguments": {"x": "y"}}'
    assert parsed(CallParser(HERMES, inside=True), list(inside)) == ("", [("f", '{"x": "y"}')])
    named = CallParser(HERMES, inside=True, name="f")
    assert parsed(named, list(' {"x": 1}')) == ("", [("f", '{"x": 1}')])


def test_the_format_is_read_off_the_template():
    assert tool_format("{% if tools %}<tool_call>{% endif %}") == HERMES
    assert tool_format("{{ messages }}") == ToolFormat("<tool_call>", "</tool_call>", shown=False)
    assert tool_format('{% if tools %}{"name", "parameters"}{% endif %}') == BARE


def test_a_template_without_tools_is_told_in_words():
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "",
         "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]  # fmt: skip
    written = as_written(messages, tools, HERMES)
    assert [m["role"] for m in written] == ["system", "user", "assistant", "user"]
    assert written[0]["content"].startswith("Be brief.") and '"name": "f"' in written[0]["content"]
    assert json.loads(written[2]["content"].split("\n")[1]) == {"name": "f", "arguments": {"x": 1}}
    assert written[3]["content"] == "<tool_response>\ndone\n</tool_response>"
