"""Conversations on Redis. Raises StateUnavailable when there is no answer; `fleet.py` says what then."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from service.domain import Conversation, Message, Principal, Turn
from service.stores.redis import scripts
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link

MOST_TOGETHER: Final = 50
"""Conversations that one call exports or erases,"""
MOST_BYTES: Final = 256 * 1024
"""and bytes of messages after which it reads no further one: others wait for no more than that."""

_encode: Final = msgspec.json.encode
_decode_message: Final = msgspec.json.Decoder(Message).decode


class RedisConversations:
    """Conversations for `ttl_seconds`, at most `most` of a principal, of each the latest `keep_messages`."""

    def __init__(self, link: Link, *, ttl_seconds: float, most: int, keep_messages: int = 200) -> None:
        self._link = link
        self._keys = Keys(link.prefix)
        self._ttl_ms = round(ttl_seconds * 1000)
        self._most = most
        self._keep_messages = keep_messages

    def key(self, principal: Principal, conversation_id: str) -> str:
        """What a conversation is called in Redis."""
        return self._keys.conversation(principal, conversation_id)

    async def load(self, principal: Principal, conversation_id: str) -> Conversation | None:
        keys = self._keys
        places = [keys.conversation(principal, conversation_id), keys.messages(principal, conversation_id)]
        found = await self._link.run(scripts.LOAD, places, [self._keep_messages])
        return _conversation(principal, conversation_id, *found) if found else None

    async def append(
        self,
        principal: Principal,
        conversation_id: str,
        turn: Turn,
        system_prompt: str | None,
        *,
        begin: bool,
    ) -> bool:
        places, arguments = self.appending(principal, conversation_id, turn, system_prompt, begin=begin)
        return bool(await self._link.run(scripts.APPEND, places, arguments))

    def appending(
        self,
        principal: Principal,
        conversation_id: str,
        turn: Turn,
        system_prompt: str | None,
        *,
        begin: bool,
    ) -> tuple[list[str], list[str | bytes | int | float]]:
        """Keys and arguments of the script that appends, to run now or later."""
        keys = self._keys
        places = [
            keys.conversation(principal, conversation_id),
            keys.messages(principal, conversation_id),
            keys.conversations(principal),
            keys.turn(principal, turn.id),
            keys.owners(principal.tenant),
        ]
        cost = "" if turn.cost_usd is None else repr(turn.cost_usd)
        about: list[str | bytes | int | float] = [
            conversation_id,
            int(begin),
            self._keep_messages,
            self._ttl_ms,
        ]
        about += [self._most, turn.tokens, cost, system_prompt or ""]
        return places, [*about, *map(_encode, turn.messages)]

    async def list(self, principal: Principal, limit: int) -> Sequence[Conversation]:
        keys = self._keys
        places = [keys.conversations(principal), keys.conversation(principal, "")]
        rows = await self._link.run(scripts.LIST, places, [limit, self._ttl_ms])
        return [_conversation(principal, name.decode(), fields, ()) for name, fields in rows]

    async def delete(self, principal: Principal, conversation_id: str) -> bool:
        keys = self._keys
        places = [
            keys.conversation(principal, conversation_id),
            keys.messages(principal, conversation_id),
            keys.conversations(principal),
        ]
        return bool(await self._link.run(scripts.DELETE, places, [conversation_id]))

    async def of_tenant(self, tenant: str) -> AsyncGenerator[Conversation]:
        keys = self._keys
        for owner in await self._owners(tenant):
            ids = [
                name.decode() for name in await self._link.run(scripts.IDS, [keys.conversations(owner)], [])
            ]
            while ids:
                asked = ids[:MOST_TOGETHER]
                places = [key(owner, name) for name in asked for key in (keys.conversation, keys.messages)]
                read = await self._link.run(scripts.LOAD_SOME, places, [self._keep_messages, MOST_BYTES])
                ids = ids[len(read) :]
                for name, found in zip(asked, read, strict=False):
                    if found:
                        yield _conversation(owner, name, *found)

    async def erase(self, tenant: str) -> int:
        keys, erased = self._keys, 0
        for owner in await self._owners(tenant):
            places = [keys.conversations(owner), keys.conversation(owner, ""), keys.messages(owner, "")]
            left = 1
            while left:
                gone, left = await self._link.run(
                    scripts.ERASE, [*places, keys.owners(tenant)], [MOST_TOGETHER]
                )
                erased += gone
        return erased

    async def _owners(self, tenant: str) -> Sequence[Principal]:
        names = await self._link.run(scripts.MEMBERS, [self._keys.owners(tenant)], [])
        return [Principal(unquote(name.decode()), tenant) for name in sorted(names)]


def _conversation(
    owner: Principal, conversation_id: str, fields: Sequence[bytes], messages: Sequence[bytes]
) -> Conversation:
    known: dict[bytes, Any] = dict(zip(fields[::2], fields[1::2], strict=True))
    system = known.get(b"system")
    return Conversation(
        conversation_id,
        owner,
        system_prompt=system.decode() if system is not None else None,
        messages=tuple(map(_decode_message, messages)),
        total_messages=int(known.get(b"messages", 0)),
        total_tokens=int(known.get(b"tokens", 0)),
        total_cost_usd=float(known.get(b"usd", 0)),
        unpriced_turns=int(known.get(b"unpriced", 0)),
        created_at=int(known[b"created"]) / 1000,
        updated_at=int(known[b"updated"]) / 1000,
    )
