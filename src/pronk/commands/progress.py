"""A progress bar on stderr, where someone is there to see it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]


class Progress:
    """Callable with (done, total); shows nothing unless stderr is a terminal."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=None)
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show how far the work is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def stage(self, what: str, done: int, total: int) -> None:
        """Show how far a named stage of the work is."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
