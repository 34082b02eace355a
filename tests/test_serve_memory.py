"""A server takes the memory that it has planned, whatever it is asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from checkpoints import tiny_llama_dir
from servers import hosted, process

from pronk.device.footprint import ALLOWANCE
from pronk.device.memory import resident_memory
from pronk.errors import BudgetError
from pronk.serve.config import ServeConfig
from pronk.serve.http.app import make_app
from pronk.serve.http.run import bind, serve

GUARD = """
[[filter]]
name = "private"
kind = "pii"
action = "flag"

[[filter]]
name = "attack"
kind = "injection"
on = "input"
action = "flag"
"""
WORDS = "call me at 212 555 0123 or write to a.b@example.org, once upon a time "


def asked(at):
    """A request of one kind or another."""
    text = WORDS * (1 + at % 5)
    plain = {"model": "tiny", "max_tokens": 16}
    chat = {**plain, "messages": [{"role": "user", "content": text}]}
    schema = {"type": "object", "properties": {f"key{at}": {"type": "integer"}}}
    return (
        ("/v1/completions", {**plain, "prompt": text, "logprobs": 0}),
        ("/v1/completions", {**plain, "prompt": text, "temperature": 2.0, "top_p": 0.9, "n": 2}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/completions", {**plain, "prompt": text, "structured_outputs": {"json": schema}}),
        ("/v1/embeddings", {"model": "tiny", "input": [text] * 4}),
        ("/v1/responses", {"model": "tiny", "input": text, "max_output_tokens": 16}),
    )[at % 7]


@pytest.mark.parametrize("how", ["plain", "guarded"])
def test_resident_memory_stays_within_the_plan(how, tmp_path):
    tiny = tiny_llama_dir(tmp_path / "tiny", max_position_embeddings=1024)
    args = [f"tiny={tiny}", "--context", "1024", "--threads", "2", "--no-packed-cache"]
    if how == "guarded":
        (tmp_path / "guard.toml").write_text(GUARD)
        args += ["--guard", f"{tmp_path}/guard.toml", "--audit", f"{tmp_path}/audit",
                 "--audit-text", "--grpc-port", "0"]  # fmt: skip
    with process(*args) as (url, _), httpx.Client(base_url=url, timeout=None) as http:

        def memory():
            stats = http.get("/stats").json()
            return stats["models"]["tiny"]["planned_bytes"], stats["resident_bytes"]

        planned, resident = memory()
        assert planned - resident <= 2 * ALLOWANCE  # what is there, and no large guess on top

        def ask(at):
            path, body = asked(at)
            return http.post(path, json=body)

        with ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(ask, range(112)))
        assert {answer.status_code for answer in answers} == {200}
        for path in ("/metrics", "/openapi.json", "/", "/dashboard"):
            http.get(path)
        assert memory()[1] <= planned == memory()[0]


def test_a_plan_that_breaks_a_budget_ends_the_server(tmp_path):
    def settled():
        raise BudgetError("it takes too much")

    config = ServeConfig(port=0)
    with ExitStack() as stack:
        sock = stack.enter_context(bind(config.host, config.port))
        model = hosted("tiny", tiny_llama_dir(tmp_path / "tiny"), stack)
        served = make_app([model], config, resident_memory, "test", settled=settled)
        with pytest.raises(BudgetError, match="it takes too much"):
            serve(served, config, sock)
        assert not model.warm
