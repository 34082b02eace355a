"""However a text is cut, a guard gives the same; and what it holds back is bounded."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pronk.errors import RequestError
from pronk.serve.guard.config import read_guard
from pronk.serve.guard.filters import Chain, Filter, Guard
from pronk.serve.guard.patterns import Pattern, words_pattern
from pronk.serve.guard.pii import pii_rules
from pronk.serve.guard.stages import Hit, Matching, Rule

BOTH = frozenset({"input", "output"})


def rule(source: str, mark: str = "[X]") -> Rule:
    return Rule(Pattern(source), lambda text, start, end: [Hit(start, end, mark)])


def chain(filters, told=None) -> Chain:
    tell = (lambda *what: None) if told is None else lambda *what: told.append(what)
    return Guard(filters).chain("output", tell)


def pushed(one: Chain, pieces) -> str:
    out = "".join([one.push(piece) for piece in pieces])
    return out + one.push("", final=True)


def cut(text: str, places: list[int]) -> list[str]:
    """A text in pieces, some of them empty."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


PLACES = st.lists(st.integers(0, 400), max_size=30)
# Few letters, so that patterns match, nearly match and overlap.
TEXTS = st.text(alphabet="ab. é\n", max_size=60)


def patterns():
    """Expressions that Python's parser, RE2 and what begins their matches must agree on."""
    atoms = st.sampled_from(["a", "b", "é", ".", r"\.", r"\w", r"\s", "[ab]", "[^a]", r"[\W]",
                             r"\b", "^", "$", "(?i:A)", "(?m:^)", "(?s:.)"])  # fmt: skip
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=4).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
            st.tuples(inner, st.sampled_from(["?", "{1,3}", "{2}", "{0,2}?", "+", "*?"])).map(
                lambda pair: f"(?:{pair[0]}){pair[1]}"
            ),
        ),
        max_leaves=8,
    )


@settings(max_examples=250, deadline=None)
@given(source=patterns(), text=TEXTS, places=PLACES)
@example(source=r"a|ab", text="ab", places=[1])
@example(source=r"\bab\b", text="ab aba ab", places=[1, 2, 3, 4, 5, 6, 7, 8])
@example(source=r"(?:ab){1,3}?é", text="abababé", places=[1, 3, 5])
def test_any_pattern_in_any_pieces(source, text, places):
    try:
        one = rule(source)
    except RequestError:
        return  # it may match nothing
    whole = Matching(one, "redact", lambda: None).push(text, final=True)
    stage, out, given_ = Matching(one, "redact", lambda: None), "", 0
    for piece in cut(text, places):
        given_ += len(piece)
        before = len(out)
        out += stage.push(piece, final=False)
        assert len(out) >= before
        assert len(stage._held) - stage._start <= one.pattern.width  # what is held back is bounded
    assert out + stage.push("", final=True) == whole


@settings(max_examples=200, deadline=None)
@given(source=patterns(), text=st.text(alphabet="ab. \n", max_size=40))
def test_whole_texts_are_searched_as_python_searches(source, text):
    """On ASCII, where both engines mean the same: RE2's \\b knows no other letters."""
    if "é" in source or "*" in source or "+" in source:
        return  # here repetitions are bounded
    try:
        one = rule(source)
    except RequestError:
        return
    found, at = [], 0
    compiled = re.compile(source)
    while (match := compiled.search(text, at)) and match.end() > match.start():
        if source.endswith("$") and match.end() != len(text):
            return  # Python's $ also stands before a last line break
        found.append(match.span())
        at = match.end()
    if "$" in source:
        return
    ours, at = [], 0
    while span := one.pattern.search(text, at):
        ours.append(span)
        at = span[1]
    assert ours == found


LIKELY = ["a@b.co", "bob.x+y@mail.example.org", "+1 650-253-0000", "(650) 253 0000", "123-45-6789",
          "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "192.168.0.1", "2001:db8::8a2e:1:2",
          "secret", "secret plan", "secretly", "key-0123", "1999", " ", ", ", ". ", "\n", "x", "7",
          "-", "@", "é", "word "]  # fmt: skip


def realistic(action: str) -> list[Filter]:
    def accept(text: str, start: int, end: int):
        return [Hit(start, end, "[WORD]")]

    return [
        Filter("pii", BOTH, "redact", tuple(pii_rules())),
        Filter("words", BOTH, action, (Rule(words_pattern(["secret", "secret plan"]), accept),)),
        Filter("keys", BOTH, "redact", (rule(r"key-\d+|\[EMAIL\] x"),)),
        Filter("years", BOTH, "flag", (rule(r"\b(?:19|20)\d\d\b"),)),
    ]


@pytest.mark.parametrize("action", ["redact", "block", "flag"])
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(LIKELY), max_size=14), places=PLACES)
def test_a_chain_in_any_pieces(action, parts, places):
    text = "".join(parts)
    told: list = []
    filters = realistic(action)
    whole = pushed(chain(filters), [text])
    pieces = chain(filters, told)
    assert pushed(pieces, cut(text, places)) == whole
    assert pushed(chain(filters), text) == whole  # a character at a time
    if action == "block":
        assert pieces.blocked == any(what == ("words", "block", "output") for what in told)
        assert "secret" not in whole


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab .!\n", max_size=900), places=PLACES)
def test_a_judge_in_any_pieces(text, places):
    judge = Filter("j", BOTH, "redact", judge=lambda text: float("aab" in text), mark="[J]")
    whole = pushed(chain([judge]), [text])
    assert pushed(chain([judge]), cut(text, places)) == whole


def held(filters: list[Filter], text: str) -> int:
    """Characters held back after a text."""
    return len(text) - len(chain(filters).push(text))


def test_little_is_held_back(tmp_path):
    """Only what may become a match: nothing of most text, the last word where e-mails count."""
    words = realistic("redact")[1:2]
    assert held(words, "what nobody wanted") == 0
    assert held(words, "what is secre") == 5
    assert held(words, "the secret") == 6
    assert held(words, "the secret pla") == 10
    assert held(words, "the secret part") == 0
    pii = realistic("redact")[:1]
    assert held(pii, "an ordinary sentence ") == 0
    assert held(pii, "an ordinary sentence") == 8
    assert held(pii, "x" * 500) == 64  # what may stand before an @
    assert held(pii, "at 4111 1111") == 9


def test_a_long_text_takes_time_in_proportion():
    """Patterns that make backtracking engines exponential, on text that nearly matches."""
    one = rule(r"(?:a|aa|a?a){1,30}b")
    text = "a" * 20_000
    stage = Matching(one, "redact", lambda: None)
    out = "".join(stage.push(text[at : at + 500], final=False) for at in range(0, len(text), 500))
    assert out + stage.push("", final=True) == text


def test_many_words(tmp_path):
    words = [f"word{number:05d}x" for number in range(3000)]
    (tmp_path / "deny.txt").write_text("\n".join(words))
    file = tmp_path / "guard.toml"
    file.write_text('[[filter]]\nname="n"\nkind="words"\naction="redact"\nfile="deny.txt"\n')
    one = read_guard(file).chain("output", lambda *what: None)
    assert pushed(one, "say word02777x or word02777y") == "say [REDACTED] or word02777y"
