"""The other routes: models, embeddings, tokens, and how the server is."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from pronk.serve.errors import ApiError
from pronk.serve.generate import embed, make_way
from pronk.serve.hosted import Hosted
from pronk.serve.http.context import context_of
from pronk.serve.http.prepare import as_template
from pronk.serve.http.replies import (
    DetokenizeReply,
    EmbeddingReply,
    ModelCard,
    ModelList,
    TokenizeReply,
)
from pronk.serve.http.schema import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from pronk.serve.http.sse import until_gone

__all__ = ["router"]

router = APIRouter()
Vector = NDArray[np.float32]


def _card(model: Hosted) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "pronk",
            "context_length": model.context}  # fmt: skip


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> dict[str, Any]:
    """What is served."""
    cards = [_card(model) for model in context_of(request).models.values()]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def one_model(name: str, request: Request) -> dict[str, Any]:
    """One of what is served."""
    return _card(context_of(request).model(name))


@router.post("/v1/embeddings", response_model=None, responses={200: {"model": EmbeddingReply}})
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors of texts: the mean of the last hidden states, scaled to length one."""
    context = context_of(request)
    model = context.model(body.model)
    size = model.spec.hidden_size
    if body.dimensions is not None and body.dimensions != size:
        raise ApiError(
            400, f"this model's vectors have {size} numbers: dimensions cannot be "
            f"{body.dimensions}", "invalid_value", "dimensions",
        )  # fmt: skip
    make_way(model, len(body.inputs), 0, context.config.limits)  # before any is tokenized
    watch = context.watch(request.state.record)
    texts = [await watch.prompt(model, text) for text in body.inputs]
    inputs = [await model.encode(text) for text in texts]
    request.state.record.update(model=model.name, inputs=len(inputs))
    vectors = await until_gone(request.receive, embed(model, inputs, context.config.limits))
    items = [
        {"object": "embedding", "index": at, "embedding": _written(vector, body.encoding_format)}
        for at, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "model": model.name, "data": items, "usage": usage})


def _written(vector: Vector, encoding: str | None) -> list[float] | str:
    length = float(np.linalg.norm(vector))
    unit = (vector / length if length else vector).astype("<f4")
    if encoding == "base64":
        return base64.b64encode(unit.tobytes()).decode()
    return [float(value) for value in unit]


@router.post("/tokenize", response_model=TokenizeReply)
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a text, or of a conversation through the chat template."""
    model = context_of(request).model(body.model)
    if body.messages is not None:
        ids = await model.render([as_template(message) for message in body.messages])
    else:
        ids = await model.encode(body.prompt or "", body.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "context_length": model.context}


@router.post("/detokenize", response_model=DetokenizeReply)
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """Text of token ids."""
    model = context_of(request).model(body.model)
    return {"prompt": await model.aside(model.tokenizer.decode, body.tokens, False)}


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "not yet, or no longer"}})
async def ready(request: Request) -> Response:
    """Whether it takes work: 503 while it warms up or shuts down."""
    context = context_of(request)
    cold = [model.name for model in context.models.values() if not model.warm]
    if context.gauge.draining:
        return JSONResponse({"status": "draining"}, 503)
    if context.audit is not None and context.audit.error is not None:
        return JSONResponse({"status": f"no audit log: {context.audit.error}"}, 503)
    stopped = [model.name for model in context.models.values() if model.engine.closed]
    if stopped:
        return JSONResponse({"status": "the engine has stopped", "models": stopped}, 503)
    if cold:
        return JSONResponse({"status": "warming up", "models": cold}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    from prometheus_client import CONTENT_TYPE_LATEST

    return Response(context_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats")
async def stats(request: Request) -> dict[str, Any]:
    """What the dashboard plots."""
    return context_of(request).metrics.snapshot()
