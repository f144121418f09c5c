"""What a call may have of the cache. docs/cache.md has the rules as a caller sees them."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final

import msgspec

from service.domain import Call, Operation
from service.errors import InvalidRequest
from service.ports import Target

HEADER: Final = "X-Weir-Cache"
FORM: Final = 1
"""Part of every name: raised when names or answers change their meaning, so that nothing old is found."""
NO_CHANGE: Final = ("stream", "stream_options")
"""How the answer is sent, not what it says."""
ABOUT_CALLER: Final = ("user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention")
"""They change no completion. The Responses API repeats them in its answers, so there they count."""
STATEFUL: Final = ("store", "background", "previous_response_id", "conversation")
"""With one of these the provider keeps something, or answers from something that it kept."""
OWN_TOOLS: Final = ("function", "custom")
"""Tools that the caller runs; all others are run by the provider and look at the world outside."""
_TEMPERATURE: Final = b'"temperature"'
_ZERO: Final = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*-?0(?:\.0*)?(?:[eE][+-]?[0-9]+)?[ \t\r\n]*[,}]")
_UNSPOKEN_HEADERS: Final = ("traceparent",)
_encode: Final = msgspec.json.Encoder(order="deterministic").encode
_NO_NAME: Final = (ValueError, OverflowError, RecursionError)
"""What decoding and encoding raise. A call without a name is not ours to refuse: it passes by the cache."""


class Wish(msgspec.Struct, frozen=True):
    """What a caller's headers say. `asks`: use the cache, or do not; None where they say nothing."""

    asks: bool | None = None
    refresh: bool = False
    max_age_seconds: float | None = None


class Lookup(msgspec.Struct, frozen=True):
    """What a call has of the cache: whether it may be answered from it, and its answer be kept in it."""

    name: str
    ttl_seconds: float
    max_age_seconds: float | None = None
    """An older entry is none."""
    read: bool = True
    write: bool = True


NO_WISH: Final = Wish()
_OFF: Final = Wish(asks=False)
_ON: Final = Wish(asks=True)
_REFRESH: Final = Wish(asks=True, refresh=True)
_WISHES: Final = {"on": _ON, "off": _OFF, "refresh": _REFRESH}


def read_wish(x_weir_cache: str | None, cache_control: str | None) -> Wish:
    """The wish in a request's headers; X-Weir-Cache, if it is there, is all of it. Raises InvalidRequest."""
    if x_weir_cache is not None:
        wish = _WISHES.get(x_weir_cache.strip().lower())
        if wish is None:
            raise InvalidRequest(f"{HEADER} must be on, off or refresh.", param=HEADER)
        return wish
    return NO_WISH if cache_control is None else _in_cache_control(cache_control)


def find_lookup(call: Call, target: Target, wish: Wish, ttl_seconds: float) -> Lookup | None:
    """None: this call passes by the cache. `ttl_seconds` is for models that have none of their own."""
    own = target.cache_ttl_seconds
    ttl = ttl_seconds if own is None else own
    if ttl <= 0 or wish.asks is False or not (wish.asks or _may_be_cold(call)):
        return None
    parameters = call.parameters
    try:
        if parameters is None:
            parameters = msgspec.json.decode(call.body)
        if not isinstance(parameters, dict) or not _keepable(
            call.operation, parameters, asked=bool(wish.asks)
        ):
            return None
        name = _name(call, target, parameters)
    except _NO_NAME:
        return None
    return Lookup(name, ttl, wish.max_age_seconds, read=not wish.refresh)


def _in_cache_control(value: str) -> Wish:
    """The strictest of its directives; those that ask for nothing of a cache are no wish."""
    wish = NO_WISH
    for directive in value.lower().split(","):
        name, _, argument = directive.strip().partition("=")
        if name == "no-store":
            return _OFF
        if name == "no-cache":
            wish = _REFRESH
        elif name == "max-age" and not wish.refresh and argument.isascii() and argument.isdigit():
            seconds = float(argument[:12])
            wish = Wish(asks=True, max_age_seconds=seconds) if seconds else _REFRESH
    return wish


def _may_be_cold(call: Call) -> bool:
    """Whether a temperature of 0 stands somewhere in the body. Most calls end here, in a microsecond."""
    if call.parameters is not None:
        return _is_zero(call.parameters.get("temperature"))
    body = call.body
    at = body.find(_TEMPERATURE)
    while at >= 0:
        at += len(_TEMPERATURE)
        if _ZERO.match(body, at):
            return True
        at = body.find(_TEMPERATURE, at)
    return False


def _keepable(operation: Operation, parameters: dict[str, Any], *, asked: bool) -> bool:
    if any(parameters.get(name) for name in STATEFUL):
        return False
    if parameters.get("audio"):  # a spoken answer is also kept by the provider, under an id that ends
        return False
    return asked or (
        operation is not Operation.EMBEDDINGS
        and _is_zero(parameters.get("temperature"))
        and not _looks_outside(parameters)
    )


def _looks_outside(parameters: dict[str, Any]) -> bool:
    """The provider searches, runs or calls something: an equal call may well have another answer."""
    tools = parameters.get("tools") or ()
    if not isinstance(tools, list | tuple):
        return True
    return parameters.get("web_search_options") is not None or not all(
        isinstance(tool, dict) and tool.get("type", "function") in OWN_TOOLS for tool in tools
    )


def _is_zero(value: Any) -> bool:
    return type(value) in (int, float) and value == 0


def _name(call: Call, target: Target, parameters: dict[str, Any]) -> str:
    """A hash of all that may change the answer. The order of keys does not, the order of lists does."""
    left_out = NO_CHANGE if call.operation is Operation.RESPONSES else NO_CHANGE + ABOUT_CALLER
    counted = {name: value for name, value in parameters.items() if name not in left_out}
    headers = [header for header in call.headers if header[0].lower() not in _UNSPOKEN_HEADERS]
    place = (FORM, call.operation.value, target.upstream.name, target.model, call.model, headers)
    return hashlib.sha256(_encode((place, counted))).hexdigest()
