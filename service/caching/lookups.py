"""`cached` for the service's own slow look-ups: asked once, then known for a while.

models = cached(cache, "models", 60)(upstream.models)
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar, get_type_hints

import msgspec

from service.caching.flights import Ending, Flights, Role
from service.ports import Cache

SERVICE: Final = ""
"""The tenant of what belongs to the service itself; no tenant has this name."""
P = ParamSpec("P")
T = TypeVar("T")
_encode_arguments: Final = msgspec.json.Encoder(order="deterministic").encode
_UNWRITABLE: Final = (TypeError, ValueError, OverflowError, RecursionError)


def cached(
    cache: Cache, prefix: str, ttl_seconds: float
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Keeps what a function returns, below `prefix` and its arguments, for `ttl_seconds`.

    Arguments and value must have a JSON form; a call whose arguments have none is simply made, and a value
    that has none is not kept. What is found is read as the type that the function says to return. Equal
    calls at the same time are made once. Errors are not kept.
    """
    flights = Flights()

    def around(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        read = msgspec.json.Decoder(get_type_hints(function).get("return", Any)).decode

        async def find(name: str) -> tuple[T] | None:
            kept = await cache.get(SERVICE, name)
            try:
                return None if kept is None else (read(kept),)
            except ValueError:
                return None  # of an older version of the function

        @wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                arguments = _encode_arguments((args, kwargs))
            except _UNWRITABLE:
                return await function(*args, **kwargs)
            name = f"{prefix}:{hashlib.sha256(arguments).hexdigest()}"
            if (found := await find(name)) is not None:
                return found[0]
            flight = flights.of(SERVICE, name)
            async with flight as role:
                if role is Role.LOOKS and (found := await find(name)) is not None:
                    return found[0]
                value = await function(*args, **kwargs)
                try:
                    await cache.put(SERVICE, name, msgspec.json.encode(value), ttl_seconds)
                    flight.leave(Ending.KEPT)
                except _UNWRITABLE:
                    pass
                return value

        return call

    return around
