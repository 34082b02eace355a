"""Calls found in what a model writes, wherever the pieces are cut."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from pronk.serve.tools import (
    ArgumentText,
    CallParser,
    CallStart,
    ToolFormat,
    as_written,
    tool_format,
)

HERMES = tool_format("tools <tool_call>")
LLAMA = tool_format("tools <|python_tag|>")
MISTRAL = tool_format("tools [TOOL_CALLS]")
NAMED = tool_format("tools [TOOL_CALLS] [ARGS]")
BARE = ToolFormat(arguments="parameters")


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
    (HERMES, r'<tool_call>{"name": "\q", "arguments": {}}</tool_call>', ("", [(r"\q", "{}")])),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', ("", [("f", '{"x": 1}')])),
    (LLAMA, '{"type": "function", "name": "f", "parameters": {}}', ("", [("f", "{}")])),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
     ("", [("f", "{}"), ("g", "{}")])),
    (LLAMA, 'So be it. <|python_tag|>{"name": "f", "parameters": {}}',
     ("So be it.", [("f", "{}")])),
    (LLAMA, '<|python_tag|>search.call(query="x")', ('<|python_tag|>search.call(query="x")', [])),
    (LLAMA, '{"answer": 3}', ('{"answer": 3}', [])),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}, "id": "a1b2c3d4e"}, '
     '{"name": "g", "arguments": {}}]', ("", [("f", '{"x": [1]}'), ("g", "{}")])),
    (MISTRAL, '[{"name": "f", "arguments": {}}]', ("", [("f", "{}")])),
    (MISTRAL, "[1] is a footnote", ("[1] is a footnote", [])),
    (MISTRAL, "[TOOL", ("[TOOL", [])),
    (NAMED, '[TOOL_CALLS]f[ARGS]{"x": "]"}[TOOL_CALLS]g[CALL_ID]a1b2c3d4e[ARGS]{}',
     ("", [("f", '{"x": "]"}'), ("g", "{}")])),
    (NAMED, 'Wait.[TOOL_CALLS]f{"x": 1}', ("Wait.", [("f", '{"x": 1}')])),
    (NAMED, '[TOOL_CALLS] [{"name": "f", "arguments": {}}]', ("", [("f", "{}")])),
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
    for form in (HERMES, MISTRAL):
        assert parsed(CallParser(form, inside=True), list(inside)) == ("", [("f", '{"x": "y"}')])
    for form in (HERMES, LLAMA, MISTRAL, NAMED):
        named = CallParser(form, inside=True, name="f")
        assert parsed(named, list(' {"x": 1}')) == ("", [("f", '{"x": 1}')])
        # What such an answer begins with is what the parser would have found.
        whole = form.named("f") + ' {"x": 1}' + ("" if form is NAMED else "}")
        assert parsed(CallParser(form, names=("f",)), [whole]) == ("", [("f", '{"x": 1}')])


def test_the_format_is_read_off_the_template():
    assert HERMES.start == "<tool_call>" and HERMES.end and HERMES.opening == "<tool_call>\n"
    assert tool_format("{{ messages }}") == replace(HERMES, shown=False)
    llama = tool_format('{% if tools %}{"name", "parameters"}{% endif %}')
    assert llama == LLAMA and LLAMA.arguments == "parameters" and LLAMA.marks == ("<|python_tag|>",)
    assert MISTRAL.opening == "[TOOL_CALLS] [" and not MISTRAL.args
    assert NAMED.marks == ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    assert tool_format("{% if tools %}{{ tools }}{% endif %}") == ToolFormat()


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
