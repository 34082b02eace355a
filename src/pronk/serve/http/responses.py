"""``POST /v1/responses``: OpenAI's newer way to ask for text. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from pronk.serve.errors import ApiError, error_body
from pronk.serve.generate import Delta, Job, Tally, admit, generate, make_way, whole
from pronk.serve.hosted import Hosted
from pronk.serve.http.answer import Answer, answered
from pronk.serve.http.context import Context
from pronk.serve.http.prepare import prepare
from pronk.serve.http.schema import ChatRequest
from pronk.serve.http.sse import event

__all__ = ["router"]

router = APIRouter()
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class InputText(_Strict):
    """A part of a message."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(_Strict):
    """One turn of a conversation; those of earlier responses may be sent back as they came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    type: Literal["message"] | None = None
    id: Annotated[str, Field(max_length=256)] | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(_Strict):
    """The form of the text; a schema lies beside its name."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema goes with the type json_schema, and with no other")
        return self


class TextOptions(_Strict):
    """What the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # without effect


class ResponseRequest(_Strict):
    """What `respond` takes."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=4095)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = False
    text: TextOptions | None = None
    store: Literal[False] | None = Field(None, description="nothing is stored")
    # OpenAI's, without effect here.
    metadata: dict[str, str] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat request."""
        turns = [] if self.instructions is None else [("system", self.instructions)]
        if isinstance(self.input, str):
            turns.append(("user", self.input))
        else:
            turns += [(message.role, message.text) for message in self.input]
        given = self.text.format if self.text else None
        form: dict[str, Any] | None = None
        if given is not None and given.type != "text":
            form = {"type": given.type}
            if given.schema_ is not None:
                form["json_schema"] = {"name": given.name or "output", "schema": given.schema_}
        return ChatRequest.model_validate({
            "model": self.model, "response_format": form,
            "messages": [{"role": role, "content": text} for role, text in turns],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p,
        })  # fmt: skip


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class OutputMessage(BaseModel):
    """The assistant's message."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: str
    content: list[OutputText]


class ResponseReply(BaseModel):
    """The answer of ``/v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    output: list[OutputMessage]
    usage: dict[str, Any] | None


@router.post("/v1/responses", response_model=None, responses={200: {"model": ResponseReply}})
async def respond(body: ResponseRequest, request: Request) -> Response:
    """A text in answer to a text or a conversation."""
    return await answered(body, request, _begin)


async def _begin(
    context: Context, model: Hosted, body: ResponseRequest, request: Request
) -> _Answer:
    chat, limits = body.as_chat(), context.config.limits
    make_way(model, 1, 0, limits)  # before anything is tokenized
    watch = context.watch(request.state.record)
    turn = await prepare(model, chat, watch)
    admit(model, [turn.prompt], 1, limits)
    (form,) = await model.constraints(turn.form, limits.grammar, 1)
    tally = Tally()
    job = Job(turn.prompt, chat.params(), form)
    deltas = generate(model, [job], context.metrics, tally, watch)
    request.state.record.update(model=model.name, choices=1, tokens=tally)
    return _Answer(body, deltas, tally, request.state.request_id)


class _Answer(Answer):
    """One response, whole or as a stream of events."""

    def __init__(
        self, body: ResponseRequest, deltas: AsyncGenerator[Delta], tally: Tally, number: str
    ) -> None:
        super().__init__(deltas, 1)
        self._body, self._tally = body, tally
        self._item = f"msg_{number}"
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        self._told = 0
        self._texts: list[str] = []
        self._reason: str | None = None
        self._head = {
            "id": f"resp_{number}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "error": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "previous_response_id": None,
            "store": False,
        }

    def _message(self, text: str, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        return {
            "type": "message", "id": self._item, "role": "assistant", "status": status,
            "content": [part] if text or status != "in_progress" else [],
        }  # fmt: skip

    def _response(self, text: str | None, reason: str | None = None) -> dict[str, Any]:
        """The response so far; whole once there is a reason why it ended."""
        if text is None or reason is None:
            return {**self._head, "status": "in_progress", "incomplete_details": None,
                    "output": [], "usage": None}  # fmt: skip
        why = _INCOMPLETE.get(reason)
        status = "incomplete" if why else "completed"
        usage = self._tally
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": why} if why else None,
            "output": [self._message(text, status)],
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        [done] = await whole(self._deltas, 1)
        return self._response(done.text, done.finish_reason)

    def _tell(self, kind: str, **fields: Any) -> bytes:
        self._told += 1
        return event(kind, {"type": kind, "sequence_number": self._told - 1, **fields})

    def pieces(self, delta: Delta) -> Iterator[bytes]:
        """A delta as events; before the first, that the response has begun."""
        if not self._told:
            for kind in ("response.created", "response.in_progress"):
                yield self._tell(kind, response=self._response(None))
            item = self._message("", "in_progress")
            yield self._tell("response.output_item.added", output_index=0, item=item)
            part = {"type": "output_text", "text": "", "annotations": []}
            yield self._tell("response.content_part.added", **self._place, part=part)
        self._reason = delta.finish_reason
        if delta.text:
            self._texts.append(delta.text)
            kind = "response.output_text.delta"
            yield self._tell(kind, **self._place, delta=delta.text, logprobs=[])

    def ending(self) -> Iterator[bytes]:
        """The text, its part, its item and the response, each as it ends."""
        text = "".join(self._texts)
        whole = self._response(text, self._reason)
        item = whole["output"][0]
        yield self._tell("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._tell("response.content_part.done", **self._place, part=item["content"][0])
        yield self._tell("response.output_item.done", output_index=0, item=item)
        yield self._tell(f"response.{whole['status']}", response=whole)

    def failure(self, error: ApiError) -> bytes:
        """An error as an event."""
        said = error_body(error)["error"]
        return self._tell("error", code=said["code"], message=said["message"], param=said["param"])
