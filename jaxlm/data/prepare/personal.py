"""Personal data in texts: e-mail addresses, telephone numbers, numbers of identity and account."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

MASKS = {"email": "<email>", "phone": "<phone>", "identifier": "<id>"}

_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
    r"(?![\w-])",
    re.ASCII,  # Chinese stands beside numbers without a space
)
# With a plus sign and a country; a Chinese mobile or a line with its area; the North American form.
_PHONE = re.compile(
    r"(?<![\w.+-])\+\d{1,3}(?:[ .-]?\(?\d{1,5}\)?){2,6}(?![\w-]|\.\d)"
    r"|(?<![\w.+-])1[3-9]\d{9}(?![\w-]|\.\d)"
    r"|(?<![\w.+-])0\d{2,3}-\d{7,8}(?![\w-]|\.\d)"
    r"|(?<![\w.+-])(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-.]\d{4}(?![\w-]|\.\d)",
    re.ASCII,
)
_CHINESE_ID = re.compile(r"(?<![\w.-])[1-9]\d{5}(?:19|20)\d{9}[\dXx](?![\w-]|\.\d)", re.ASCII)
_CARD = re.compile(r"(?<![\w.-])\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,7}(?![\w-]|\.\d)", re.ASCII)
_SOCIAL = re.compile(r"(?<![\w.-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)", re.ASCII)
_IBAN = re.compile(r"(?<![\w-])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![\w-])", re.ASCII)


class Span(NamedTuple):
    """A place [begin, end) of a text."""

    begin: int
    end: int


def find(kind: str, text: str) -> list[Span]:
    """Where a text has personal data of a kind: email, phone or identifier."""
    return sorted(_FINDERS[kind](text))


def mask(text: str, spans: list[Span], by: str) -> str:
    """The text with `by` in these places; those that begin within one before are passed over."""
    parts, at = [], 0
    for begin, end in spans:
        if begin >= at:
            parts += [text[at:begin], by]
            at = end
    return "".join([*parts, text[at:]])


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from (Span(*match.span()) for match in _EMAIL.finditer(text))


def _phones(text: str) -> Iterator[Span]:
    for match in _PHONE.finditer(text):
        if 8 <= sum(map(str.isdigit, match.group())) <= 15:
            yield Span(*match.span())


def _identifiers(text: str) -> Iterator[Span]:
    """Numbers whose check digits hold, and United States social security numbers, which have none."""
    checks: tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...] = (
        (_CHINESE_ID, _is_chinese_id),
        (_CARD, _is_card),
        (_SOCIAL, lambda _: True),
        (_IBAN, _is_iban),
    )
    for pattern, holds in checks:
        yield from (Span(*match.span()) for match in pattern.finditer(text) if holds(match.group()))


def _is_chinese_id(number: str) -> bool:
    """GB 11643-1999: weights modulo 11."""
    total = sum(int(digit) * (1 << (17 - place)) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def _is_card(number: str) -> bool:
    """ISO/IEC 7812: 13 to 19 digits, Luhn's sum."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _is_iban(number: str) -> bool:
    """ISO 13616: modulo 97."""
    plain = number.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


_FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {
    "email": _emails,
    "phone": _phones,
    "identifier": _identifiers,
}
