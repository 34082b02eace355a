"""The gRPC services, called through generated stubs and by reflection."""

from __future__ import annotations

import json

import grpc
import httpx
import pytest
from checkpoints import tiny_llama_dir
from engines import halted
from servers import idle, running

from pronk.serve.config import ServeConfig, ServeLimits
from pronk.serve.grpc import generation_pb2 as pb
from pronk.serve.grpc import open_inference_pb2 as oip

TEXT = "once upon a time"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("grpc") / "tiny")


@pytest.fixture(scope="module")
def server(tiny):
    config = ServeConfig(port=0, grpc_port=0, limits=ServeLimits(body=64 << 10))
    with running({"tiny": tiny}, config) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.served.grpc.port}") as channel:
        yield channel


@pytest.fixture
def client(stubs, channel):
    return stubs["generation"].GenerationStub(channel)


@pytest.fixture
def inference(stubs, channel):
    return stubs["open_inference"].GRPCInferenceServiceStub(channel)


def test_the_answer_is_that_of_http(client, server):
    fields = {"temperature": 0.8, "seed": 7, "max_tokens": 20}
    reply = client.Generate(
        pb.GenerateRequest(text=TEXT, sampling=pb.Sampling(logprobs=2, **fields))
    )
    body = {"model": "tiny", "prompt": TEXT, **fields}
    over_http = httpx.post(f"{server.url}/v1/completions", json=body).json()
    assert reply.text == over_http["choices"][0]["text"]
    assert reply.usage.completion_tokens == over_http["usage"]["completion_tokens"]
    assert reply.usage.prompt_tokens == over_http["usage"]["prompt_tokens"]
    assert reply.finish_reason == over_http["choices"][0]["finish_reason"]
    assert len(reply.tokens) and all(len(token.top) == 2 for token in reply.tokens)
    parts = list(
        client.GenerateStream(pb.GenerateRequest(text=TEXT, sampling=pb.Sampling(**fields)))
    )
    assert "".join(part.text for part in parts) == reply.text
    assert [part.finish_reason for part in parts[:-1]] == [""] * (len(parts) - 1)
    assert parts[-1].finish_reason == reply.finish_reason
    assert parts[-1].usage.completion_tokens == reply.usage.completion_tokens


def test_prompts_of_each_kind(client):
    sampling = pb.Sampling(max_tokens=8)
    ids = client.Tokenize(pb.TokenizeRequest(text=TEXT)).ids
    assert client.Detokenize(pb.DetokenizeRequest(ids=ids)).text == TEXT
    text = client.Generate(pb.GenerateRequest(text=TEXT, sampling=sampling))
    tokens = client.Generate(pb.GenerateRequest(tokens=pb.Tokens(ids=ids), sampling=sampling))
    assert text.text == tokens.text and text.usage.prompt_tokens == len(ids)
    chat = pb.Conversation(messages=[pb.Message(role="user", content=TEXT)])
    assert client.Generate(
        pb.GenerateRequest(chat=chat, sampling=sampling)
    ).usage.prompt_tokens > len(ids)


def test_embeddings(client, server):
    reply = client.Embed(pb.EmbedRequest(texts=[TEXT, "print"]))
    over_http = httpx.post(
        f"{server.url}/v1/embeddings", json={"model": "tiny", "input": [TEXT, "print"]}
    ).json()
    for ours, theirs in zip(reply.embeddings, over_http["data"], strict=True):
        length = sum(value * value for value in ours.values) ** 0.5  # HTTP's are of length one
        unit = [value / length for value in ours.values]
        assert unit == pytest.approx(theirs["embedding"], abs=1e-6)
    assert reply.prompt_tokens == over_http["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "no prompt"),
        (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "the prompt is empty"),
        (pb.GenerateRequest(model="other", text=TEXT), "NOT_FOUND", "no model 'other'"),
        (
            pb.GenerateRequest(text=TEXT, sampling=pb.Sampling(top_p=2)),
            "INVALID_ARGUMENT", "top_p must be a number in",
        ),
        (pb.GenerateRequest(text="a " * 400), "INVALID_ARGUMENT", "the context holds 256"),
        (
            pb.GenerateRequest(tokens=pb.Tokens(ids=[9999])), "INVALID_ARGUMENT",
            "9999 is not in the vocabulary",
        ),
        (pb.GenerateRequest(text="a" * (65 << 10)), "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)  # fmt: skip
def test_refusals(client, request_, code, words):
    with pytest.raises(grpc.RpcError) as caught:
        client.Generate(request_)
    assert caught.value.code().name == code and words in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        list(client.GenerateStream(request_))
    assert caught.value.code().name == code and words in caught.value.details()


def test_one_that_is_cancelled_frees_its_blocks(client, server):
    sampling = pb.Sampling(max_tokens=200, ignore_eos=True)
    with halted(server.models[0].engine, after=1):  # it cannot end before
        parts = client.GenerateStream(pb.GenerateRequest(text=TEXT, sampling=sampling))
        next(parts)
        parts.cancel()
        idle(server)


def test_the_open_inference_protocol(inference, client):
    assert inference.ServerLive(oip.ServerLiveRequest()).live
    assert inference.ServerReady(oip.ServerReadyRequest()).ready
    assert inference.ModelReady(oip.ModelReadyRequest(name="tiny")).ready
    assert inference.ServerMetadata(oip.ServerMetadataRequest()).name == "pronk"
    about = inference.ModelMetadata(oip.ModelMetadataRequest(name="tiny"))
    assert [tensor.name for tensor in about.inputs] == ["text_input"]

    want = client.Generate(pb.GenerateRequest(text=TEXT, sampling=pb.Sampling(max_tokens=6))).text
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [2]}
    few = {"max_tokens": oip.InferParameter(int64_param=6)}
    texts = oip.InferTensorContents(bytes_contents=[TEXT.encode()] * 2)
    raw = b"".join(len(t).to_bytes(4, "little") + t for t in [TEXT.encode()] * 2)
    for given in (
        {"inputs": [{**tensor, "contents": texts}]},
        {"inputs": [tensor], "raw_input_contents": [raw]},
    ):
        reply = inference.ModelInfer(
            oip.ModelInferRequest(model_name="tiny", id="7", parameters=few, **given)
        )
        assert reply.id == "7"
        assert list(reply.outputs[0].contents.bytes_contents) == [want.encode()] * 2
        assert list(reply.outputs[1].contents.bytes_contents) == [b"length"] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": []}, "must have one input"),
        ({"parameters": {"heat": oip.InferParameter(int64_param=1)}}, "no parameter 'heat'"),
        ({"parameters": {"top_k": oip.InferParameter(string_param="x")}}, "top_k cannot be 'x'"),
        ({"raw_input_contents": [b"\x09\x00\x00\x00abc"]}, "cut short"),
        ({"raw_input_contents": [b"\x01\x00\x00\x00\xff"]}, "not UTF-8"),
        ({"raw_input_contents": [b"\x01\x00\x00\x00a" * 2]}, "2 texts where its shape says 1"),
    ],
)  # fmt: skip
def test_inputs_that_are_none(inference, changes, words):
    tensor = oip.ModelInferRequest.InferInputTensor(
        name="text_input", datatype="BYTES", shape=[1],
        contents=oip.InferTensorContents(bytes_contents=[b"a"]),
    )  # fmt: skip
    request = oip.ModelInferRequest(**{"model_name": "tiny", "inputs": [tensor], **changes})
    with pytest.raises(grpc.RpcError) as caught:
        inference.ModelInfer(request)
    assert caught.value.code().name == "INVALID_ARGUMENT" and words in caught.value.details()


def test_reflection_and_health(channel):
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"pronk.v1.Generation", "inference.GRPCInferenceService"} <= services
    found = DescriptorPool(database).FindServiceByName("pronk.v1.Generation")
    assert {method.name for method in found.methods} >= {"Generate", "GenerateStream"}
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "pronk.v1.Generation"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_keys_and_rates(stubs, tiny, tmp_path):
    file = tmp_path / "keys"
    file.write_text("one 0123456789abcdef\n")
    file.chmod(0o600)
    limits = ServeLimits(per_minute=2)
    config = ServeConfig(port=0, grpc_port=0, key_file=file, limits=limits)
    with (
        running({"tiny": tiny}, config) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.served.grpc.port}") as channel,
    ):
        client = stubs["generation"].GenerationStub(channel)
        request = pb.TokenizeRequest(text=TEXT)
        for given in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError, match="wants a key") as caught:
                client.Tokenize(request, metadata=given)
            assert caught.value.code().name == "UNAUTHENTICATED"
        key = (("authorization", "Bearer 0123456789abcdef"),)
        assert client.Tokenize(request, metadata=key).ids
        # A key's share is one, however it is used.
        headers = {"authorization": "Bearer 0123456789abcdef"}
        body = {"model": "tiny", "prompt": TEXT}
        assert httpx.post(f"{server.url}/tokenize", json=body, headers=headers).is_success
        with pytest.raises(grpc.RpcError) as caught:
            client.Tokenize(request, metadata=key)
        assert caught.value.code().name == "RESOURCE_EXHAUSTED"
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) >= 1
        inference = stubs["open_inference"].GRPCInferenceServiceStub(channel)
        assert inference.ServerLive(oip.ServerLiveRequest()).live  # without a key


def test_calls_are_audited(stubs, tiny, tmp_path):
    log = tmp_path / "audit.jsonl"
    with (
        running({"tiny": tiny}, ServeConfig(port=0, grpc_port=0, audit=log)) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.served.grpc.port}") as channel,
    ):
        client = stubs["generation"].GenerationStub(channel)
        client.Generate(pb.GenerateRequest(text=TEXT, sampling=pb.Sampling(max_tokens=3)))
        with pytest.raises(grpc.RpcError):
            client.Generate(pb.GenerateRequest(model="other", text=TEXT))
        with halted(server.models[0].engine, after=1):
            parts = client.GenerateStream(pb.GenerateRequest(text=TEXT))
            next(parts)
            parts.cancel()
            idle(server)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    calls = [line for line in lines if line.get("method") == "gRPC"]
    assert [call["status"] for call in calls] == ["OK", "NOT_FOUND", "CANCELLED"]
    assert calls[0]["route"] == "/pronk.v1.Generation/Generate"
    assert calls[0]["model"] == "tiny" and calls[0]["completion_tokens"] == 3
    assert TEXT not in log.read_text()


def test_a_server_that_drains_takes_no_more(client, server):
    server.served.gauge.draining = True
    try:
        with pytest.raises(grpc.RpcError) as caught:
            client.Tokenize(pb.TokenizeRequest(text=TEXT))
    finally:
        server.served.gauge.draining = False
    assert caught.value.code().name == "UNAVAILABLE"
