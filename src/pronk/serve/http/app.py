"""The application: routes, errors in OpenAI's shape, pages, warm-up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from pronk.errors import PronkError
from pronk.serve.audit import AuditLog
from pronk.serve.auth import Keys, Quotas, read_keys
from pronk.serve.config import ServeConfig
from pronk.serve.ended import Ended, Tell
from pronk.serve.errors import ApiError, error_body, from_pronk, from_validation
from pronk.serve.generate import Tally
from pronk.serve.guard.filters import Guard
from pronk.serve.guard.watch import Watch
from pronk.serve.hosted import Hosted
from pronk.serve.http import chat, completions, more, responses
from pronk.serve.http.context import Context, context_of
from pronk.serve.http.gateway import Gateway, Gauge, Sink
from pronk.serve.http.rehearsal import rehearse
from pronk.serve.http.replies import ErrorReply
from pronk.serve.http.sse import ClientGoneError
from pronk.serve.log import log_ended
from pronk.serve.metrics import Metrics

if TYPE_CHECKING:
    from pronk.serve.grpc.server import GrpcServer
    from pronk.serve.trace import Tracer

__all__ = ["Served", "make_app"]

PAGES = Path(__file__).with_name("pages")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cache-control": "no-cache",
}
_FILES = {
    "/": "chat.html",
    "/dashboard": "dashboard.html",
    "/pages/chat.js": "chat.js",
    "/pages/dashboard.js": "dashboard.js",
    "/pages/style.css": "style.css",
}
_GRPC_GRACE = 1.0  # seconds to calls that a drain has not waited for
_ERRORS = (400, 401, 403, 404, 405, 413, 429, 500, 503)
_log = logging.getLogger("pronk.serve")


class Served:
    """A server's parts.

    Attributes
    ----------
    app : ASGI application
    api : FastAPI
        Behind the gateway.
    gauge : Gauge
    grpc : GrpcServer or None
    failure : PronkError or None
        Why it cannot go on.
    """

    def __init__(
        self,
        app: ASGIApp,
        api: FastAPI,
        context: Context,
        audit: AuditLog | None,
        grpc: GrpcServer | None,
        tracer: Tracer | None,
    ) -> None:
        self.app, self.api, self.context, self.grpc = app, api, context, grpc
        self.failure: PronkError | None = None
        self.gauge, self._audit, self._tracer = context.gauge, audit, tracer

    def close(self) -> None:
        """After the last request: write what is left of the audit log, send what is of traces."""
        if self._audit is not None:
            self._audit.close()
        if self._tracer is not None:
            self._tracer.close()


def make_app(
    models: Sequence[Hosted],
    config: ServeConfig,
    resident: Callable[[], int],
    version: str,
    *,
    guard: Guard | None = None,
    tracer: Tracer | None = None,
    settled: Callable[[], None] = lambda: None,
) -> Served:
    """Everything behind the socket.

    Parameters
    ----------
    models : sequence of Hosted
    config : ServeConfig
    resident : callable
        Bytes of memory that the process takes now.
    version : str
    guard : Guard, optional
        What texts pass.
    tracer : Tracer, optional
        Makes spans of requests.
    settled : callable, optional
        Called once the models have answered and before they are ready; a `PronkError` that it
        raises ends the server.

    Raises
    ------
    RequestError
        If the file of keys cannot be used.
    """
    keys = read_keys(config.key_file) if config.key_file else None
    metrics = Metrics(models, resident)
    audit = AuditLog(config.audit, config.audit_bytes, _written) if config.audit else None
    gauge, quotas = Gauge(), Quotas(config.limits)
    context = Context(
        {model.name: model for model in models}, config, metrics, gauge, f"pronk-{version}", audit,
        guard,
    )  # fmt: skip
    sink: Sink | None = None if audit is None else audit.write

    def tell(ended: Ended) -> None:
        log_ended(ended, None if tracer is None else tracer.tell(ended))

    grpc = _grpc(context, keys, quotas, sink, tell)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in models:
            model.attach(config.limits)
        if grpc is not None:
            await grpc.start()
        task = asyncio.create_task(_warm_up(served, resident, settled))
        yield
        task.cancel()
        if grpc is not None:
            await grpc.stop(_GRPC_GRACE)

    api = FastAPI(
        title="Pronk", version=version, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={code: {"model": ErrorReply} for code in _ERRORS},
    )  # fmt: skip
    api.state.context = context
    for router in (chat.router, completions.router, responses.router, more.router, _pages()):
        api.include_router(router)
    _handle_errors(api)
    api.openapi = lambda: _openapi(api)  # type: ignore[method-assign]  # FastAPI's way
    served = Served(
        Gateway(api, config, keys, metrics, gauge, quotas, sink, tell),
        api, context, audit, grpc, tracer,
    )  # fmt: skip
    return served


def _written(entry: dict[str, object]) -> dict[str, object]:
    """An entry as the log has it, made on its thread: numbers and names; text, if any, redacted."""
    tokens, watch = entry.pop("tokens", None), entry.pop("watch", None)
    if isinstance(watch, Watch):
        entry.update(watch.entry())
    if isinstance(tokens, Tally):
        entry.update(prompt_tokens=tokens.prompt, completion_tokens=tokens.completion)
    return entry


def _grpc(
    context: Context, keys: Keys | None, quotas: Quotas, audit: Sink | None, tell: Tell
) -> GrpcServer | None:
    if context.config.grpc_port is None:
        return None
    from pronk.serve.grpc.calls import Calls
    from pronk.serve.grpc.server import GrpcServer

    return GrpcServer(Calls(context, keys, quotas, audit, tell), context.config)


async def _warm_up(
    served: Served, resident: Callable[[], int], settled: Callable[[], None]
) -> None:
    """Have every model answer, and what that took be known, before they take work."""
    models = served.context.models
    failed = await rehearse(served.api, served.context, resident)
    for name, error in failed.items():
        _log.error("the model %s fails on its first tokens: %s", name, error)
    try:
        settled()
    except PronkError as error:
        served.failure = error
        return
    for name, model in models.items():
        model.warm = name not in failed
    if served.grpc is not None:
        await served.grpc.set_ready(not failed)


def _pages() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def page(file: str) -> Callable[[], Any]:
        async def send() -> Response:
            return FileResponse(PAGES / file, headers=_PAGE_HEADERS)

        return send

    for path, file in _FILES.items():
        router.add_api_route(path, page(file), methods=["GET"], response_model=None)
    return router


def _handle_errors(api: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        context_of(request).metrics.failed(error, request.state.record)
        return JSONResponse(error_body(error), error.status, error.headers)

    @api.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @api.exception_handler(PronkError)
    async def pronk_error(request: Request, error: PronkError) -> Response:
        return answer(request, from_pronk(error))

    @api.exception_handler(UnicodeEncodeError)
    async def no_unicode(request: Request, error: UnicodeEncodeError) -> Response:
        # JSON can escape half of a character, and no text can be written that holds one.
        said = "the request holds a lone surrogate, which is no character"
        return answer(request, ApiError(400, said, "invalid_value"))

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return answer(request, from_validation(error.errors()))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            known = ApiError(404, f"there is no route {request.url.path[:200]}", "not_found")
        elif error.status_code == 405:
            known = ApiError(405, f"this route does not take {request.method}", "wrong_method")
        elif error.status_code == 413:
            known = ApiError(413, str(error.detail), "request_too_large")
        else:
            known = ApiError(error.status_code, str(error.detail), "invalid_request")
        return answer(request, known)

    @api.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(request, ApiError(500, "the server failed on this request", "internal_error"))


def _openapi(api: FastAPI) -> dict[str, Any]:
    """FastAPI's description, without the 422 that never comes."""
    from fastapi.openapi.utils import get_openapi

    if api.openapi_schema is None:
        schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        api.openapi_schema = schema
    return api.openapi_schema
