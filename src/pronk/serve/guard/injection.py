"""Signs that a text wants to give orders in place of the one who runs the model.

Each sign has a weight, and a text's score is the sum over the signs that it shows, at most 1. Such
signs catch the attacks that are copied around, and no one who words a new one: they are a sieve,
not a wall. `tests/test_guard_kinds.py` holds the lines that they were measured on.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

__all__ = ["DEFAULT_THRESHOLD", "score", "signs"]

DEFAULT_THRESHOLD = 0.5
_LONGEST = 1 << 20
_MOST_INVISIBLE = 3
_PRIOR = (
    "(?:previous|prior|above|earlier|preceding|all|any|your|the|these|those|my|of|other|safety)"
)
_ORDERS = (
    "(?:instructions?|prompts?|rules?|directions?|guidelines?|orders?|polic(?:y|ies)|commands?)"
)
_TELL = (
    "(?:reveal|show|print|repeat|output|display|tell me|give me|leak|dump|what (?:is|are|was|were))"
)

# Sign: weight, and RE2 patterns over text in lower case with single spaces.
_SIGNS: Mapping[str, tuple[float, Sequence[str]]] = {
    "override": (0.6, (
        r"\b(?:ignore|disregard|forget|override|bypass|skip|drop)\b"
        rf"(?: {_PRIOR}){{1,4}} (?:\w+ ){{0,2}}{_ORDERS}\b",
        r"\bforget (?:everything|all) (?:you|above|i|before|prior)",
    )),
    "replacement": (0.5, (
        rf"\b(?:your|my|the) (?:new|updated|real|actual|true) (?:system )?{_ORDERS}(?: are| is|:)",
        rf"\b(?:new|updated) {_ORDERS} follow",
        r"\bfrom now on,? (?:you|respond|answer|act|ignore)",
    )),
    "prompt_theft": (0.6, (
        rf"\b{_TELL}\b(?: \w+){{0,3}}? (?:your|the|its|this|all|any|those)(?: \w+){{0,2}}? "
        r"(?:system|hidden|initial|secret|original|developer) "
        r"(?:messages?|prompts?|instructions?|rules?|guidelines?)\b",
        rf"\b{_TELL}\b(?: \w+){{0,4}}? {_ORDERS} (?:verbatim|word for word)",
        r"\brepeat (?:everything|all|the (?:text|words)) above\b",
    )),
    "jailbreak": (0.6, (
        r"\bdo anything now\b|\bdan mode\b|\bjailbr(?:eak|oken)\b",
        r"\bdeveloper mode (?:on|enabled)|\bunfiltered (?:ai|model|assistant)\b",
        r"\b(?:without|no|free of|ignore|disable|remove)(?: any| all| your)? "
        r"(?:ethical |moral |content |safety )+(?:restrictions?|filters?|limits?|guidelines?)",
    )),
    "persona": (0.3, (
        r"\b(?:you are now|act as|pretend (?:to be|you are)|roleplay as)\b(?: \w+){0,6}? "
        r"(?:unrestricted|uncensored|unfiltered|evil|root|admin|developer|dan|no (?:rules|limits))",
    )),
    "special_token": (0.7, (
        r"<\|[a-z0-9_]{2,32}\|>|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>",
        r"<\x{ff5c}[^\x{ff5c}]{2,32}\x{ff5c}>",
    )),
    "role_mark": (0.3, (
        r"(?:^| )(?:#{1,4} ?)?(?:system|developer) ?(?:message|prompt|override)? ?:",
        r"</?(?:system|developer|instructions?)>",
        r"(?:^| )#{2,4} ?(?:system|new instructions?)\b",
    )),
    "urgency": (0.1, (r"\b(?:important|attention|urgent)\b ?[:!]+",)),
}  # fmt: skip
_ENCODED = (0.3, r"[A-Za-z0-9+/=_-]{200}")
_INVISIBLE = 0.6


@cache
def _compiled() -> Mapping[str, tuple[float, Callable[[str], Any]]]:
    import re2

    return {name: (weight, re2.compile("|".join(sources)).search)
            for name, (weight, sources) in _SIGNS.items()}  # fmt: skip


@cache
def _encoded() -> Callable[[str], Any]:
    import re2

    found: Callable[[str], Any] = re2.compile(_ENCODED[1]).search
    return found


def signs(text: str) -> dict[str, float]:
    """The signs that a text shows, and their weights."""
    text = text[:_LONGEST]
    found = {}
    hidden = [char for char in text if not char.isascii() and _hides(char)]
    # Tag characters spell ASCII that nobody sees (Unicode's block of U+E0000).
    tags = "".join(chr(ord(c) - 0xE0000) for c in hidden if 0xE0020 <= ord(c) < 0xE007F)
    if tags or len(hidden) > _MOST_INVISIBLE:
        found["invisible"] = _INVISIBLE
    if _encoded()(text):
        found["encoded"] = _ENCODED[0]
    shown = "".join(char for char in text if char.isascii() or not _hides(char))
    plain = unicodedata.normalize("NFKC", f"{shown} {tags}" if tags else shown).lower()
    plain = " ".join(plain.split())
    for name, (weight, search) in _compiled().items():
        if search(plain):
            found[name] = weight
    return found


def _hides(char: str) -> bool:
    """Format characters, but for the joiners of scripts and emoji."""
    return unicodedata.category(char) == "Cf" and char not in "\u200c\u200d\u00ad"


def score(text: str) -> float:
    """How much a text looks like an attack, 0 to 1."""
    return min(1.0, sum(signs(text).values()))
