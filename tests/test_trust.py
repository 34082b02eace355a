"""Who may use the server, and how much: every refusal."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess

import httpx
import pytest
from checkpoints import tiny_llama_dir
from engines import halted
from servers import idle, process, running, until

from pronk.cli import main
from pronk.errors import RequestError
from pronk.serve.auth import Quotas, read_keys
from pronk.serve.config import ServeConfig, ServeLimits
from pronk.serve.errors import ApiError

KEY, OTHER = "k" * 20, "o" * 20
ASK = {"model": "tiny", "prompt": "once upon", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("trust") / "tiny")


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# who and what\nalice {KEY}\nbob {OTHER}  # the other\n")
    file.chmod(0o600)
    return file


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_health_wants_a_key(tiny, key_file):
    config = ServeConfig(port=0, key_file=key_file, limits=ServeLimits(concurrent=1))
    with running({"tiny": tiny}, config) as server, server.client() as http:
        schema = server.served.api.openapi()
        routes = [(method, path) for path, ways in schema["paths"].items() for method in ways]
        pages = [("get", path) for path in ("/", "/dashboard", "/pages/chat.js", "/openapi.json")]
        for method, path in [*routes, *pages, ("get", "/nowhere")]:
            status = http.request(method, path).status_code
            if path in ("/health", "/ready"):
                assert status == 200
            else:
                assert status == 401, path
        for wrong in (bearer(KEY[:-1]), {"authorization": "Basic !!"}, {}):
            refused = http.post("/v1/completions", json=ASK, headers=wrong)
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert "www-authenticate" in refused.headers
        assert http.post("/v1/completions", json=ASK, headers=bearer(KEY)).status_code == 200
        # What a browser sends when its user gave a key as the password.
        assert http.get("/", auth=("anybody", OTHER)).status_code == 200

        # One request of a key at a time; another key has its own.
        long = {**ASK, "max_tokens": 200, "n": 4, "stream": True}
        with (
            halted(server.models[0].engine, after=1),  # it cannot end before the client leaves
            http.stream("POST", "/v1/completions", json=long, headers=bearer(KEY)) as stream,
        ):
            lines = stream.iter_lines()  # without it, the client leaves
            next(lines)
            full = http.post("/v1/completions", json=ASK, headers=bearer(KEY))
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["type"] == "rate_limit_error"
            other = http.post("/tokenize", json={"prompt": "x"}, headers=bearer(OTHER))
            assert other.status_code == 200
        idle(server)  # it left: its place is free again
        assert http.post("/v1/completions", json=ASK, headers=bearer(KEY)).status_code == 200


def test_a_rate(tiny):
    config = ServeConfig(port=0, limits=ServeLimits(per_minute=2))
    with running({"tiny": tiny}, config) as server, server.client() as http:
        codes = [http.post("/v1/completions", json=ASK) for _ in range(3)]
        assert [answer.status_code for answer in codes] == [200, 200, 429]
        assert 1 <= int(codes[2].headers["retry-after"]) <= 31
        assert http.get("/v1/models").status_code == 200  # reading is free


def test_a_bucket_fills_again():
    now = [0.0]
    quotas = Quotas(ServeLimits(per_minute=30), clock=lambda: now[0])
    for _ in range(30):
        with quotas.take("a"):
            pass
    with pytest.raises(ApiError, match=r"again in 2\.0 s"), quotas.take("a"):
        pass
    with quotas.take("b"):
        assert quotas.running == {"b": 1}
    now[0] = 2.0
    with quotas.take("a"):
        pass
    with pytest.raises(ApiError), quotas.take("a"):
        pass
    assert quotas.running == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("alice", "line 1"),
        ("alice short", "line 1"),
        (f"a {KEY}\na {OTHER}", "line 2 of .* repeats"),
        (f"a {KEY}\nb {KEY}", "line 2 of .* repeats"),
        (f"a b {KEY}", "line 1"),
    ],
)
def test_key_files_that_cannot_be_used(tmp_path, text, said):
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(RequestError, match=said):
        read_keys(file)


def test_a_key_file_that_others_can_read(key_file):
    key_file.chmod(0o644)
    with pytest.raises(RequestError, match="chmod 600"):
        read_keys(key_file)
    with pytest.raises(RequestError, match="cannot be read"):
        read_keys(key_file.with_name("none"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_a_public_address_wants_keys(host):
    with pytest.raises(RequestError, match="--api-key-file"):
        ServeConfig(host=host)


@pytest.mark.parametrize(
    "limits",
    [{"body": 1}, {"queue": 0}, {"per_minute": 0}, {"concurrent": 0}, {"completions": 0},
     {"grammar": 1}, {"drain": -1}],
)  # fmt: skip
def test_limits_have_ranges(limits):
    with pytest.raises(RequestError, match=next(iter(limits))):
        ServeLimits(**limits)


def test_origins_and_hosts(tiny):
    config = ServeConfig(port=0, origins=("https://good.example",), hosts=("box.local",))
    with running({"tiny": tiny}, config) as server, server.client() as http:

        def get(**headers: str) -> httpx.Response:
            return http.get("/v1/models", headers=headers)

        assert "access-control-allow-origin" not in get().headers
        good = get(origin="https://good.example")
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        assert good.headers["vary"] == "origin"
        bad = get(origin="https://bad.example")
        assert bad.status_code == 403 and "access-control-allow-origin" not in bad.headers
        assert get(origin="http://[").status_code == 403  # which is none
        assert get(origin=server.url).status_code == 200  # its own pages
        asked = {"origin": "https://good.example", "access-control-request-method": "POST"}
        before = http.options("/v1/completions", headers=asked)
        assert before.status_code == 204
        assert "authorization" in before.headers["access-control-allow-headers"]
        asked["origin"] = "https://bad.example"
        assert http.options("/v1/completions", headers=asked).status_code == 403
        assert get(host="evil.example").status_code == 403
        assert get(host="box.local:80").status_code == 200
        assert get(host="localhost").status_code == 200


def test_request_ids_come_back(tiny):
    with running({"tiny": tiny}, ServeConfig(port=0)) as server, server.client() as http:
        assert http.get("/health", headers={"x-request-id": "abc-1"}).headers[
            "x-request-id"] == "abc-1"  # fmt: skip
        odd = http.get("/health", headers={"x-request-id": "a b\tc"})
        assert odd.headers["x-request-id"].startswith("req-")


def test_tls(tiny, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"], capture_output=True)  # fmt: skip
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    config = ServeConfig(port=0, tls_cert=cert, tls_key=key)
    with running({"tiny": tiny}, config) as server:
        trusting = ssl.create_default_context(cafile=cert)
        answer = httpx.post(f"{server.url}/v1/completions", json=ASK, verify=trusting)
        assert answer.status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    with pytest.raises(RequestError, match="both --tls-cert and --tls-key"):
        ServeConfig(tls_cert=cert)


def run(capsys, *args: str) -> str:
    assert main(["serve", *args]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("pronk: error: ")
    return said[-1]


def test_the_command_refuses_in_one_sentence(tiny, tmp_path, capsys, monkeypatch):
    taken = running({"tiny": tiny}, ServeConfig(port=0))
    with taken as server:
        port = server.url.rpartition(":")[2]
        assert "cannot be bound" in run(capsys, str(tiny), "--port", port)
    assert "--api-key-file" in run(capsys, str(tiny), "--host", "0.0.0.0")
    assert "would be served as tiny" in run(capsys, str(tiny), str(tiny), "--port", "0")
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    tls = ["--tls-cert", str(wrong), "--tls-key", str(wrong)]
    assert "TLS" in run(capsys, str(tiny), "--port", "0", "--threads", "1", *tls)
    monkeypatch.setattr("pronk.commands.serve.find_spec", lambda name: None)
    assert "pip install 'pronk[serve]'" in run(capsys, str(tiny))


def test_sigterm_finishes_what_runs_and_refuses_what_comes(tiny):
    with process(f"tiny={tiny}", "--context", "512", "--threads", "1",
                 "--drain", "600") as (url, child):  # fmt: skip
        # More than the sockets hold: it cannot end before it is read.
        body = {**ASK, "max_tokens": 400, "stream": True, "n": 16, "logprobs": 20}
        with (
            httpx.Client(base_url=url, timeout=240) as http,
            http.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            until(lambda: http.get("/ready").status_code == 503, "it drains")
            late = httpx.post(f"{url}/v1/completions", json=ASK)
            assert late.status_code == 503 and int(late.headers["retry-after"]) >= 1
            assert late.json()["error"]["code"] == "shutting_down"
            seen = [line for line in lines if line]
        assert seen[-1] == "data: [DONE]"
        finished = [json.loads(line[6:]) for line in seen[:-1]]
        reasons = [c["finish_reason"] for f in finished for c in f["choices"] if c["finish_reason"]]
        assert reasons == ["length"] * 16
        assert child.wait(120) == 0
