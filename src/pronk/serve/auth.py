"""Who may use the server, and how much: keys, rates, numbers at once."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pronk.errors import RequestError
from pronk.serve.config import ServeLimits
from pronk.serve.errors import ApiError

__all__ = ["ANYONE", "Keys", "Quotas", "read_keys"]

ANYONE = "anyone"  # who asks where no keys are needed
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHORTEST = 16


class Keys:
    """The keys of a server, as digests: comparing them takes the same time whatever is given."""

    def __init__(self, keys: dict[str, str]) -> None:
        self._digests = {name: _digest(key) for name, key in keys.items()}

    def name(self, authorization: str | None) -> str | None:
        """The name of the key in an Authorization header (Bearer, or the password of Basic)."""
        key = _presented(authorization)
        if key is None:
            return None
        digest, found = _digest(key), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _presented(authorization: str | None) -> str | None:
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def read_keys(path: Path) -> Keys:
    """Read a file of keys: a name and a key a line, ``#`` before a comment.

    Raises
    ------
    RequestError
        If it cannot be read, others may read it, or a line is not a name and a key of at least
        16 characters.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the key file {path} cannot be read: {error}") from None
    if mode & 0o077:
        raise RequestError(f"others may read the key file {path}: run chmod 600 {path}")
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or len(words[1]) < _SHORTEST:
            raise RequestError(
                f"line {number} of {path} is not a name and a key of at least {_SHORTEST} "
                "characters"
            )
        if words[0] in keys or words[1] in keys.values():
            raise RequestError(f"line {number} of {path} repeats a name or a key")
        keys[words[0]] = words[1]
    if not keys:
        raise RequestError(f"the key file {path} holds no key")
    return Keys(keys)


class Quotas:
    """Rates and numbers at once, by key. Used on one thread.

    A key has a bucket of ``per_minute`` requests that fills evenly (a token bucket).
    """

    def __init__(self, limits: ServeLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, when that was
        self.running: dict[str, int] = {}

    @contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Count a request of a key while it is under way.

        Raises
        ------
        ApiError
            429, with the time to wait, if the key has none left.
        """
        most = self._limits.concurrent
        running = self.running.get(name, 0)
        if most is not None and running >= most:
            raise ApiError(
                429, f"this key has {running} requests under way, of at most {most}: wait for one",
                "concurrency_limit_exceeded", retry_after=1,
            )  # fmt: skip
        self._spend(name)
        self.running[name] = running + 1
        try:
            yield
        finally:
            left = self.running[name] - 1
            if left:
                self.running[name] = left
            else:
                del self.running[name]

    def _spend(self, name: str) -> None:
        rate = self._limits.per_minute
        if rate is None:
            return
        size, now = max(rate, 1.0), self._clock()
        left, then = self._buckets.get(name, (size, now))
        left = min(size, left + (now - then) * rate / 60)
        if left < 1:
            wait = (1 - left) * 60 / rate
            self._buckets[name] = (left, now)
            raise ApiError(
                429, f"this key may start {rate:g} requests a minute: try again in {wait:.1f} s",
                "rate_limit_exceeded", retry_after=wait,
            )  # fmt: skip
        self._buckets[name] = (left - 1, now)
