"""One record of the ledger as one row. Knows JSON and the table's columns, and no driver.

A pod may be newer than the worker: fields that the worker does not know go into the column `extra`, and
words that it does not know, a new outcome for example, are text as all others. A record that has no row
is Unreadable; the reason names the field and never its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

Row: TypeAlias = tuple[Any, ...]
"""Values in the order of COLUMNS."""

MOST_KEY_LETTERS: Final = 200
"""Of what an index holds: PostgreSQL refuses entries of some kilobytes."""
MOST_INTEGER: Final = 2**63 - 1


class Unreadable(Exception):
    """There is no row for this entry of the stream; the text says why."""


class Column(NamedTuple):
    name: str
    type: str
    path: tuple[str, ...]
    """Where in the record it is."""
    read: Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unreadable("is no text")
    return value.replace("\0", "\ufffd")  # PostgreSQL's text has no zero


def _key(value: Any) -> str:
    text = _text(value)
    if not 0 < len(text) <= MOST_KEY_LETTERS:
        raise Unreadable(f"is empty or longer than {MOST_KEY_LETTERS} letters")
    return text


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unreadable("is neither true nor false")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) > MOST_INTEGER:
        raise Unreadable("is no whole number of 64 bits")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unreadable("is no number")
    return float(value)


def _dollars(value: Any) -> Decimal:
    return Decimal(repr(_number(value)))  # the shortest decimal that is this number


def _time(value: Any) -> datetime:
    try:
        return datetime.fromtimestamp(_number(value), UTC)
    except (ValueError, OverflowError, OSError):
        raise Unreadable("is no time") from None


REQUIRED: Final = frozenset({"id", "tenant", "api_key", "started_at", "outcome"})

COLUMNS: Final = (
    Column("id", "text", ("id",), _key),
    Column("request_id", "text", ("request_id",), _text),
    Column("tenant", "text", ("principal", "tenant"), _key),
    Column("api_key", "text", ("principal", "name"), _text),
    Column("admin", "boolean", ("principal", "admin"), _flag),
    Column("priority", "text", ("principal", "priority"), _text),
    Column("started_at", "timestamptz", ("started_at",), _time),
    Column("route", "text", ("route",), _text),
    Column("operation", "text", ("operation",), _text),
    Column("request_model", "text", ("request_model",), _text),
    Column("response_model", "text", ("response_model",), _text),
    Column("answered_by", "text", ("answered_by",), _text),
    Column("provider", "text", ("provider",), _text),
    Column("upstream", "text", ("upstream",), _text),
    Column("stream", "boolean", ("stream",), _flag),
    Column("outcome", "text", ("outcome",), _text),
    Column("error_code", "text", ("error_code",), _text),
    Column("input_tokens", "bigint", ("usage", "input_tokens"), _whole),
    Column("output_tokens", "bigint", ("usage", "output_tokens"), _whole),
    Column("cached_input_tokens", "bigint", ("usage", "cached_input_tokens"), _whole),
    Column("cache_write_tokens", "bigint", ("usage", "cache_write_tokens"), _whole),
    Column("reasoning_tokens", "bigint", ("usage", "reasoning_tokens"), _whole),
    Column("audio_input_tokens", "bigint", ("usage", "audio_input_tokens"), _whole),
    Column("audio_output_tokens", "bigint", ("usage", "audio_output_tokens"), _whole),
    Column("usage_source", "text", ("usage", "source"), _text),
    Column("cost_usd", "numeric", ("cost", "usd"), _dollars),
    Column("cost_source", "text", ("cost", "source"), _text),
    Column("cache", "text", ("cache",), _text),
    Column("saved_usd", "numeric", ("saved_usd",), _dollars),
    Column("attempts", "bigint", ("attempts",), _whole),
    Column("duration_seconds", "double precision", ("duration_seconds",), _number),
    Column("queue_seconds", "double precision", ("queue_seconds",), _number),
    Column("upstream_seconds", "double precision", ("upstream_seconds",), _number),
    Column("overhead_seconds", "double precision", ("overhead_seconds",), _number),
    Column("time_to_first_token_seconds", "double precision", ("time_to_first_token_seconds",), _number),
    Column("time_per_output_token_seconds", "double precision", ("time_per_output_token_seconds",), _number),
    Column("finish_reason", "text", ("finish_reason",), _text),
    Column("response_id", "text", ("response_id",), _text),
    Column("upstream_request_id", "text", ("upstream_request_id",), _text),
    Column("conversation_id", "text", ("conversation_id",), _text),
    Column("trace_id", "text", ("trace_id",), _text),
)
EXTRA: Final = "extra"
"""The last column: what is in no other, as jsonb."""

LEFT_OUT: Final = (("principal", "models"), ("sampled",))
"""What a key may do is no part of what it did; and a trace is gone long before its row."""
NAMES: Final = (*(column.name for column in COLUMNS), EXTRA)
_GROUPS: Final = frozenset(column.path[0] for column in COLUMNS if len(column.path) > 1)

_decode: Final = msgspec.json.Decoder().decode


def row(record: bytes | None) -> Row:
    """The row of one record. Raises Unreadable."""
    if record is None:
        raise Unreadable("the entry has no field `record`")
    try:
        fields = _decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Unreadable("the record is not JSON") from None
    if not isinstance(fields, dict):
        raise Unreadable("the record is no object")
    for group in _GROUPS:
        if not isinstance(fields.setdefault(group, None), dict | None):
            raise Unreadable(f"the field `{group}` is no object")
    # What is read is taken away: what is left then is in no column.
    values = [_take(column, fields) for column in COLUMNS]
    for *above, name in LEFT_OUT:
        holder = fields[above[0]] if above else fields
        (holder or {}).pop(name, None)
    for group in _GROUPS:
        if not fields[group]:
            del fields[group]
    return (*values, _json(fields) if fields else None)


def _take(column: Column, fields: dict[str, Any]) -> Any:
    *above, name = column.path
    holder = fields[above[0]] if above else fields
    value = holder.pop(name, None) if holder else None
    if value is None:
        if column.name in REQUIRED:
            raise Unreadable(f"the field `{'.'.join(column.path)}` is not there")
        return None
    try:
        return column.read(value)
    except Unreadable as why:
        raise Unreadable(f"the field `{'.'.join(column.path)}` {why}") from None


def _json(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return msgspec.json.encode(_without_zeros(value)).decode() if "\\u0000" in text else text


def _without_zeros(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_text(name): _without_zeros(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_zeros(inner) for inner in value]
    return value
