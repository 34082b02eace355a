"""A classifier of the server's own environment, as a filter's judge."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable

from pronk.errors import PronkError, RequestError

__all__ = ["load_classifier"]

_log = logging.getLogger("pronk.serve")


def load_classifier(call: str) -> Callable[[str], float]:
    """Import ``package.module:function``, which takes a text and gives a score of 0 to 1.

    Who writes the configuration runs the server: what it names is trusted as the server's own code.
    A classifier that fails counts as 1: what could not be judged is not let through.

    Raises
    ------
    RequestError
        If there is no such function.
    """
    module, _, name = call.partition(":")
    try:
        found = importlib.import_module(module) if module else None
    except Exception as error:  # importing runs code, which may raise anything
        raise RequestError(f"the classifier {call!r} cannot be imported: {error}") from None
    function = getattr(found, name, None) if name else None
    if not callable(function):
        raise RequestError(f"the classifier {call!r} is no function: give package.module:function")

    def judge(text: str) -> float:
        try:
            value = float(function(text))
            if not 0 <= value <= 1:  # false of NaN too
                raise PronkError(f"it gave {value}, which is not in [0, 1]")
        except Exception:
            _log.exception("the classifier %s failed: the text counts as found", call)
            return math.inf
        return value

    return judge
