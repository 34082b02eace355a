"""The server, driven by the official client and by plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from checkpoints import tiny_llama_dir
from engines import halted
from servers import idle, running, until

from pronk.model import load
from pronk.serve.config import ServeConfig, ServeLimits
from pronk.serve.hosted import Hosted

HELLO = [{"role": "user", "content": "once upon a time"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def server(tiny):
    config = ServeConfig(port=0, limits=ServeLimits(body=64 << 10))
    with running({"tiny": tiny, "second": tiny}, config) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server):
    with server.client() as http:
        yield http


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "second"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


def test_a_chat_answer_is_what_the_model_says(client, tiny):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_completion_tokens=12)  # fmt: skip
    with load(tiny, threads=1, context=256) as model:
        from pronk.spec import SamplingParams

        pieces = list(model.chat(HELLO, SamplingParams(max_tokens=12)))
        prompt = len(model.render(HELLO))
    assert answer.choices[0].message.content == "".join(piece.text for piece in pieces)
    assert answer.choices[0].finish_reason == pieces[-1].finish_reason
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len(pieces)
    assert answer.usage.total_tokens == prompt + len(pieces)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def texts_of(stream) -> tuple[dict[int, str], list]:
    texts: dict[int, str] = {}
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


@pytest.mark.parametrize("stop", [None, [" the", "a"]])
def test_a_stream_gives_the_same_text(client, stop):
    args = {"model": "tiny", "messages": HELLO, "seed": 7, "n": 3, "max_tokens": 24, "stop": stop,
            "temperature": 1.3, "top_p": 0.95, "presence_penalty": 0.5,
            "frequency_penalty": -0.5, "logit_bias": {"40": 3}}  # fmt: skip
    whole = client.chat.completions.create(**args)
    stream = client.chat.completions.create(
        **args, stream=True, stream_options={"include_usage": True})  # fmt: skip
    texts, chunks = texts_of(stream)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) > 1  # each choice has a seed of its own
    reasons = {c.index: c.finish_reason for k in chunks for c in k.choices if c.finish_reason}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[0].choices[0].delta.role == "assistant"


def test_responses(client):
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "once"}]}]
    args = {"model": "tiny", "instructions": "Be brief.", "temperature": 0,
            "max_output_tokens": 12, "input": asked}  # fmt: skip
    whole = client.responses.create(**args)
    chat = client.chat.completions.create(
        model="tiny", temperature=0, max_tokens=12,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "once"}],
    )  # fmt: skip
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    cut = chat.choices[0].finish_reason == "length"
    assert whole.status == ("incomplete" if cut else "completed")
    events = list(client.responses.create(**args, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == f"response.{whole.status}"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    # What came back may be sent back.
    turns = [*asked, *(item.to_dict() for item in whole.output), *asked]
    again = client.responses.create(model="tiny", input=turns, max_output_tokens=3)
    assert again.usage.input_tokens > whole.usage.input_tokens
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "it", "schema": schema}}
    formed = client.responses.create(model="tiny", input="once", text=form)
    assert json.loads(formed.output_text)["a"] in (1, 2) and formed.status == "completed"
    for wrong in ({"previous_response_id": "x"}, {"store": True}, {"max_output_tokens": 0},
                  {"text": {"format": {"type": "json_schema"}}}):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**{"model": "tiny", "input": "once", **wrong})


def test_the_stream_ends_with_done(http):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_completions(client):
    args = {"model": "tiny", "prompt": ["the quick", "def add", "fox"], "n": 2, "seed": 3,
            "max_tokens": 8, "logprobs": 2, "temperature": 0.8}  # fmt: skip
    whole = client.completions.create(**args)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts: dict[int, str] = {}
    logprobs: dict[int, list[float]] = {}
    for chunk in client.completions.create(**args, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            logprobs.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    for choice in whole.choices:
        assert logprobs[choice.index] == choice.logprobs.token_logprobs
        assert all(1 <= len(top) <= 2 for top in choice.logprobs.top_logprobs)
        assert len(choice.logprobs.text_offset) == len(choice.logprobs.tokens)
    single = client.completions.create(**{**args, "prompt": "def add", "n": 1, "logprobs": None})
    assert single.choices[0].text == texts[2]  # the same in any company


def test_completions_default_to_sixteen_tokens_and_echo(client):
    answer = client.completions.create(model="tiny", prompt="fox", temperature=0, echo=True,
                                       extra_body={"ignore_eos": True})  # fmt: skip
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].text.startswith("fox")


def test_logprobs(client):
    args = {"model": "tiny", "messages": HELLO, "seed": 1, "max_tokens": 6, "logprobs": True,
            "top_logprobs": 3}  # fmt: skip
    content = client.chat.completions.create(**args).choices[0].logprobs.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**args, stream=True)
        for choice in chunk.choices
        for token in (choice.logprobs.content if choice.logprobs else [])
    ]
    assert streamed == content
    for token in content:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True) and best[0] >= token.logprob
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token or not token.bytes


def test_a_bias_decides(client):
    ids = httpx.post(f"{client.base_url.copy_with(path='/tokenize')}",
                     json={"prompt": "q"}).json()["tokens"]  # fmt: skip
    answer = client.completions.create(model="tiny", prompt="the", max_tokens=3,
                                       logit_bias={str(ids[0]): 100})  # fmt: skip
    assert answer.choices[0].text == "qqq"


def test_tokens_and_back(http):
    text = "the quick 🙂 fox"
    tokens = http.post("/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["context_length"] == 256
    back = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": HELLO, "model": "second"}).json()
    assert chat["count"] > tokens["count"] - 1
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_embeddings(client):
    args = {"model": "tiny", "input": ["the quick fox", "once upon", "the quick fox"]}
    plain = client.embeddings.create(**args, encoding_format="float")
    vectors = np.array([item.embedding for item in plain.data])
    assert vectors.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert (vectors[0] == vectors[2]).all() and not np.allclose(vectors[0], vectors[1])
    raw = httpx.post(f"{client.base_url}embeddings", json={**args, "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(raw.json()["data"][1]["embedding"]), "<f4")
    np.testing.assert_array_equal(decoded, vectors[1].astype("<f4"))
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError, match="64 numbers"):
        client.embeddings.create(**args, dimensions=32)


def test_answers_do_not_depend_on_company(client):
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"tell {seed} " * (seed + 1)}],
            seed=seed, max_tokens=20)  # fmt: skip
        return answer.choices[0].message.content

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert together == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server, stream):
    body = {"model": "tiny", "messages": HELLO, "stream": stream, "n": 4, "ignore_eos": True}
    idle(server)
    # It cannot end before the client leaves.
    with halted(server.models[0].engine, after=int(stream)), server.client() as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=0.1))
        idle(server)


def test_long_texts_do_not_hold_up_others(server, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    tokenizer = server.models[0].tokenizer
    encode = tokenizer.encode

    def slow(text, *args, **options):
        if text == "slow":
            begun.set()
            assert go_on.wait(240)
        return encode(text, *args, **options)

    monkeypatch.setattr(tokenizer, "encode", slow)
    with ThreadPoolExecutor(1) as pool, server.client() as http, server.client() as other:
        answer = pool.submit(http.post, "/tokenize", json={"prompt": "slow"})
        assert begun.wait(240)
        assert other.get("/health").status_code == 200
        assert other.post("/tokenize", json={"prompt": "x"}).status_code == 200
        assert not answer.done()
        go_on.set()
        assert answer.result().status_code == 200


@pytest.mark.slow
def test_nothing_is_left_of_a_mixed_load(server):
    rng = random.Random(0)
    plans = [
        {"max_tokens": rng.randint(1, 60), "n": rng.randint(1, 4), "stream": rng.random() < 0.5,
         "prompt": "once upon a time " * rng.randint(1, 30), "ignore_eos": True,
         **rng.choice([{}, {}, {"structured_outputs": {"regex": "[a-z]{5,40}"}},
                       {"temperature": 9}, {"stop": ["a"]}])}
        for _ in range(300)
    ]  # fmt: skip
    leave = [rng.choice([None, None, 0, 3]) for _ in plans]  # after so many lines

    def one(plan: dict, lines: int | None) -> int:
        body = {"model": "tiny", **plan}
        with server.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
            for at, _ in enumerate(answer.iter_lines()):
                if lines is not None and at >= lines:
                    break
            return answer.status_code

    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(one, plans, leave))
    assert set(codes) == {200, 400}
    idle(server)
    assert server.served.gauge.running == 0


BAD = [
    ({}, "model is required"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
    ({"n": 0}, "n:"),
    ({"n": 17}, "17 texts, of at most 16"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"seed": 2**70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias names token 99999"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "content is required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x " * 600}]}, "the context holds 256"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
    ({"structured_outputs": {"regex": "\ud800"}}, "lone surrogate"),
    ({"structured_outputs": {"grammar": "\ud800"}}, "lone surrogate"),
    ({"colour": "red"}, "unrecognized request argument: colour"),
    ({"c" * 9999: "red"}, "unrecognized request argument: ccc"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
]


@pytest.mark.parametrize(("fields", "said"), BAD, ids=[str(i) for i in range(len(BAD))])
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields_are_refused_in_one_sentence(server, http, fields, said, stream):
    body = {"model": "tiny", "messages": HELLO, "stream": stream, **fields} if fields else {}
    answer = http.post("/v1/chat/completions", content=json.dumps(body),
                       headers={"content-type": "application/json"})  # fmt: skip
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert said in error["message"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert len(answer.content) < 1000
    idle(server)


def test_other_refusals(http):
    post, headers = http.post, {"content-type": "application/json"}
    assert (
        post("/v1/completions", content=b"{", headers=headers).json()["error"]["code"]
        == "invalid_json"
    )
    nan = b'{"model":"tiny","prompt":"x","temperature":NaN}'
    assert post("/v1/completions", content=nan, headers=headers).status_code == 400
    deep = b'{"model":' + b"[" * 50_000
    assert post("/v1/completions", content=deep, headers=headers).status_code == 400
    half = b'{"model":"tiny","input":"x","max_output_tokens":1,"metadata":{"a":"\\ud800"}}'
    assert "lone surrogate" in post("/v1/responses", content=half, headers=headers).text
    unknown = post("/v1/completions", json={"model": "nope", "prompt": "x"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert http.get("/nowhere").json()["error"]["message"] == "there is no route /nowhere"
    wrong = http.get("/v1/completions")
    assert wrong.status_code == 405 and "does not take GET" in wrong.json()["error"]["message"]
    for field, value in (
        ("suffix", "x"),
        ("best_of", 3),
        ("prompt", ""),
        ("stream_options", {}),
        ("prompt", []),
    ):
        body = {"model": "tiny", "prompt": "x", field: value}
        assert post("/v1/completions", json=body).status_code == 400


def test_a_request_that_is_too_large_is_refused(server, http):
    large = {"model": "tiny", "prompt": "x" * (65 << 10)}
    answer = http.post("/v1/completions", json=large)
    assert answer.status_code == 413 and "larger than 65536 bytes" in answer.text

    def pieces():
        for _ in range(100):
            yield b"x" * 4096

    headers = {"content-type": "application/json"}
    unsaid = http.post(
        "/v1/completions", content=pieces(), headers=headers
    )  # without a content-length
    assert unsaid.status_code == 413


def test_a_full_queue_refuses_at_once(tiny):
    limits = ServeLimits(queue=2, completions=8)
    config = ServeConfig(port=0, limits=limits)
    with running({"tiny": tiny}, config) as server, server.client() as http:
        body = {"model": "tiny", "prompt": "x", "n": 3}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "server_overloaded"
        assert http.post("/v1/completions", json={**body, "n": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_no_burst_passes_the_queue(tiny, monkeypatch, stream):
    limits = ServeLimits(queue=4)
    with running({"tiny": tiny}, ServeConfig(port=0, limits=limits)) as server:
        model, most, seen = server.models[0], 40, []
        enter = model.line.enter
        model.line.enter = lambda tokens: (enter(tokens), seen.append(model.line.waiting))
        gate = threading.Event()
        model.engine.call(lambda _: gate.wait(240))  # no first token comes meanwhile

        # All of them have been tokenized before any of them is handed over.
        encode, all_there, there = Hosted.encode, asyncio.Event(), []

        async def encoded(*args):
            ids = await encode(*args)
            there.append(ids)
            if len(there) == most:
                all_there.set()
            await all_there.wait()
            return ids

        monkeypatch.setattr(Hosted, "encode", encoded)

        def ask(_: int) -> int:
            body = {"model": "tiny", "prompt": "once", "max_tokens": 2, "stream": stream}
            return http.post("/v1/completions", json=body).status_code

        with ThreadPoolExecutor(most) as pool, server.client() as http:
            answers = [pool.submit(ask, i) for i in range(most)]
            until(lambda: sum(a.done() for a in answers) >= most - 4, "all others are refused")
            gate.set()
            codes = [answer.result() for answer in answers]
        assert sorted(codes) == [200] * 4 + [503] * (most - 4) and max(seen) == 4
        idle(server)


def test_a_wait_beyond_the_target_is_refused_at_once(tiny):
    config = ServeConfig(port=0, grpc_port=0, limits=ServeLimits(target_ttft=0.5))
    with running({"tiny": tiny}, config) as server, server.client() as http:
        body = {"model": "tiny", "prompt": "once upon", "max_tokens": 2, "ignore_eos": True}
        for _ in range(20):
            assert http.post("/v1/completions", json=body).status_code == 200
        # Somebody waits, and has for long: nothing is served.
        line = server.models[0].line
        line.enter(10)
        line._seconds *= 1e6
        said = "the first token would come in"
        for path, more in (
            ("/v1/completions", {}),
            ("/v1/chat/completions", {"messages": HELLO}),
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/responses", {"input": "x"}),
        ):
            answer = http.post(path, json={"model": "tiny", **(more or body)})
            assert answer.status_code == 503 and said in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
        # Where nobody waits, none is refused, however slow the server was.
        line.leave(10, served=False)
        assert http.post("/v1/completions", json=body).status_code == 200


def test_health_and_metrics(server, http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 4,
                                       "ignore_eos": True})  # fmt: skip
    http.post("/v1/completions", json={"model": "tiny", "max_tokens": 0})
    idle(server)
    text = http.get("/metrics").text
    for line in (
        'pronk:num_requests_running{model_name="tiny"} 0.0',
        'pronk:num_requests_waiting{model_name="tiny"} 0.0',
        'pronk:kv_cache_usage_perc{model_name="tiny"} 0.0',
        'pronk:kv_cache_blocks{model_name="tiny",state="held"} 0.0',
    ):
        assert line in text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['pronk:generation_tokens_total{model_name="tiny"}']) >= 4
    assert float(values['pronk:request_errors_total{reason="missing_required_parameter"}']) >= 1
    queued = float(values['pronk:request_queue_time_seconds_count{model_name="tiny"}'])
    assert queued == float(values['pronk:time_to_first_token_seconds_count{model_name="tiny"}'])
    ttft = float(values['pronk:time_to_first_token_seconds_count{model_name="tiny"}'])
    step = float(values['pronk:inter_token_latency_seconds_count{model_name="tiny"}'])
    assert ttft + step == float(values['pronk:generation_tokens_total{model_name="tiny"}'])
    planned = float(values['pronk:memory_planned_bytes{model_name="tiny",part="total"}'])
    assert planned == server.models[0].memory.total
    assert float(values["pronk:memory_resident_bytes"]) > 0
    stats = http.get("/stats").json()
    assert stats["models"]["tiny"]["generated_tokens"] >= 4
    assert set(stats["models"]["tiny"]["latency"]["ttft"]) == {"p50", "p90", "p99"}
