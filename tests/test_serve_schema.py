"""The served OpenAPI: what fits it, and what does not, is never answered with a failure."""

from __future__ import annotations

import pytest
import schemathesis
from checkpoints import tiny_llama_dir
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from servers import running

from pronk.serve.config import ServeConfig

pytestmark = pytest.mark.slow

checks.load_all_checks()
CHECKS = [
    checks.CHECKS.get_one(name)
    for name in ("not_a_server_error", "status_code_conformance", "content_type_conformance",
                 "response_schema_conformance")
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tiny_llama_dir(tmp_path_factory.mktemp("schema") / "tiny")
    with running({"tiny": path}, ServeConfig(port=0)) as server:
        yield server


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_as_described(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        try:
            cases = operation.as_strategy(generation_mode=mode)
            check(cases, seen)
        except Exception as error:
            # A route without parameters cannot be asked wrongly.
            if mode is GenerationMode.NEGATIVE and "Unsatisfiable" in type(error).__name__:
                continue
            raise
    assert ("/v1/chat/completions", 400) in seen
    if mode is GenerationMode.POSITIVE:
        assert ("/v1/completions", 200) in seen and ("/tokenize", 200) in seen


def check(cases, seen: set[tuple[str, int]]) -> None:
    """Ask the server what a strategy gives, and hold each answer to the schema."""

    @given(case=cases)
    @settings(max_examples=25, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def ask(case):
        body = case.body
        if isinstance(body, dict):
            if isinstance(body.get("model"), str):  # reach further than the look-up of a name
                body["model"] = "tiny"
            for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(body.get(field), int):
                    body[field] = min(body[field], 8)
            # Streams are events, which OpenAPI does not describe.
            if body.get("stream") is True:
                body["stream"] = False
                body.pop("stream_options", None)
        answer = case.call_and_validate(checks=CHECKS, timeout=240)
        seen.add((case.operation.path, answer.status_code))

    ask()
