"""Output that keeps a form: JSON schemas, regular expressions and grammars, by ``llguidance``.

The constraint masks logits before a token is drawn. Drafts of speculation are drawn in order as
well, so one that breaks the form is not taken, and nothing is ever rolled back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronk.checkpoint.tokenizer import Tokenizer
from pronk.errors import RequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["Form", "Grammar", "compile_form", "grammar_tokenizer"]

_DEEPEST = 64
# As Python writes JSON, and models are used to it.
_LAYOUT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True, slots=True)
class Form:
    """What the output must be: a kind and its text.

    ``kind`` is ``"json"``, ``"regex"``, ``"choice"``, ``"grammar"`` (llguidance's Lark), or
    ``"call"``: a schema of arguments that may follow a space.
    """

    kind: str
    source: Any


class _Words:
    """A model's vocabulary as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        known = range(min(vocab_size, tokenizer.vocab_size))
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id) for id in known]
        self.special_token_ids = [id for id in known if not self.tokens[id]]
        for id in self.special_token_ids:
            self.tokens[id] = tokenizer.decode([id], skip_special=False).encode()
        self.tokens += [b""] * (vocab_size - len(self.tokens))
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Any:
    """What `compile_form` needs of a tokenizer; made once for a model.

    Parameters
    ----------
    tokenizer : Tokenizer
    vocab_size : int
        Length of a row of logits.

    Raises
    ------
    RequestError
        If the model has no token that ends a text: a form would never end.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(id for id in tokenizer.eos_ids if id < vocab_size)
    if not ends:
        raise RequestError("this model has no end token: structured outputs need one")
    words = TokenizerWrapper(_Words(tokenizer, vocab_size))
    return LLTokenizer(words, n_vocab=vocab_size, eos_token=ends)


def compile_form(form: Form, words: Any, limit: int) -> Grammar:
    """A constraint that is at its start.

    Parameters
    ----------
    form : Form
    words : LLTokenizer
        What `grammar_tokenizer` gave.
    limit : int
        Most bytes of the form.

    Raises
    ------
    RequestError
        If it is too large or nested too deeply, not valid, or would take too long.
    """
    from llguidance import LLMatcher, LLParserLimits

    source = _source(form, limit)
    limits = LLParserLimits(
        initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, step_max_items=50_000,
        max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False,
    )  # fmt: skip
    try:
        matcher = LLMatcher(words, source, log_level=0, limits=limits)
        wrong = matcher.get_error() if matcher.is_error() else ""
    except (ValueError, RuntimeError) as error:
        wrong = str(error)
    if wrong:
        raise RequestError(f"the {form.kind} of the output cannot be used: {_sentence(wrong)}")
    return Grammar(matcher, form.kind)


def _source(form: Form, limit: int) -> str:
    from llguidance import LLMatcher

    value = form.source
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text.encode()) > limit:
        raise RequestError(
            f"the {form.kind} of the output has {len(text.encode())} bytes, of at most {limit}"
        )
    if not isinstance(value, str) and _depth(value) > _DEEPEST:
        raise RequestError(f"the {form.kind} of the output is nested deeper than {_DEEPEST}")
    try:
        if form.kind == "json":
            return str(LLMatcher.grammar_from_json_schema(text, overrides=_LAYOUT))
        if form.kind == "regex":
            return str(LLMatcher.grammar_from_regex(text))
    except ValueError as error:
        raise RequestError(
            f"the {form.kind} of the output cannot be used: {_sentence(str(error))}"
        ) from None
    if form.kind == "choice":
        text = "start: " + " | ".join(json.dumps(choice) for choice in value)
    if form.kind == "call":
        schema = json.dumps({**value, "x-guidance": _LAYOUT})
        text = f'start: " "? arguments\narguments: %json {schema}'
    return str(LLMatcher.grammar_from_lark(text))


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level and deepest <= _DEEPEST:
        deepest += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                below += item.values()
            elif isinstance(item, Sequence) and not isinstance(item, str):
                below += item
        level = below
    return deepest


def _sentence(text: str) -> str:
    return " ".join(text.split())[:200]


class Grammar:
    """A form in progress: what may come next. Driven on the engine's thread."""

    def __init__(self, matcher: Any, kind: str) -> None:
        self._matcher, self._kind = matcher, kind

    def mask(self) -> NDArray[np.uint32]:
        """The tokens that may come next, 32 a word from the lowest bit on.

        Raises
        ------
        RequestError
            If the form became too complex to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return bits

    def valid(self, tokens: list[int]) -> int:
        """How many of these tokens may come next, one after the other; changes nothing."""
        return int(self._matcher.validate_tokens(tokens))

    def accept(self, token: int) -> None:
        """Take the token that came."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            error = _sentence(self._matcher.get_error())
            raise RequestError(f"the {self._kind} of the output cannot be followed: {error}")

    def copy(self) -> Grammar:
        """Another at the same place."""
        return Grammar(self._matcher.deep_copy(), self._kind)
