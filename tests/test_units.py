"""Byte counts as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronk.errors import RequestError
from pronk.units import format_bytes, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200MB", 200_000_000),
        ("300M", 300_000_000),
        ("0.5GiB", 2**29),
        ("0.1GB", 100_000_000),
        (" 1 kib ", 1024),
        ("1k", 1000),
        ("7", 7),
        ("7B", 7),
        ("1.999kB", 1999),
        ("2TiB", 2**41),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MB",
        "-1MB",
        "0",
        "0.0001kB",
        "1e3",
        "1 PB",
        "nan",
        "inf",
        "1,5MB",
        "٣MB",
        "8" * 18 + "T",
    ],
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (134_480_000, "134.5 MB")],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("0.5s", 0.5), ("2 m", 120), ("3", 3), ("10us", 1e-5)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "0", "0ms", "-1s", "1h", "1e3", "nan"])
def test_parse_seconds_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="time above zero"):
        parse_seconds(text)


@given(st.integers(1, 10**15))
def test_round_trip(size: int) -> None:
    assert abs(parse_size(format_bytes(size)) - size) <= 0.05 * size
    assert parse_size(str(size)) == size
