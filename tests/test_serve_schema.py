"""The served OpenAPI: what fits it, and what does not, is never answered with a failure."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

from checkpoints import tiny_llama_dir  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis import checks  # noqa: E402
from servers import running  # noqa: E402

from pronk.serve.config import ServeConfig  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tiny_llama_dir(tmp_path_factory.mktemp("schema") / "tiny")
    with running({"tiny": path}, ServeConfig(port=0)) as server:
        found = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        names = {"model": "tiny"}

        @found.hook
        def map_body(context, body):
            # A name that is served, so that more than the look-up is reached.
            return {**body, **names} if isinstance(body, dict) and "model" in body else body

        yield found


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(case):
    # A finite answer, whatever it asks for.
    if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
        case.body["max_tokens"] = min(case.body["max_tokens"], 8)
    case.call_and_validate(
        checks=[
            checks.not_a_server_error,
            checks.CHECKS.get_one("status_code_conformance"),
            checks.CHECKS.get_one("content_type_conformance"),
            checks.CHECKS.get_one("response_schema_conformance"),
        ],
        timeout=60,
    )
