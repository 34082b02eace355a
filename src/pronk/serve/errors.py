"""Errors in the shape that OpenAI's clients know: one sentence, a type, a code."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pronk.engine.service import UnavailableError
from pronk.errors import PronkError, RequestError

__all__ = ["ApiError", "error_body", "from_pronk", "from_validation"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MOST_MESSAGE, _MOST_PARAM = 500, 200
_ALTERNATIVE = re.compile(r"(str|bool|int|float|literal|constrained-|list\[|[A-Z])").match


class ApiError(Exception):
    """An answer that is an error.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        One sentence: what was wrong, where, what to do.
    code : str or None
        A stable name of the error; also its ``reason`` among the metrics.
    param : str or None
        The field at fault.
    retry_after : float or None
        Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's head says."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = 'Basic realm="pronk: any name, the key as password"'
        return headers


def error_body(error: ApiError) -> dict[str, Any]:
    """The answer's JSON."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message, param = error.message[:_MOST_MESSAGE], error.param and error.param[:_MOST_PARAM]
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def from_pronk(error: PronkError) -> ApiError:
    """A wrong value is the client's error; what else the engine refuses is the server's."""
    if isinstance(error, RequestError):
        return ApiError(400, str(error), "invalid_value")
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), "shutting_down", retry_after=5)
    return ApiError(500, str(error), "engine_error")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, in one sentence."""
    first = errors[0]
    # Alternatives of a union add their names to the place; the user knows fields and numbers.
    where = [str(part) for part in first["loc"] if part != "body" and not _ALTERNATIVE(str(part))]
    place = ".".join(where)
    kind = first["type"]
    if kind == "extra_forbidden":
        return ApiError(400, f"unrecognized request argument: {place}", "unknown_parameter", place)
    if kind == "missing":
        what = f"{place} is required" if place else "a JSON body is required"
        return ApiError(400, what, "missing_required_parameter", place or None)
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON", "invalid_json")
    if any(_ALTERNATIVE(str(part)) for part in first["loc"]) and len(errors) > 1:
        return ApiError(400, f"{place}: this is of no form that it takes", "invalid_value", place)
    said = str(first["msg"]).removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    return ApiError(400, f"{place}: {said}" if place else said, "invalid_value", place or None)
