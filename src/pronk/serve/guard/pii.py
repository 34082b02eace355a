"""Personal data by its form: patterns, and checks of what they find.

Phone numbers are libphonenumber's business (`phonenumbers`); the rest is arithmetic of published
standards. The known detectors were no choice: Presidio loads spaCy and fetches a list of domains,
scrubadub has had no release since 2023, others report home or depend on what the LGPL covers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from pronk.errors import RequestError
from pronk.serve.guard.patterns import Pattern
from pronk.serve.guard.stages import Hit, Matching, Rule

__all__ = ["ENTITIES", "pii_rules", "redacted"]

_IBAN_LENGTHS = range(34, 14, -1)


def _email(text: str, start: int, end: int) -> Sequence[Hit]:
    return [Hit(start, end, "[EMAIL]")]


def _iban(text: str, start: int, end: int) -> Sequence[Hit]:
    """The longest beginning that ends with a group and has the check digits of ISO 13616."""
    if _beside_word(text, start, start):
        return []
    places = [at for at in range(start, end) if text[at].isalnum()]
    for length in _IBAN_LENGTHS:
        if length > len(places):
            continue
        last = places[length - 1] + 1
        if last < len(text) and text[last].isalnum():
            continue
        number = "".join(text[at] for at in places[:length]).upper()
        digits = "".join(str(int(char, 36)) for char in number[4:] + number[:4])
        if int(digits) % 97 == 1:
            return [Hit(start, last, "[IBAN]")]
    return []


def _card(text: str, start: int, end: int) -> Sequence[Hit]:
    """A number with Luhn's check digit (ISO/IEC 7812)."""
    digits = [int(char) for char in text[start:end] if char.isdecimal()]
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return [Hit(start, end, "[CARD]")] if total % 10 == 0 and len(set(digits)) > 1 else []


def _ssn(text: str, start: int, end: int) -> Sequence[Hit]:
    """A number that the Social Security Administration may have given."""
    area, group, serial = (int(part) for part in text[start:end].replace(" ", "-").split("-"))
    given = area not in (0, 666) and area < 900 and group and serial
    return [Hit(start, end, "[SSN]")] if given else []


def _ip(text: str, start: int, end: int) -> Sequence[Hit]:
    written = text[start:end]
    if _beside_word(text, start, end) or text[start - 1 : start] in (".", ":"):
        return []
    # C++ writes a::b, and clocks 12:30:45.
    if ":" in written and (sum(map(bool, written.split(":"))) < 3 or written.isalpha()):
        return []
    try:
        ipaddress.ip_address(written)
    except ValueError:
        return []
    return [Hit(start, end, "[IP]")]


def _phone(region: str) -> Callable[[str, int, int], Sequence[Hit]]:
    import phonenumbers

    def accept(text: str, start: int, end: int) -> Sequence[Hit]:
        first = max(0, start - 1)
        found = phonenumbers.PhoneNumberMatcher(text[first : end + 1], region)
        places = ((first + match.start, first + match.end) for match in found)
        return [Hit(*place, "[PHONE]") for place in places if place[1] <= end]

    return accept


def _beside_word(text: str, start: int, end: int) -> bool:
    return text[start - 1 : start].isalnum() or (end > start and text[end : end + 1].isalnum())


# In this order: what one has marked, those after it do not see.
_SOURCES: Mapping[str, str] = {
    "email": r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z][A-Za-z0-9-]{1,30}",
    "iban": r"[A-Z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}",
    "card": r"\b[2-6](?:[ -]?[0-9]){11,18}\b",
    "ssn": r"\b[0-9]{3}[ -][0-9]{2}[ -][0-9]{4}\b",
    "ip": r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
          r"|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:(?:\.[0-9]{1,3}){3})?",
    "phone": r"[+(]{0,2}\d(?:[ ().\-/]{0,3}\d){6,16}",
}  # fmt: skip
_ACCEPT = {"email": _email, "iban": _iban, "card": _card, "ssn": _ssn, "ip": _ip}
ENTITIES = tuple(_SOURCES)


def pii_rules(entities: Sequence[str] = ENTITIES, region: str = "US") -> Sequence[Rule]:
    """Rules for some kinds of personal data.

    Parameters
    ----------
    entities : sequence of str
        Of `ENTITIES`.
    region : str
        Whose phone numbers may stand without a country's code, as ISO 3166 names it.

    Raises
    ------
    RequestError
        If there is no such region or kind.
    """
    return _rules(tuple(entities), region)


@lru_cache(maxsize=8)
def _rules(entities: Sequence[str], region: str) -> Sequence[Rule]:
    import phonenumbers

    unknown = set(entities) - set(ENTITIES)
    if unknown:
        raise RequestError(
            f"there is no entity {min(unknown)!r}: choose from {', '.join(ENTITIES)}"
        )
    phonenumbers.PhoneMetadata.load_all()  # or each country's is read when a number is its own
    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise RequestError(f"there is no region {region!r}: give two letters such as US or DE")
    accept = {**_ACCEPT, "phone": _phone(region)}
    return [Rule(Pattern(_SOURCES[kind]), accept[kind]) for kind in ENTITIES if kind in entities]


def redacted(text: str) -> str:
    """A text with marks for all personal data that is found."""
    for rule in pii_rules():
        text = Matching(rule, "redact", lambda: None).push(text, final=True)
    return text
