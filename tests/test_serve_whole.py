"""Every route by OpenAI's client, every method by generated stubs; one answer on every way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import openai
import pytest
from checkpoints import tiny_llama_dir
from engines import halted
from servers import running, until

from pronk.model import load
from pronk.serve.config import ServeConfig
from pronk.serve.grpc import generation_pb2 as pb
from pronk.serve.grpc import open_inference_pb2 as oip
from pronk.spec import SamplingParams

TEXT = "once upon a time"
HELLO = [{"role": "user", "content": TEXT}]
FEW = pb.Sampling(max_tokens=4)
TENSOR = oip.ModelInferRequest.InferInputTensor(
    name="text_input", datatype="BYTES", shape=[1],
    contents=oip.InferTensorContents(bytes_contents=[TEXT.encode()]),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture(scope="module")
def server(tiny):
    with running({"tiny": tiny}, ServeConfig(port=0, grpc_port=0), kv_tokens=512) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.served.grpc.port}") as channel:
        yield channel


def test_every_route_by_openai_s_client(server, client):
    bare = client.with_options(base_url=server.url)
    chat = {"model": "tiny", "messages": HELLO, "seed": 5, "max_tokens": 8}
    text = {"model": "tiny", "prompt": TEXT, "seed": 5, "max_tokens": 8}
    response = {"model": "tiny", "input": TEXT, "temperature": 0, "max_output_tokens": 8}
    said = client.chat.completions.create(**chat).choices[0].message.content
    continued = client.completions.create(**text).choices[0].text
    answered = client.responses.create(**response).output_text
    assert said and continued and answered
    driven = {
        "/v1/models": lambda: [model.id for model in client.models.list()] == ["tiny"],
        "/v1/models/{name}": lambda: client.models.retrieve("tiny").id == "tiny",
        "/v1/chat/completions": lambda: said == "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**chat, stream=True)
        ),
        "/v1/completions": lambda: continued == "".join(
            chunk.choices[0].text for chunk in client.completions.create(**text, stream=True)
        ),
        "/v1/responses": lambda: answered == "".join(
            event.delta
            for event in client.responses.create(**response, stream=True)
            if event.type == "response.output_text.delta"
        ),
        "/v1/embeddings": lambda: len(
            client.embeddings.create(model="tiny", input=[TEXT, "print"]).data) == 2,
        "/tokenize": lambda: bare.post(
            "/tokenize", cast_to=object, body={"model": "tiny", "prompt": TEXT})["tokens"],
        "/detokenize": lambda: bare.post(
            "/detokenize", cast_to=object, body={"model": "tiny", "tokens": [5, 6]})["prompt"],
        "/health": lambda: bare.get("/health", cast_to=object),
        "/ready": lambda: bare.get("/ready", cast_to=object),
        "/metrics": lambda: "pronk:generation_tokens_total" in bare.get("/metrics", cast_to=str),
        "/stats": lambda: "tiny" in bare.get("/stats", cast_to=object)["models"],
    }  # fmt: skip
    described = bare.get("/openapi.json", cast_to=object)["paths"]
    assert set(driven) == set(described)  # a new route belongs here too
    for route, right in driven.items():
        assert right(), route


def test_every_method_by_generated_stubs(stubs, channel):
    driven = {
        ("generation", "Generation"): {
            "Generate": (pb.GenerateRequest(text=TEXT, sampling=FEW), lambda r: r.text),
            "GenerateStream": (
                pb.GenerateRequest(text=TEXT, sampling=FEW),
                lambda parts: [part.finish_reason for part in parts][-1] == "length",
            ),
            "Embed": (pb.EmbedRequest(texts=[TEXT]), lambda r: r.embeddings[0].values),
            "Tokenize": (pb.TokenizeRequest(text=TEXT), lambda r: r.ids),
            "Detokenize": (pb.DetokenizeRequest(ids=[5, 6]), lambda r: r.text),
        },
        ("open_inference", "GRPCInferenceService"): {
            "ServerLive": (oip.ServerLiveRequest(), lambda r: r.live),
            "ServerReady": (oip.ServerReadyRequest(), lambda r: r.ready),
            "ModelReady": (oip.ModelReadyRequest(name="tiny"), lambda r: r.ready),
            "ServerMetadata": (oip.ServerMetadataRequest(), lambda r: r.name == "pronk"),
            "ModelMetadata": (oip.ModelMetadataRequest(name="tiny"), lambda r: r.inputs),
            "ModelInfer": (
                oip.ModelInferRequest(model_name="tiny", inputs=[TENSOR]), lambda r: r.outputs,
            ),
        },
    }  # fmt: skip
    files = {"generation": pb, "open_inference": oip}
    for (file, service), methods in driven.items():
        described = files[file].DESCRIPTOR.services_by_name[service].methods_by_name
        assert set(methods) == set(described)  # a new method belongs here too
        stub = getattr(stubs[file], f"{service}Stub")(channel)
        for name, (request, right) in methods.items():
            assert right(getattr(stub, name)(request, timeout=240)), name


def test_company_changes_no_answer(server, client, stubs, channel, tiny):
    """Streamed, whole and over gRPC, side by side, in a cache that is too small for all."""
    engine, method = server.models[0].engine, stubs["generation"].GenerationStub(channel)
    asked = [(f"tell {at} {TEXT} " * (1 + at % 3), at) for at in range(8)]
    fields = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 60}
    with load(tiny, threads=1, context=256, packed_cache=False) as model:
        alone = [
            "".join(p.text for p in model.generate(text, SamplingParams(seed=seed, **fields)))
            for text, seed in asked
        ]
    assert len(set(alone)) == len(alone)

    def whole(text: str, seed: int) -> str:
        body = {"model": "tiny", "prompt": text, "seed": seed, **fields}
        return client.completions.create(**body).choices[0].text

    def streamed(text: str, seed: int) -> str:
        body = {"model": "tiny", "prompt": text, "seed": seed, "stream": True, **fields}
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**body))

    def over_grpc(text: str, seed: int) -> str:
        request = pb.GenerateRequest(text=text, sampling=pb.Sampling(seed=seed, **fields))
        return "".join(part.text for part in method.GenerateStream(request))

    before = engine.stats().preemptions
    ways = (whole, streamed, over_grpc)
    with ThreadPoolExecutor(3 * len(asked)) as pool:
        with halted(engine):  # they all come in before the first step
            futures = [[pool.submit(way, *one) for one in asked] for way in ways]
            until(lambda: server.models[0].line.waiting == 3 * len(asked), "all of them wait")
        for way, found in zip(ways, futures, strict=True):
            assert [future.result(240) for future in found] == alone, way.__name__
    assert engine.stats().preemptions > before  # they did run together
