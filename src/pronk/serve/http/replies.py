"""What answers hold: for the served OpenAPI, and for tests that hold answers to it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

__all__ = [
    "ChatReply",
    "CompletionReply",
    "DetokenizeReply",
    "EmbeddingReply",
    "ErrorReply",
    "ModelList",
    "TokenizeReply",
]

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """An answer that is an error."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    """Of the prompt's tokens, those whose keys and values were there already."""

    cached_tokens: int


class Usage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChosenLogprob]


class FunctionCallReply(BaseModel):
    """A call's name, and its arguments as a string."""

    name: str
    arguments: str


class ToolCallReply(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCallReply


class ChatMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(BaseModel):
    """One of ``n`` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatReply(BaseModel):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities, in the older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionReply(BaseModel):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class EmbeddingItem(BaseModel):
    """One vector: numbers, or their float32 bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    """The answer of ``/v1/embeddings``."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingItem]
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(BaseModel):
    """The answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(BaseModel):
    """The answer of ``/tokenize``."""

    tokens: list[int]
    count: int
    context_length: int


class DetokenizeReply(BaseModel):
    """The answer of ``/detokenize``."""

    prompt: str
