"""What one rendering of an untrusted template may spend: bytes made, and time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

__all__ = ["MOST_BITS", "LimitError", "Meter", "RefusalError", "weigh"]

MOST_BITS = 4096
_LIST_LIKE: tuple[type[Any], ...] = (
    list,
    tuple,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
)
_DICT_LIKE: tuple[type[Any], ...] = (dict, type({}.items()))


class LimitError(Exception):
    """A template spent more than it may."""


class RefusalError(Exception):
    """A template refused the conversation, by its own ``raise_exception``."""


def weigh(value: Any, limit: int) -> int:
    """Bytes that `value` would take written out in full, shared parts counted each time.

    A list of lists of one list is small in memory, but printing or comparing it is
    exponential; weighing it so bounds every later operation on it. Stops past `limit`.
    """
    total = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            total += 48 + len(item) * (1 if item.isascii() else 4)
        elif isinstance(item, int):
            total += 24 + item.bit_length() // 8
        elif isinstance(item, _LIST_LIKE):
            total += 48 + 8 * len(item)
            if total <= limit:
                stack.extend(item)
        elif isinstance(item, _DICT_LIKE):
            total += 48 + 64 * len(item)
            if total <= limit:
                for pair in item.items() if isinstance(item, dict) else item:
                    stack.extend(pair)
        else:
            total += 48
        if total > limit:
            break
    return total


class Meter:
    """Counts down the bytes a template makes and the time it takes.

    Parameters
    ----------
    budget : int
        Bytes it may make, in all.
    seconds : float
        Processor time it may take: a template does not wait, and a busy machine is not its fault.
    """

    _active: ContextVar[Meter] = ContextVar("pronk_template_meter")

    def __init__(self, budget: int, seconds: float) -> None:
        self._left = budget
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds

    @classmethod
    def active(cls) -> Meter:
        """The meter of the rendering in progress."""
        return cls._active.get()

    def __enter__(self) -> Meter:
        self._token = self._active.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._active.reset(self._token)

    def charge(self, size: int) -> None:
        """Take `size` bytes from the budget, and look at the clock.

        Raises
        ------
        LimitError
            If the budget or the time is spent.
        """
        self._left -= size + 1
        if self._left < 0:
            raise LimitError("it makes too much text or data")
        if time.thread_time() > self._deadline:
            raise LimitError(f"it takes longer than {self._seconds:g} s")

    def weighed(self, value: Any) -> Any:
        """Charge for `value` and give it back; refuse integers too long to reckon with."""
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise LimitError("it makes too large a number")
        self.charge(weigh(value, self._left))
        return value

    def collected(self, values: Iterable[Any]) -> list[Any]:
        """`values` as a list, charged item by item so that an endless one cannot fill memory."""
        items = []
        for item in values:
            self.weighed(item)
            items.append(item)
        return items

    def scan(self, size: int, pattern: int) -> None:
        """Refuse a search whose worst case is the product of two lengths."""
        self.charge(0)
        if size * pattern > 100_000_000:
            raise LimitError("it searches too long a text")
