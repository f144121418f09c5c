"""Several API keys of one upstream, taken in turn; one that is limited or refused rests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

REFUSED_SECONDS: Final = 300.0
"""A key that the provider does not know is tried again after so long: it may have been given rights."""
LEAST_SECONDS: Final = 1.0
"""However soon it may come again: within one request no key is tried twice at once."""
LIMITED_SECONDS: Final = 5.0
"""The same for one that is limited, where the provider names no time."""


class KeyPool:
    """Hands out one key after the other; all of them when all rest, for then a try is all that is left."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = tuple(dict.fromkeys(keys))
        self._rests_until = [0.0] * len(self._keys)
        self._next = 0
        self._clock = clock

    def __len__(self) -> int:
        return len(self._keys)

    def take(self) -> str | None:
        """The next key that does not rest, else the one whose rest is over first; None if there are none."""
        if not self._keys:
            return None
        count, now = len(self._keys), self._clock()
        for step in range(count):
            at = (self._next + step) % count
            if self._rests_until[at] <= now:
                self._next = at + 1
                return self._keys[at]
        return self._keys[min(range(count), key=self._rests_until.__getitem__)]

    def rest(self, key: str | None, seconds: float) -> bool:
        """Let a key rest. Whether another one is ready, so that the call may be made again at once."""
        if key is None or len(self._keys) < 2:
            return False
        now = self._clock()
        at = self._keys.index(key)
        self._rests_until[at] = max(self._rests_until[at], now + max(seconds, LEAST_SECONDS))
        return any(until <= now for until in self._rests_until)
