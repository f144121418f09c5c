"""Leaving out of texts what must not get into traces: keys, tokens, e-mail addresses, card numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from service.credentials import CREDENTIAL

LEFT_OUT: Final = "[redacted]"

# It begins where a word begins: from each of its letters anew, a long word without @ would take for ever.
_ADDRESS: Final = r"(?<![\w.%+-])[\w.%+-]+@[\w-]+(?:\.[\w-]+)+"
_CARD: Final = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")


class Redaction:
    """A text without secrets. `more` are regular expressions of the operator's own."""

    def __init__(self, more: Iterable[str] = ()) -> None:
        self._address = re.compile(_ADDRESS)
        self._more = tuple(re.compile(pattern) for pattern in more)

    def __call__(self, text: str) -> str:
        text = CREDENTIAL.sub(LEFT_OUT, text)
        if "@" in text:
            text = self._address.sub(LEFT_OUT, text)
        text = _CARD.sub(_card, text)
        for pattern in self._more:
            text = pattern.sub(LEFT_OUT, text)
        return text


def _card(match: re.Match[str]) -> str:
    """Only numbers whose check digit fits: others are times, amounts, identifiers."""
    digits = [int(letter) for letter in match[0] if letter.isdigit()]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return LEFT_OUT if (sum(digits[-1::-2]) + doubled) % 10 == 0 else match[0]
