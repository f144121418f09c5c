"""Leaving out of texts what must not get into traces: keys, tokens, e-mail addresses, card numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

LEFT_OUT: Final = "[redacted]"

_NAMED: Final = (
    r"(?i:\b(?:api[_-]?key|access[_-]?key|secret|token|password|passwd|authorization)\b)"
    r"[\"']?\s*[:=]\s*[\"']?[^\s\"',;]{6,}"
)
_KEYS: Final = (
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    r"\b[Bb]earer\s+[A-Za-z0-9._~+/=-]{8,}",
    r"\beyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){1,4}",  # JSON web tokens, cut ones too
    r"\b(?:sk|pk|rk|weir)-[A-Za-z0-9_-]{8,}",
    r"\b[spr]k_(?:live|test)_[A-Za-z0-9]{8,}",
    r"\bgh[opsur]_[A-Za-z0-9]{16,}",
    r"\bgithub_pat_\w{16,}",
    r"\bglpat-[\w-]{16,}",
    r"\bhf_[A-Za-z0-9]{16,}",
    r"\bxox[a-z]-[\w-]{8,}",
    r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b",
    r"\bAIza[\w-]{30,}",
    _NAMED,
)
# It begins where a word begins: from each of its letters anew, a long word without @ would take for ever.
_ADDRESS: Final = r"(?<![\w.%+-])[\w.%+-]+@[\w-]+(?:\.[\w-]+)+"
_CARD: Final = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")


class Redaction:
    """A text without secrets. `more` are regular expressions of the operator's own."""

    def __init__(self, more: Iterable[str] = ()) -> None:
        self._keys = re.compile("|".join(_KEYS), re.DOTALL)
        self._address = re.compile(_ADDRESS)
        self._more = tuple(re.compile(pattern) for pattern in more)

    def __call__(self, text: str) -> str:
        text = self._keys.sub(LEFT_OUT, text)
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
