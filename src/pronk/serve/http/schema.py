"""What requests may hold, each number within a range.

Fields that OpenAI does not know are refused, as OpenAI does; its own fields that change nothing
here (``user``, ``metadata``, ...) are taken and ignored. Ours beyond OpenAI's are ``top_k``,
``min_p``, ``repetition_penalty``, ``ignore_eos``, ``structured_outputs`` (named as vLLM names
them) and ``chat_template_kwargs``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from pronk.spec import SamplingParams

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "Message",
    "ResponseFormat",
    "Sampling",
    "StreamOptions",
    "StructuredOutputs",
    "TokenizeRequest",
    "Tool",
    "ToolCall",
]

_MOST_MESSAGES, _MOST_TOOLS, _MOST_PROMPTS, _MOST_BIASED = 4096, 128, 256, 1024
_MOST_INT = 2**31 - 1

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=_MOST_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]


class Strict(BaseModel):
    """Refuses fields it does not know, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream tells beside its text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = Field(
        False, description="usage so far in every chunk, with include_usage"
    )
    include_obfuscation: bool | None = None  # OpenAI's padding of chunks: none here


class StructuredOutputs(Strict):
    """A form that the output must have: exactly one of these."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Stop], Field(min_length=1, max_length=256)] | None = None
    grammar: str | None = Field(None, description="in llguidance's dialect of Lark")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [v for v in (self.json_schema, self.regex, self.choice, self.grammar)
                 if v is not None]  # fmt: skip
        if len(given) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self


class JsonSchemaFormat(Strict):
    """A JSON schema with a name."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's way of asking for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class Sampling(Strict):
    """How tokens are chosen: what chat and completions share."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=_MOST_BIASED)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_INT)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    top_k: Annotated[int, Field(ge=-1, le=_MOST_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    ignore_eos: bool | None = False
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def count(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @property
    def usage(self) -> Literal["last", "each"] | None:
        """The chunks of a stream that say what it took so far, if any."""
        if self.stream_options is None or not self.stream_options.include_usage:
            return None
        return "each" if self.stream_options.continuous_usage_stats else "last"

    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def _most(self) -> int | None:
        return self.max_tokens

    def params(self, choice: int = 0) -> SamplingParams:
        """How the tokens of one of ``n`` texts are chosen; each has a seed of its own.

        Raises
        ------
        RequestError
            If a value is out of its range.
        """
        stop = self.stop
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            # OpenAI takes 0 too: the likeliest token alone.
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-9),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=None if self.seed is None else (self.seed + choice) % 2**64,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            max_tokens=self._most(),
            logprobs=self._logprobs(),
            ignore_eos=bool(self.ignore_eos),
        )


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """A call that the model made: its arguments as a string."""

    name: FunctionName
    arguments: str


class ToolCall(Strict):
    """A call of a tool, in an assistant's message."""

    id: Annotated[str, Field(max_length=128)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is required")
        return self

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Strict):
    """What a tool is called, and takes."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionChoice(Strict):
    """A function's name."""

    name: FunctionName


class NamedToolChoice(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    function: FunctionChoice


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_INT)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: (
        Annotated[dict[Name, bool | int | str | None], Field(max_length=32)] | None
    ) = None
    # OpenAI's, without effect here.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("tools has two functions of one name")
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
            raise ValueError(f"tool_choice names {choice.function.name}, which tools does not have")
        if choice == "required" and not names:
            raise ValueError("tool_choice required goes with tools")
        formed = self.response_format is not None and self.response_format.type != "text"
        if formed and self.structured_outputs is not None:
            raise ValueError("give response_format or structured_outputs, not both")
        if self.forced and (formed or self.structured_outputs is not None):
            raise ValueError("a forced tool_choice leaves no room for another form of output")
        return self

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

    def _logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def _most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


Texts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=_MOST_PROMPTS)]
)


def _each(texts: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One text or several, each as it stands or as token ids, as a list."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts[0], int):
        return [texts]
    return cast(list[str | list[int]], texts)


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: Texts
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.best_of is not None and self.best_of != self.count:
            raise ValueError("best_of other than n is not supported")
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of an echoed prompt are not supported")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        return _each(self.prompt)

    def _logprobs(self) -> int | None:
        return self.logprobs

    def _most(self) -> int | None:
        return self.max_tokens or 16  # as OpenAI does


class EmbeddingRequest(Strict):
    """``POST /v1/embeddings``."""

    model: Name
    input: Texts
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, each a text or token ids."""
        return _each(self.input)


class TokenizeRequest(Strict):
    """``POST /tokenize``: of a text, or of a conversation through the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]
