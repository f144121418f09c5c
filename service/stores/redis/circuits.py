"""Circuits that pods have opened, on Redis.

| key after `weir:` | type | what is in it |
|---|---|---|
| `{*}:circuits` | sorted set | `UPSTREAM|MODEL`, percent-encoded, by their ends |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Final
from urllib.parse import quote, unquote

from service.ports import PlaceName
from service.stores.redis.keys import FLEET, Keys
from service.stores.redis.link import Link, Script

MOST_CIRCUITS: Final = 1_000
"""Of the whole fleet; those that end first go first."""

_EXCHANGE: Final = Script(files(__package__).joinpath("circuits.lua").read_text(encoding="utf-8"))


class RedisCircuits:
    """The circuits of all pods. Only Redis' clock counts."""

    def __init__(self, link: Link, most: int = MOST_CIRCUITS) -> None:
        self._link = link
        self._key = Keys(link.prefix).counter(FLEET, "circuits")
        self._most = most

    @property
    def available(self) -> bool:
        return self._link.available

    async def exchange(
        self, opened: Mapping[PlaceName, float], closed: Collection[PlaceName]
    ) -> Mapping[PlaceName, float]:
        arguments: list[str | int] = [len(opened)]
        for name, seconds in opened.items():
            arguments += [_member(name), round(seconds * 1000)]
        arguments += [*map(_member, closed), self._most]
        found = await self._link.run(_EXCHANGE, [self._key], arguments)
        return {_name(found[n]): int(found[n + 1]) / 1000 for n in range(0, len(found), 2)}


def _member(name: PlaceName) -> str:
    return "|".join(quote(part, safe="") for part in name)


def _name(member: bytes) -> PlaceName:
    upstream, _, model = member.decode().partition("|")
    return unquote(upstream), unquote(model)
