"""All stores in the process's memory: for one process, for a newcomer and for tests. Each is bounded."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import msgspec

from service.domain import Conversation, Principal, RequestRecord, Turn
from service.errors import RateLimited


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
        self._kept: OrderedDict[tuple[Principal, str], Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    async def load(self, principal: Principal, conversation_id: str) -> Conversation | None:
        self._forget_expired()
        return self._kept.get((principal, conversation_id))

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
        place = (principal, conversation_id)
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
        owned = [c for (owner, _), c in reversed(self._kept.items()) if owner == principal]
        return owned[:limit]

    async def delete(self, principal: Principal, conversation_id: str) -> bool:
        self._forget_expired()
        return self._kept.pop((principal, conversation_id), None) is not None

    def _forget_expired(self) -> None:
        oldest = self._clock() - self._ttl
        while self._kept:
            place, conversation = next(iter(self._kept.items()))
            if conversation.updated_at >= oldest:
                return
            del self._kept[place]


class MemoryLimiter:
    """`requests` of each principal per `window_seconds`, spread evenly (GCRA).

    A principal may use its whole share at once; it gets back one request every window/requests
    seconds. So a window that begins with a whole share may hold almost two of them, and no stretch of
    time more than one share and what came back in it. With `requests` None nothing is limited.
    """

    def __init__(
        self,
        requests: int | None,
        window_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = window_seconds / requests if requests else 0.0
        self._burst = window_seconds - self._interval
        self._clock = clock
        self._due: dict[Principal, float] = {}
        """For each principal: when it would have used up nothing."""

    async def admit(self, principal: Principal) -> None:
        if not self._interval:
            return
        now = self._clock()
        due = max(self._due.get(principal, now), now)
        wait = due - now - self._burst
        # A hair of tolerance: the sum of the intervals is not exactly the window.
        if wait > self._interval * 1e-6:
            raise RateLimited(
                "You sent too many requests; wait and send this one again.", retry_after_seconds=wait
            )
        self._due[principal] = due + self._interval


class MemoryLedger:
    """The latest `most` records; older ones are dropped, but stay in the metrics and the log."""

    def __init__(self, most: int = 10_000) -> None:
        self.records: deque[RequestRecord] = deque(maxlen=most)

    async def enter(self, record: RequestRecord) -> None:
        self.records.append(record)
