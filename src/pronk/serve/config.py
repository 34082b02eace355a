"""What a server allows and how it is reached: frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from pronk.errors import RequestError

__all__ = ["ServeConfig", "ServeLimits"]


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """What one request, one key and all of them may take.

    Parameters
    ----------
    body : int
        Most bytes of a request.
    queue : int
        Most generations that wait for the engine; what comes beyond is refused at once (503).
    target_ttft : float or None
        Seconds within which a first token must be expected; what would wait longer is refused at
        once (503). None: any wait.
    per_minute : float or None
        Requests a key may start in a minute, with bursts of as many; None: any number.
    concurrent : int or None
        Requests of a key under way at once; None: any number.
    completions : int
        Most texts of one request: prompts times ``n``.
    grammar : int
        Most bytes of a schema, a regular expression or a grammar.
    drain : float
        Seconds that running requests get to finish after SIGTERM.
    """

    body: int = 2 << 20
    queue: int = 256
    target_ttft: float | None = None
    per_minute: float | None = None
    concurrent: int | None = None
    completions: int = 16
    grammar: int = 64 << 10
    drain: float = 30.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("body", 1024, 1 << 30),
            ("queue", 1, 1 << 20),
            ("target_ttft", 1e-3, 86400),
            ("per_minute", 1e-3, 1e9),
            ("concurrent", 1, 1 << 20),
            ("completions", 1, 1024),
            ("grammar", 64, 1 << 24),
            ("drain", 0, 3600),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"the limit {name} must be in [{low:g}, {high:g}], not {value}")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How a server is reached.

    Parameters
    ----------
    host, port : str, int
        Where it listens; port 0 takes a free one.
    grpc_port : int or None
        Where it listens for gRPC, on the same address; None: nowhere.
    key_file : Path or None
        Who may use it: see `pronk.serve.auth.read_keys`.
    origins : tuple of str
        Web origins whose pages may call it (CORS); none unless given.
    hosts : tuple of str
        Further names that clients may know a server on the loopback by.
    tls_cert, tls_key : Path or None
        PEM files; both or none.
    audit : Path or None
        Where the log of requests goes: see `pronk.serve.audit`.
    audit_bytes : int
        Size after which that log goes on in a new file.
    audit_text : bool
        Whether it holds what was asked and answered, personal data redacted.
    guard : Path or None
        The configuration of filters over texts: see `pronk.serve.guard.config`.
    limits : ServeLimits

    Raises
    ------
    RequestError
        If it would be open to others without keys, or half of a TLS pair is missing.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    key_file: Path | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    audit: Path | None = None
    audit_bytes: int = 64 << 20
    audit_text: bool = False
    guard: Path | None = None
    limits: ServeLimits = field(default_factory=ServeLimits)

    def __post_init__(self) -> None:
        for port in (self.port, self.grpc_port):
            if port is not None and not 0 <= port <= 65535:
                raise RequestError(f"a port must be in [0, 65535], not {port}")
        if not self.local and self.key_file is None:
            raise RequestError(
                f"binding {self.host} opens the server to others: give --api-key-file FILE"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise RequestError("TLS needs both --tls-cert and --tls-key")
        if not 4096 <= self.audit_bytes <= 1 << 40:
            raise RequestError(
                f"an audit log's file may have 4096 bytes to 1 TiB, not {self.audit_bytes}"
            )
        if self.audit_text and self.audit is None:
            raise RequestError("--audit-text needs --audit FILE")
        if any(origin == "*" for origin in self.origins):
            raise RequestError("--cors-origin takes origins such as https://example.org, not *")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False
