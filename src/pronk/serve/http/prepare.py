"""What a request's fields mean for the engine: forms of output, tools, log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pronk.engine.sampler import Sample
from pronk.serve.grammar import Form
from pronk.serve.guard.watch import Watch
from pronk.serve.hosted import Hosted
from pronk.serve.http.schema import (
    ChatRequest,
    Message,
    NamedToolChoice,
    ResponseFormat,
    StructuredOutputs,
)
from pronk.serve.tools import CallParser, ToolFormat, as_written, tool_format

__all__ = ["Turn", "as_template", "chat_logprobs", "completion_logprobs", "form_of", "prepare"]


def form_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Form | None:
    """The form that a request asks for, if any."""
    if structured is not None:
        if structured.json_schema is not None:
            return Form("json", structured.json_schema)
        if structured.regex is not None:
            return Form("regex", structured.regex)
        if structured.choice is not None:
            return Form("choice", structured.choice)
        return Form("grammar", structured.grammar)
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is not None:
        return Form("json", response_format.json_schema.schema_)
    return Form("json", {"type": "object"})


@dataclass(slots=True)
class Turn:
    """A chat request as the engine takes it."""

    prompt: list[int]
    form: Form | None
    tools: ToolFormat | None = None
    forced: bool = False
    name: str | None = None  # the function that must be called
    names: tuple[str, ...] = ()  # those that may be
    marks: Mapping[int, bytes] = field(default_factory=dict)  # tokens to be seen: see ToolFormat

    def parser(self) -> CallParser | None:
        """What finds calls in an answer."""
        if self.tools is None:
            return None
        return CallParser(self.tools, self.forced, self.name, self.names)


async def prepare(model: Hosted, body: ChatRequest, watch: Watch) -> Turn:
    """The prompt of a chat request, as the guard lets it pass, and what its answer must be.

    Raises
    ------
    RequestError
        If the template refuses, or the model has none.
    ApiError
        400, if the guard blocks it.
    """
    written = [as_template(message) for message in body.messages]
    messages = await watch.messages(model, written)
    extra: dict[str, Any] = dict(await watch.values(model, body.chat_template_kwargs or {}))
    for reserved in ("messages", "tools", "bos_token", "eos_token", "add_generation_prompt"):
        extra.pop(reserved, None)
    form = form_of(body.response_format, body.structured_outputs)
    told = any(m.role == "tool" or m.tool_calls for m in body.messages)
    active = bool(body.tools) and body.tool_choice != "none"
    if not active and not told:
        return Turn(await model.render(messages, **extra), form)
    how = tool_format(model.tokenizer.chat_template or "")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if active else []
    tools = await watch.values(model, tools)
    if how.shown:
        extra["tools"] = tools or None
    else:
        messages = as_written(messages, tools, how)
    opening, name, forced = "", None, body.forced
    if forced:
        opening, name, form = _force(body, how)
    prompt = await model.render(messages, opening, **extra)
    names = tuple(tool.function.name for tool in body.tools or ())
    if not active:
        return Turn(prompt, form)
    return Turn(prompt, form, how, forced, name, names, await model.silent(how.marks))


def _force(body: ChatRequest, how: ToolFormat) -> tuple[str, str | None, Form]:
    """How an answer begins that must be a call, whose, and what it must be from there."""
    of = {tool.function.name: tool.function.parameters or {"type": "object"}
          for tool in body.tools or ()}  # fmt: skip
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        return how.named(name), name, Form("call", of[name])
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, how.arguments: parameters},
            "required": ["name", how.arguments],
            "additionalProperties": False,
        }
        for name, parameters in of.items()
    ]
    return how.opening, None, Form("json", {"anyOf": calls})


def as_template(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text, and arguments as objects."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _object(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def chat_logprobs(model: Hosted, samples: Sequence[Sample]) -> dict[str, Any]:
    """Log-probabilities as chat answers carry them."""
    return {"content": [_chosen(model, sample) for sample in samples]}


def _chosen(model: Hosted, sample: Sample) -> dict[str, Any]:
    top = [_token(model, id, value) for id, value in sample.top_logprobs]
    return {**_token(model, sample.token, sample.logprob or 0.0), "top_logprobs": top}


def _token(model: Hosted, id: int, logprob: float) -> dict[str, Any]:
    raw = model.tokenizer.token_bytes(id)
    return {"token": model.token_text(id), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    """JSON has no infinity: what a form forbids is as unlikely as OpenAI's least likely."""
    return max(logprob, -9999.0)


def completion_logprobs(
    model: Hosted, samples: Sequence[Sample], offset: int
) -> tuple[dict[str, Any], int]:
    """Log-probabilities as completions carry them, and where the next token's text begins."""
    tokens, offsets = [], []
    for sample in samples:
        text = model.token_text(sample.token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(sample.logprob or 0.0) for sample in samples],
        "top_logprobs": [
            {model.token_text(id): _finite(value) for id, value in sample.top_logprobs}
            for sample in samples
        ],
        "text_offset": offsets,
    }, offset
