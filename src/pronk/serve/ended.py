"""What logs and traces are told of a request when it has ended: names and numbers, no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pronk.serve.generate import Tally

__all__ = ["TRACE_HEADERS", "Ended", "Tell"]

TRACE_HEADERS = ("traceparent", "tracestate")  # W3C's


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended.

    Parameters
    ----------
    request : str
        Its id.
    method, route : str
        ``POST`` and a path, or ``gRPC`` and the name of a method.
    status : int or str
        HTTP's or gRPC's.
    began : int
        Nanoseconds since 1970.
    seconds : float
    key : str or None
        The name of the key that it came with.
    model, error : str or None
        The model that it asked for, and the code of the error that it ended with.
    tokens : Tally or None
        What was generated.
    parent : mapping of str to str
        Those of `TRACE_HEADERS` that it came with.
    """

    request: str
    method: str
    route: str
    status: int | str
    began: int
    seconds: float
    key: str | None = None
    model: str | None = None
    error: str | None = None
    tokens: Tally | None = None
    parent: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, object], **known: Any) -> Ended:
        """With what a route has recorded."""
        tokens = record.get("tokens")
        return cls(
            model=_text(record.get("model")),
            error=_text(record.get("error")),
            tokens=tokens if isinstance(tokens, Tally) else None,
            **known,
        )

    @property
    def failed(self) -> bool:
        """Whether the server is at fault."""
        if isinstance(self.status, int):
            return self.status >= 500
        return self.status in ("INTERNAL", "UNKNOWN", "UNAVAILABLE")


Tell = Callable[[Ended], object]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
