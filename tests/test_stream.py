"""Streaming text: whole characters, and nothing that belongs to a stop string."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pronk.serve.stream import TextStream


def pieces_of(chunks: Iterable[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    chunks = list(chunks)
    stream = TextStream(lambda token: chunks[token], stop)
    pieces = []
    for token in range(len(chunks)):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()], stream.stopped


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Reading character by character, cut at the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def split(data: bytes, sizes: list[int]) -> list[bytes]:
    chunks, at = [], 0
    for size in sizes:
        chunks.append(data[at : at + size])
        at += size
    return [*chunks, data[at:]]


few = st.text(alphabet="abé中🙂", max_size=30)
stops = st.lists(st.text(alphabet="abé中🙂", min_size=1, max_size=4), max_size=3).map(tuple)
sizes = st.lists(st.integers(0, 5), max_size=40)


@given(few, sizes, stops)
@example("aab", [1, 1, 1], ("ab",))
@example("abcd", [4], ("abcd", "bc"))
@example("xabab", [1] * 5, ("ababc", "bab"))
def test_pieces_make_the_text_up_to_the_first_stop_string(
    text: str, sizes: list[int], stop: tuple[str, ...]
):
    pieces, stopped = pieces_of(split(text.encode(), sizes), stop)
    assert ("".join(pieces), stopped) == cut(text, stop)
    assert "\ufffd" not in "".join(pieces)


@given(few, sizes, stops)
def test_every_piece_is_safe_at_the_moment_it_is_emitted(
    text: str, sizes: list[int], stop: tuple[str, ...]
):
    """Whatever follows, what has been emitted never holds a part of a stop string."""
    chunks = split(text.encode(), sizes)
    stream = TextStream(lambda token: chunks[token], stop)
    shown = seen = ""
    received = b""
    for token, chunk in enumerate(chunks):
        received += chunk
        shown += stream.push(token)
        if stream.stopped:
            break
        seen = received.decode(errors="ignore")
        assert seen.startswith(shown)
        held = seen[len(shown) :]
        # Nothing more is held than one stop string could need, and all that one could need.
        assert held == "" or any(s.startswith(held) for s in stop)
        for s in stop:
            for size in range(1, len(s)):
                assert not shown.endswith(s[:size]) or not (held == "" and seen == shown)


@given(st.binary(max_size=30), sizes)
def test_any_bytes_decode_as_a_whole_would(data: bytes, sizes: list[int]):
    pieces, _ = pieces_of(split(data, sizes))
    assert "".join(pieces) == data.decode(errors="replace")


def test_characters_are_never_split():
    text = "日本語🙂é"
    pieces, _ = pieces_of([bytes([b]) for b in text.encode()])
    assert [p for p in pieces if p] == list(text)


def test_flush_replaces_what_is_incomplete():
    stream = TextStream(lambda token: "🙂".encode()[:3])
    assert stream.push(0) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_flush_gives_back_half_a_stop_string():
    stream = TextStream(lambda token: [b"hello <", b"|e"][token], ("<|end|>",))
    assert stream.push(0) == "hello "
    assert stream.push(1) == ""
    assert stream.flush() == "<|e"
    assert not stream.stopped


def test_a_stop_string_completed_by_flush_is_found():
    stream = TextStream(lambda token: b"a\xf0\x9f", ("a\ufffd",))
    assert stream.push(0) == ""
    assert stream.flush() == ""
    assert stream.stopped


def test_nothing_follows_a_stop_string():
    stream = TextStream(lambda token: [b"one\n", b"\ntwo", b"three"][token], ("\n\n",))
    assert [stream.push(0), stream.push(1)] == ["one", ""]
    assert stream.stopped
    assert stream.push(2) == "" == stream.flush()


@pytest.mark.parametrize("chunks", [[b"abcd"], [b"a", b"b", b"c", b"d"], [b"ab", b"cd"]])
def test_how_tokens_fall_does_not_change_where_it_stops(chunks: list[bytes]):
    pieces, stopped = pieces_of(chunks, ("abcd", "bc"))
    assert ("".join(pieces), stopped) == ("a", True)
