"""Forms of output: JSON schemas, expressions, grammars and forced calls, through the server."""

from __future__ import annotations

import json
import re

import openai
import pytest
from checkpoints import tiny_llama_dir
from servers import running

from pronk.serve.config import ServeConfig, ServeLimits

ASK = [{"role": "user", "content": "once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {key: {"enum": values}}, "required": [key],
        "additionalProperties": False}}}
    for name, key, values in (("weather", "city", ["Oslo", "Rome"]), ("clock", "zone", [1, 2]))
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("forms") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="module", params=[True, False], ids=["speculating", "plain"])
def client(request, tiny):
    config = ServeConfig(port=0, limits=ServeLimits(grammar=4096))
    with (
        running({"tiny": tiny}, config, context=1024, speculate=request.param) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def answers(client, **fields):
    """The same question, whole and as a stream."""
    args = {"model": "tiny", "messages": ASK, "seed": 5, "max_tokens": 200, **fields}
    whole = client.chat.completions.create(**args).choices[0]
    text, calls, reason = "", {}, None
    for chunk in client.chat.completions.create(**args, stream=True):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                name, arguments = calls.get(call.index, ("", ""))
                calls[call.index] = (name + (call.function.name or ""),
                                     arguments + (call.function.arguments or ""))  # fmt: skip
    assert text == (whole.message.content or "")
    assert reason == whole.finish_reason
    told = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or []]
    assert list(calls.values()) == told and list(calls) == list(range(len(told)))
    return whole


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    choice = answers(client, response_format=form, temperature=temperature)
    value = json.loads(choice.message.content)
    assert choice.finish_reason == "stop"
    assert set(value) == {"name", "age", "tags"} and 0 <= value["age"] <= 99
    assert len(value["name"]) <= 8 and set(value["tags"]) <= {"a", "b"}


def test_json_of_any_kind(client):
    for seed in range(20):  # random weights seldom end an object: take one that did
        args = {"model": "tiny", "messages": ASK, "seed": seed, "max_tokens": 300,
                "temperature": 0.5, "logit_bias": {str(i): 8 for i in (92, 95)}}  # fmt: skip
        whole = client.chat.completions.create(**args, response_format={"type": "json_object"})
        assert whole.choices[0].message.content.startswith("{")
        if whole.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(whole.choices[0].message.content), dict)
            return
    pytest.fail("no object was ended")


def test_an_expression_a_choice_and_a_grammar(client):
    def structured(**form):
        return answers(client, extra_body={"structured_outputs": form}).message.content

    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", structured(regex=r"[0-9]{3}-[a-f]{2}"))
    assert structured(choice=["ja", 'n"ein', "vielleicht ä"]) in ("ja", 'n"ein', "vielleicht ä")
    lark = 'start: "x=" number ("," number)~2\nnumber: /[0-9]{1,2}/'
    assert re.fullmatch(r"x=\d{1,2}(,\d{1,2}){2}", structured(grammar=lark))


def test_completions_keep_a_form_too(client):
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, max_tokens=20, temperature=1.2,
        extra_body={"structured_outputs": {"regex": "(yes|no)"}})  # fmt: skip
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"regex": "((("}, "regex"),
        ({"grammar": "nothing"}, "grammar"),
        ({"json": {"type": "colour"}}, "json"),
        ({"json": {"$ref": "https://example.org/schema"}}, "json"),
        ({"regex": "a" * 5000}, "5000 bytes, of at most 4096"),
        ({"regex": "a", "grammar": "b"}, "exactly one"),
        ({}, "exactly one"),
    ],
)
def test_forms_that_cannot_be_used(client, form, said):
    with pytest.raises(openai.BadRequestError, match=said):
        client.completions.create(model="tiny", prompt="x",
                                  extra_body={"structured_outputs": form})  # fmt: skip


def test_a_form_that_nests_too_deeply(client):
    schema: dict = {"type": "object"}
    for _ in range(70):
        schema = {"not": schema}
    with pytest.raises(openai.BadRequestError, match="nested deeper than 64"):
        client.completions.create(model="tiny", prompt="x",
                                  extra_body={"structured_outputs": {"json": schema}})  # fmt: skip


def test_a_form_that_grows_too_complex_ends_its_request_alone(client):
    form = {"structured_outputs": {"regex": "(a{1000}){1000}"}}
    with pytest.raises(openai.BadRequestError, match="regex of the output"):
        client.completions.create(model="tiny", prompt="x", max_tokens=50, extra_body=form)
    assert client.completions.create(model="tiny", prompt="x").choices[0].finish_reason


def test_a_named_call(client):
    choice = answers(client, tools=TOOLS,
                     tool_choice={"type": "function", "function": {"name": "clock"}})  # fmt: skip
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "clock" and call.id.startswith("call_")
    assert json.loads(call.function.arguments)["zone"] in (1, 2)


def test_a_required_call(client):
    choice = answers(client, tools=TOOLS, tool_choice="required", temperature=1.2)
    (call,) = choice.message.tool_calls
    value = json.loads(call.function.arguments)
    allowed = {"weather": [{"city": "Oslo"}, {"city": "Rome"}], "clock": [{"zone": 1}, {"zone": 2}]}
    assert value in allowed[call.function.name]


def test_calls_that_the_model_makes_of_itself(client):
    # Random weights call nothing, but a form can have them write what is found as calls.
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    form = {"structured_outputs": {"choice": [f"Well: {text}{text}"]}}
    choice = answers(client, tools=TOOLS, tool_choice="auto", extra_body=form)
    assert choice.message.content == "Well:"
    assert [c.function.arguments for c in choice.message.tool_calls] == ['{"city": "Oslo"}'] * 2
    none = answers(client, tools=TOOLS, tool_choice="none",
                   extra_body={"structured_outputs": {"choice": [text]}})  # fmt: skip
    assert none.message.content == text and not none.message.tool_calls


def test_marks_that_are_tokens_of_no_text_are_seen(client, monkeypatch):
    from pronk.serve.http import prepare
    from pronk.serve.tools import ToolFormat

    monkeypatch.setattr(prepare, "tool_format", lambda _: ToolFormat("<|im_start|>"))
    written = '"So: " <|im_start|> "{\\"name\\": \\"clock\\", \\"arguments\\": {\\"zone\\": 2}}"'
    form = {"structured_outputs": {"grammar": f"start: {written}"}}
    choice = answers(client, tools=TOOLS, tool_choice="auto", extra_body=form)
    assert choice.message.content == "So:" and choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("clock", '{"zone": 2}')
    plain = answers(client, extra_body=form)  # without tools, they are no text
    assert plain.message.content.startswith('So: {"name"')


def test_results_of_calls_are_taken_back(client):
    asked = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function",
             "function": {"name": "clock", "arguments": '{"zone": 1}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="tiny", messages=asked, tools=TOOLS, max_tokens=3)
    assert answer.usage.prompt_tokens > 100


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [*TOOLS, TOOLS[0]]},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema"}},
    ],
)
def test_what_does_not_go_together(client, fields):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=ASK, **fields)
