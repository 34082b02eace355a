"""The gRPC server: both services, health and reflection, on the HTTP server's event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pronk.errors import RequestError
from pronk.serve.config import ServeConfig
from pronk.serve.grpc import generation_pb2, open_inference_pb2
from pronk.serve.grpc.calls import Calls, Record
from pronk.serve.grpc.generation import Generation
from pronk.serve.grpc.inference import Inference

__all__ = ["GrpcServer"]

_OPEN = frozenset({"ServerLive", "ServerReady"})  # like /health and /ready: without a key
_SERVICES: Sequence[tuple[Any, Callable[[Any], object]]] = (
    (generation_pb2.DESCRIPTOR.services_by_name["Generation"], Generation),
    (open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"], Inference),
)


class GrpcServer:
    """Serves from `start` to `stop`.

    Parameters
    ----------
    calls : Calls
    config : ServeConfig
        Address, TLS files and the largest request are those of HTTP; the port is its own.
    """

    def __init__(self, calls: Calls, config: ServeConfig) -> None:
        self._calls, self._config = calls, config
        self._health = health.aio.HealthServicer()
        self.port = 0

    async def start(self) -> None:
        """Listen.

        Raises
        ------
        RequestError
            If the port cannot be bound or the TLS files cannot be read.
        """
        config = self._config
        self._server = server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", config.limits.body),
                     ("grpc.so_reuseport", 0)],
        )  # fmt: skip
        names = [reflection.SERVICE_NAME, health.SERVICE_NAME]
        for service, kind in _SERVICES:
            server.add_generic_rpc_handlers((self._handlers(service, kind(self._calls.context)),))
            names.append(service.full_name)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(names, server)
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.grpc_port}"
        try:
            if config.tls_cert is not None and config.tls_key is not None:
                pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
                self.port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                self.port = server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise RequestError(f"gRPC cannot listen at {address}: {error}") from None
        await server.start()

    def _handlers(self, service: Any, servicer: object) -> Any:
        """The service's methods by their names; its descriptor says which of them stream."""
        methods = {}
        for method in service.methods:
            function = getattr(servicer, _snake(method.name))
            kind = grpc.unary_unary_rpc_method_handler
            wrap: Callable[[str, Any], Any] = self._calls.unary
            if method.server_streaming:
                kind, wrap = grpc.unary_stream_rpc_method_handler, self._calls.stream
            methods[method.name] = kind(
                _bare(function)
                if method.name in _OPEN
                else wrap(f"/{service.full_name}/{method.name}", function),
                request_deserializer=method.input_type._concrete_class.FromString,
                response_serializer=method.output_type._concrete_class.SerializeToString,
            )
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    async def set_ready(self, ready: bool) -> None:
        """What the health service says of every service."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *(service.full_name for service, _ in _SERVICES)):
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """End; calls under way have so many seconds."""
        await self._server.stop(grace)


def _bare(method: Callable[[Any, Record], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, call: Any) -> Any:
        return await method(request, {})

    return answer


def _snake(name: str) -> str:
    """``ModelInfer`` as ``model_infer``."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
