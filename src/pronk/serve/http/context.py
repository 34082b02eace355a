"""What the routes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from pronk.serve.audit import AuditLog
from pronk.serve.config import ServeConfig
from pronk.serve.errors import ApiError
from pronk.serve.guard.filters import Guard
from pronk.serve.guard.watch import Watch
from pronk.serve.hosted import Hosted
from pronk.serve.http.gateway import Gauge
from pronk.serve.metrics import Metrics

__all__ = ["Context", "context_of"]


@dataclass(slots=True)
class Context:
    """The models that are served, and what is counted.

    Parameters
    ----------
    models : mapping of str to Hosted
        By the names that clients ask for.
    fingerprint : str
        What answers name as the system that made them.
    """

    models: Mapping[str, Hosted]
    config: ServeConfig
    metrics: Metrics
    gauge: Gauge
    fingerprint: str
    audit: AuditLog | None = None
    guard: Guard | None = None

    def watch(self, record: dict[str, Any]) -> Watch:
        """The guard of a new request, of which the audit log's entry will tell."""
        keep = self.audit is not None and self.config.audit_text
        watch = record["watch"] = Watch(self.guard, self.metrics.guarded, keep)
        return watch

    def model(self, name: str | None) -> Hosted:
        """The model of a name; the first, where none is given.

        Raises
        ------
        ApiError
            404, if there is none.
        """
        if name is None:
            return next(iter(self.models.values()))
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {name[:80]!r}: choose from {known}", "model_not_found",
                "model",
            )  # fmt: skip
        return found


def context_of(request: Request) -> Context:
    """What the app was made with; or the request, where it is a rehearsal's."""
    context: Context = getattr(request.state, "context", None) or request.app.state.context
    return context
