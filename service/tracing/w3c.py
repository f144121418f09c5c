"""The headers of W3C Trace Context: what a caller's trace is, and what goes on to an upstream."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16
_SAMPLED: Final = 1


class Parent(msgspec.Struct, frozen=True):
    """The caller's span."""

    trace_id: str
    span_id: str
    flags: int
    state: str = ""
    """Its tracestate, as it came."""

    @property
    def sampled(self) -> bool:
        return bool(self.flags & _SAMPLED)


class Carrier(msgspec.Struct, frozen=True):
    """What a request brought along; `headers` is what of it may go on as it is."""

    parent: Parent | None = None
    headers: tuple[tuple[str, str], ...] = ()
    baggage: tuple[tuple[str, str], ...] = ()


NOTHING: Final = Carrier()


class Propagation:
    """Which of these headers are taken and sent: OTEL_PROPAGATORS."""

    def __init__(self, names: Collection[str]) -> None:
        self.context = "tracecontext" in names and "none" not in names
        self._baggage = "baggage" in names and "none" not in names

    def read(self, headers: Mapping[bytes, bytes]) -> Carrier:
        """`headers` by their lower-case names."""
        traceparent = headers.get(b"traceparent") if self.context else None
        baggage = headers.get(b"baggage") if self._baggage else None
        if traceparent is None and baggage is None:
            return NOTHING
        carried = _one("baggage", baggage)
        state = headers.get(b"tracestate")
        parent = parse(_text(traceparent), _text(state))
        if parent is None:
            return Carrier(headers=carried, baggage=carried)
        context = (*_one("traceparent", traceparent), *_one("tracestate", state))
        return Carrier(parent, (*context, *carried), carried)


def parse(traceparent: str, state: str = "") -> Parent | None:
    """A traceparent that is one, of this version or a later one; else None."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return Parent(trace_id, span_id, int(flags, 16), state)


def _text(value: bytes | None) -> str:
    return value.decode("latin-1") if value is not None else ""


def _one(name: str, value: bytes | None) -> tuple[tuple[str, str], ...]:
    return ((name, value.decode()),) if value and value.isascii() else ()
