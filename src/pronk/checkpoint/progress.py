"""How far a download is: a bar on a terminal, two plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pronk.checkpoint.cache import size_of

__all__ = ["Progress"]


class Progress:
    """Reports one fetch on standard error.

    Parameters
    ----------
    name : str
        What is being fetched.
    show : bool
        False reports nothing.
    """

    def __init__(self, name: str, show: bool = True) -> None:
        self._name = name
        self._show = show
        self._bars: Any = None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if self._show and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bars.start()
        elif self._show:
            print(f"pulling {self._name}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def done(self, size: int) -> None:
        """Say that `size` bytes are there."""
        if self._show and self._bars is None:
            seconds = time.monotonic() - self._start
            print(
                f"pulled {self._name}: {size / 1e6:.1f} MB in {seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    def task(self, label: str, total: int | None = None) -> Callable[[int], None]:
        """Begin a step; the function given back takes the bytes done so far."""
        if self._bars is None:
            return lambda done: None
        task = self._bars.add_task(f"{label} {self._name}", total=total)
        return lambda done: self._bars.update(task, completed=done)

    @contextlib.contextmanager
    def watch(self, folder: Path, update: Callable[[int], None]) -> Iterator[None]:
        """Give `update` the size of `folder` while something else writes to it."""
        if self._bars is None:
            yield
            return
        ended = threading.Event()

        def poll() -> None:
            while not ended.wait(0.2):
                update(size_of(folder))

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            update(size_of(folder))
