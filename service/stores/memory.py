"""Conversations in the process's memory: for one process, for a newcomer and for tests."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from service.domain import Conversation, Principal, Turn


class MemoryConversations:
    """Conversations until `ttl_seconds` after their last turn; the longest unused go first above `most`.

    Of each the latest `keep_messages` are held; its totals go on counting.
    """

    def __init__(
        self,
        *,
        ttl_seconds: float,
        most: int,
        keep_messages: int = 200,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ttl = ttl_seconds
        self._most = most
        self._keep_messages = keep_messages
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str, str], Conversation] = OrderedDict()
        """By tenant, name of the API key, and id."""

    def __len__(self) -> int:
        return len(self._kept)

    async def load(self, principal: Principal, conversation_id: str) -> Conversation | None:
        self._forget_expired()
        return self._kept.get(_place(principal, conversation_id))

    async def append(
        self,
        principal: Principal,
        conversation_id: str,
        turn: Turn,
        system_prompt: str | None,
        *,
        begin: bool,
    ) -> bool:
        self._forget_expired()
        now = self._clock()
        place = _place(principal, conversation_id)
        if not begin and place not in self._kept:
            return False
        known = self._kept.get(place) or Conversation(conversation_id, principal, created_at=now)
        self._kept[place] = msgspec.structs.replace(
            known,
            system_prompt=known.system_prompt if system_prompt is None else system_prompt,
            messages=(*known.messages, *turn.messages)[-self._keep_messages :],
            total_messages=known.total_messages + len(turn.messages),
            total_tokens=known.total_tokens + turn.tokens,
            total_cost_usd=known.total_cost_usd + (turn.cost_usd or 0.0),
            unpriced_turns=known.unpriced_turns + (turn.cost_usd is None),
            updated_at=now,
        )
        self._kept.move_to_end(place)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return True

    async def list(self, principal: Principal, limit: int) -> Sequence[Conversation]:
        self._forget_expired()
        owner = _place(principal, "")[:2]
        owned = [c for place, c in reversed(self._kept.items()) if place[:2] == owner]
        return [msgspec.structs.replace(c, messages=()) for c in owned[:limit]]

    async def delete(self, principal: Principal, conversation_id: str) -> bool:
        self._forget_expired()
        return self._kept.pop(_place(principal, conversation_id), None) is not None

    async def of_tenant(self, tenant: str) -> AsyncGenerator[Conversation]:
        self._forget_expired()
        for place in sorted(place for place in self._kept if place[0] == tenant):
            if (found := self._kept.get(place)) is not None:  # it may go meanwhile
                yield found

    async def erase(self, tenant: str) -> int:
        self._forget_expired()
        places = [place for place in self._kept if place[0] == tenant]
        for place in places:
            del self._kept[place]
        return len(places)

    def _forget_expired(self) -> None:
        oldest = self._clock() - self._ttl
        while self._kept:
            place, conversation = next(iter(self._kept.items()))
            if conversation.updated_at >= oldest:
                return
            del self._kept[place]


def _place(owner: Principal, conversation_id: str) -> tuple[str, str, str]:
    """Without the owner's rights: they may change, and the conversation stays."""
    return owner.tenant, owner.name, conversation_id
