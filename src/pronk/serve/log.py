"""Lines of a log as JSON, one object each; a request that has ended is one."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from pronk.serve.ended import Ended

__all__ = ["JsonFormatter", "configure_log", "log_ended"]

_log = logging.getLogger("pronk.request")


class JsonFormatter(logging.Formatter):
    """A record as JSON: time (UTC), level, message, and what it was given as ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_log(form: str) -> None:
    """Log to stderr: warnings as text, or as JSON with every request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("pronk: %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if form == "json":
        logging.getLogger("pronk").setLevel(logging.INFO)


def log_ended(ended: Ended, trace: str | None = None) -> None:
    """Log a request that has ended; `trace` is the id of its trace."""
    if not _log.isEnabledFor(logging.INFO):
        return
    tokens = ended.tokens
    fields: dict[str, object] = {
        "request": ended.request, "method": ended.method, "route": ended.route,
        "status": ended.status, "seconds": round(ended.seconds, 6), "key": ended.key,
        "model": ended.model, "error": ended.error, "trace_id": trace,
    }  # fmt: skip
    if tokens is not None:
        fields |= {
            "queue_seconds": _rounded(tokens.queued), "ttft_seconds": _rounded(tokens.ttft),
            "prompt_tokens": tokens.prompt, "cached_tokens": tokens.cached,
            "completion_tokens": tokens.completion,
            "finish_reasons": [tokens.reasons[i] for i in sorted(tokens.reasons)],
        }  # fmt: skip
    given = {name: value for name, value in fields.items() if value is not None}
    message = f"{ended.method} {ended.route} {ended.status}"
    _log.info(message, extra={"fields": given})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
