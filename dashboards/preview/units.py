"""Numbers as Grafana writes them, by the unit of a field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

_SI: Final = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_RATES: Final = {
    "reqps": "req/s",
    "ops": "ops/s",
    "cps": "c/s",
    "rps": "rd/s",
    "eps": "ev/s",
    "mps": "msg/s",
    "wps": "w/s",
    "pps": "p/s",
}
_SECONDS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_DECIMAL_BYTES: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_BINARY_BYTES: Final = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
_SIZES: Final = {
    "s": _SECONDS,
    "dtdurations": _SECONDS,
    "bytes": _BINARY_BYTES,
    "decbytes": _DECIMAL_BYTES,
}
_CURRENCIES: Final = {"currencyUSD": "$", "currencyEUR": "€", "currencyGBP": "£"}


def shown(value: float | None, unit: str = "", decimals: int | None = None) -> str:
    """`value` with its unit; an empty text where there is none."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if unit in _CURRENCIES:
        return f"{'-' if value < 0 else ''}{_CURRENCIES[unit]}{_short(abs(value), decimals)}"
    kind, colon, word = unit.partition(":")
    if colon:
        text = _short(value, decimals)
        return f"{text} {word.strip()}" if kind == "suffix" else f"{word}{text}"
    if unit in _RATES:
        return f"{_short(value, decimals)} {_RATES[unit]}"
    return _FORMS.get(unit, _short)(value, decimals)


def size_of(value: float, unit: str) -> float:
    """What `value` is counted in when it is written: seconds in minutes, bytes in MiB. Else 1."""
    return next((size for size, _ in _SIZES.get(unit, ()) if abs(value) >= size), 1.0)


def _number(value: float, decimals: int | None) -> str:
    """About three digits that mean something, unless told otherwise."""
    if decimals is None:
        size = abs(value)
        if size == 0 or float(value).is_integer():
            decimals = 0
        else:
            decimals = max(0, min(6, 2 - math.floor(math.log10(size))))
        text = f"{value:.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{decimals}f}"


def _short(value: float, decimals: int | None) -> str:
    for size, letter in _SI:
        if abs(value) >= size:
            return f"{_number(value / size, decimals)} {letter}"
    return _number(value, decimals)


def _duration(seconds: float, decimals: int | None) -> str:
    for size, name in _SECONDS:
        if abs(seconds) >= size:
            return f"{_number(seconds / size, decimals)} {name}"
    return "0 s" if seconds == 0 else f"{_number(seconds * 1e9, decimals)} ns"


def _bytes(scale: tuple[tuple[float, str], ...]) -> Callable[[float, int | None], str]:
    def form(value: float, decimals: int | None) -> str:
        for size, name in scale:
            if abs(value) >= size:
                return f"{_number(value / size, decimals)} {name}"
        return f"{_number(value, decimals)} B"

    return form


def _plain(value: float, decimals: int | None) -> str:
    return f"{value:,.{decimals}f}" if decimals is not None else _number(value, None)


_FORMS: Final[dict[str, Callable[[float, int | None], str]]] = {
    "percentunit": lambda value, decimals: f"{_number(value * 100, decimals)}%",
    "percent": lambda value, decimals: f"{_number(value, decimals)}%",
    "s": _duration,
    "dtdurations": _duration,
    "ms": lambda value, decimals: _duration(value / 1000, decimals),
    "bytes": _bytes(_BINARY_BYTES),
    "decbytes": _bytes(_DECIMAL_BYTES),
    "none": _plain,
    "locale": _plain,
}
