"""Traces to a collector of OpenTelemetry, and the log as JSON: all but what was said."""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import httpx
import pytest
from checkpoints import tiny_llama_dir
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from servers import process, running

from pronk import RequestError
from pronk.serve.config import ServeConfig
from pronk.serve.grpc import generation_pb2 as pb
from pronk.serve.log import JsonFormatter
from pronk.serve.trace import ENDPOINT_VARIABLES, open_tracer

SECRET = "the quick brown fox"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector(ThreadingHTTPServer):
    """Takes traces by OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list:
        out = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                assert names["service.name"] == "pronk"
                out += [span for scope in resource.scope_spans for span in scope.spans]
        return out


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.paths.add(self.path)
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def collector():
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("trace") / "tiny")


def attributes(span) -> dict:
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_requests_are_traced(tiny, collector):
    config = ServeConfig(port=0, grpc_port=0)
    tracer = open_tracer(collector.url, "test")
    with running({"tiny": tiny}, config, tracer=tracer) as server, server.client() as http:
        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 5, "temperature": 0.5, "n": 2,
                "ignore_eos": True, "seed": 3}  # fmt: skip
        headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
        http.post("/v1/completions", json=body, headers=headers).raise_for_status()
        chat = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}],
                "max_tokens": 3, "stream": True}  # fmt: skip
        http.post("/v1/chat/completions", json=chat).raise_for_status()
        http.post("/v1/completions", json={**body, "temperature": 9})
        not_sampled = {"traceparent": f"{TRACEPARENT[:-1]}0"}
        http.post("/v1/embeddings", json={"model": "tiny", "input": "x"}, headers=not_sampled)
        http.post("/v1/embeddings", json={"model": "tiny", "input": SECRET})
        with grpc.insecure_channel(f"127.0.0.1:{server.served.grpc.port}") as channel:
            call = channel.unary_unary(
                "/pronk.v1.Generation/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            sampling = pb.Sampling(max_tokens=4, ignore_eos=True)
            call(pb.GenerateRequest(text=SECRET, sampling=sampling),
                 metadata=(("traceparent", TRACEPARENT),))  # fmt: skip
    # What was under way when the server ended has been sent.
    assert collector.paths == {"/v1/traces"}
    spans = [span for span in collector.spans() if "/ready" not in span.name]
    of = {attributes(s)["pronk.request.id"]: s for s in spans if s.kind == 2}
    mine = of["mine"]
    assert mine.name == "text_completion tiny"
    assert (mine.trace_id.hex(), mine.parent_span_id.hex()) == (TRACE, PARENT)
    told = attributes(mine)
    assert told["http.route"] == "/v1/completions" and told["http.response.status_code"] == 200
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "tiny"
    assert told["gen_ai.usage.output_tokens"] == 10 and told["gen_ai.usage.input_tokens"] > 3
    assert told["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert told["gen_ai.request.choice.count"] == 2 and told["gen_ai.request.seed"] == 3
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.temperature"]) == (5, 0.5)
    parts = [span for span in spans if span.parent_span_id == mine.span_id]
    assert [span.name for span in parts] == ["queue", "prefill", "decode"]
    times = [mine.start_time_unix_nano]
    for part in parts:
        times += [part.start_time_unix_nano, part.end_time_unix_nano]
    times.append(mine.end_time_unix_nano)
    assert times == sorted(times) and times[2] == times[3] and times[4] == times[5]

    roots = [span for span in spans if span.kind == 2]
    names = sorted(span.name for span in roots)
    assert names == ["POST /v1/completions", "chat tiny", "embeddings tiny",
                     "text_completion tiny", "text_completion tiny"]  # fmt: skip
    refused = next(span for span in roots if span.name == "POST /v1/completions")
    assert attributes(refused)["error.type"] == "invalid_value"
    called = next(span for span in roots if "rpc.method" in attributes(span))
    assert called.trace_id.hex() == TRACE
    assert attributes(called)["rpc.method"] == "pronk.v1.Generation/Generate"
    assert attributes(called)["gen_ai.usage.output_tokens"] == 4
    assert not any(SECRET.encode() in body or b"quick" in body for body in collector.bodies)


def test_where_traces_go(monkeypatch, collector):
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert open_tracer(None, "test") is None
    for wrong in ("localhost:4318", "ftp://x", "http://"):
        with pytest.raises(RequestError, match="must be an address"):
            open_tracer(wrong, "test")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(RequestError, match=r"pip install 'pronk\[serve,otel\]'"):
        open_tracer(collector.url, "test")


def test_the_log_as_json(tiny, collector):
    args = (f"it={tiny}", "--context", "128", "--threads", "1", "--no-packed-cache",
            "--log-format", "json", "--otlp-endpoint", f"{collector.url}/v1/traces")  # fmt: skip
    with process(*args) as (url, child):
        body = {"model": "it", "prompt": SECRET, "max_tokens": 5, "ignore_eos": True}
        headers = {"x-request-id": "mine", "traceparent": TRACEPARENT}
        httpx.post(f"{url}/v1/completions", json=body, headers=headers).raise_for_status()
        httpx.post(f"{url}/v1/completions", json={"model": "other", "prompt": SECRET})
        child.terminate()
        _, printed = child.communicate(timeout=120)
    assert SECRET not in printed and "quick" not in printed
    lines = [json.loads(line) for line in printed.splitlines()]  # every line is JSON
    assert all(line["level"] == "info" and line["time"].endswith("Z") for line in lines)
    assert any("loaded in" in line["message"] for line in lines)
    (mine,) = (line for line in lines if line.get("request") == "mine")
    assert mine["message"] == "POST /v1/completions 200" and mine["trace_id"] == TRACE
    assert mine["model"] == "it" and mine["key"] == "anyone" and mine["status"] == 200
    assert mine["completion_tokens"] == 5 and mine["prompt_tokens"] > 3
    assert mine["finish_reasons"] == ["length"]
    assert 0 <= mine["queue_seconds"] <= mine["ttft_seconds"] <= mine["seconds"]
    (lost,) = (line for line in lines if line.get("status") == 404)
    assert lost["error"] == "model_not_found" and "ttft_seconds" not in lost
    sent = {span.trace_id.hex() for span in collector.spans()}
    assert TRACE in sent and lost["trace_id"] in sent


def test_a_failure_in_the_log_is_one_line():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("failed",),
                                   (ValueError, error, error.__traceback__))  # fmt: skip
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["message"] == "it failed"
    assert "ValueError" in json.loads(line)["exception"]
