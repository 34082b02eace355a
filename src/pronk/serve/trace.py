"""Spans of requests for OpenTelemetry, made when they have ended: no token waits for them.

A request is a span, with the client's as its parent where it names one (W3C's ``traceparent``), and
what it did are spans below it: ``queue`` until its first step, ``prefill`` until its first token,
``decode`` until its last. Names are those of the semantic conventions for HTTP, RPC and generative
AI. There is no text in any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from pronk.errors import RequestError
from pronk.serve.ended import Ended

__all__ = ["ENDPOINT_VARIABLES", "Tracer", "open_tracer"]

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PATH = "/v1/traces"
_NANO = 1_000_000_000
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/pronk.v1.Generation/Generate": "text_completion",
    "/pronk.v1.Generation/GenerateStream": "text_completion",
    "/pronk.v1.Generation/Embed": "embeddings",
    "/inference.GRPCInferenceService/ModelInfer": "text_completion",
}
_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty",
            "seed")  # fmt: skip


def open_tracer(endpoint: str | None, version: str) -> Tracer | None:
    """The tracer that an endpoint or OpenTelemetry's environment asks for; None if neither does.

    Raises
    ------
    RequestError
        If the endpoint is none, or the packages are not installed.
    """
    if endpoint is None and not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return None
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(
                f"--otlp-endpoint must be an address such as http://localhost:4318, not {endpoint}"
            )
        endpoint = endpoint.rstrip("/")
        endpoint = endpoint if endpoint.endswith(_PATH) else endpoint + _PATH
    try:
        return Tracer(endpoint, version)
    except ImportError as error:
        raise RequestError(
            f"traces need {error.name}, which is not installed: pip install 'pronk[serve,otel]', "
            f"or unset {' and '.join(ENDPOINT_VARIABLES)}"
        ) from None


class Tracer:
    """Sends spans to a collector by OTLP over HTTP, in batches, from a thread of its own.

    Parameters
    ----------
    endpoint : str or None
        The whole address; None takes what the environment says.
    version : str
    """

    def __init__(self, endpoint: str | None, version: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # What the environment names wins, as OTEL_SERVICE_NAME must.
        named = {
            SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "pronk"),
            SERVICE_VERSION: version,
        }
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("pronk.serve", version)
        self._extract = TraceContextTextMapPropagator().extract
        self._trace = trace

    def tell(self, ended: Ended) -> str | None:
        """Make the spans of a request; gives the id of its trace, if it is recorded."""
        operation = _OPERATIONS.get(ended.route)
        name = f"{ended.method} {ended.route}"
        if operation is not None and ended.model is not None:
            name = f"{operation} {ended.model}"
        span = self._tracer.start_span(
            name,
            context=self._extract(ended.parent),
            kind=self._trace.SpanKind.SERVER,
            start_time=ended.began,
            attributes=dict(_attributes(ended, operation)),
        )
        if ended.failed:
            span.set_status(self._trace.StatusCode.ERROR)
        recorded = span.is_recording()  # else the client, or the environment, wants none
        if recorded:
            below = self._trace.set_span_in_context(span)
            for part, start, end, attributes in _parts(ended):
                child = self._tracer.start_span(
                    part, context=below, start_time=start, attributes=attributes
                )
                child.end(end)
        span.end(ended.began + int(ended.seconds * _NANO))
        found = span.get_span_context()
        return self._trace.format_trace_id(found.trace_id) if recorded else None

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _attributes(ended: Ended, operation: str | None) -> Iterator[tuple[str, Any]]:
    yield "pronk.request.id", ended.request
    if ended.method == "gRPC":
        yield "rpc.system.name", "grpc"
        yield "rpc.method", ended.route.removeprefix("/")
        yield "rpc.response.status_code", str(ended.status)
    else:
        yield "http.request.method", ended.method
        yield "http.route", ended.route
        yield "http.response.status_code", ended.status
    if ended.error is not None or ended.failed:
        yield "error.type", ended.error or str(ended.status)
    if operation is not None:
        yield "gen_ai.operation.name", operation
        yield "gen_ai.provider.name", "pronk"
    if ended.model is not None:
        yield "gen_ai.request.model", ended.model
        yield "gen_ai.response.model", ended.model
    if (tokens := ended.tokens) is None:
        return
    yield "gen_ai.usage.input_tokens", tokens.prompt
    yield "gen_ai.usage.output_tokens", tokens.completion
    yield "gen_ai.usage.cache_read.input_tokens", tokens.cached
    if tokens.reasons:
        yield "gen_ai.response.finish_reasons", [tokens.reasons[i] for i in sorted(tokens.reasons)]
    if tokens.ttft is not None:
        yield "gen_ai.response.time_to_first_chunk", tokens.ttft
    if tokens.choices > 1:
        yield "gen_ai.request.choice.count", tokens.choices
    for name in _REQUEST:
        value = getattr(tokens.params, name, None)
        if value is not None:
            yield f"gen_ai.request.{name}", value


def _parts(ended: Ended) -> Iterator[tuple[str, int, int, Mapping[str, Any]]]:
    """What a request did: name, start, end (nanoseconds since 1970) and attributes of each part."""
    tokens = ended.tokens
    if tokens is None or tokens.asked is None:
        return
    asked = tokens.asked
    if tokens.queued is None or tokens.ttft is None:
        return
    begun, first = (asked + int(seconds * _NANO) for seconds in (tokens.queued, tokens.ttft))
    new = tokens.prompt - tokens.cached
    yield "queue", asked, begun, {}
    yield "prefill", begun, first, {"gen_ai.usage.input_tokens": new}
    if tokens.last is not None and tokens.completion > 1:
        last = asked + int(tokens.last * _NANO)
        yield "decode", first, last, {"gen_ai.usage.output_tokens": tokens.completion}
