"""How often, and after which pause, a call is made again: an outage must not be amplified.

Source of the budget: the token bucket of retry budgets; of the pauses: exponential backoff with full jitter.
"""

from __future__ import annotations

import random
from typing import Final

from service.errors import UpstreamError

BACKOFF_SECONDS: Final = 0.5
BACKOFF_MOST_SECONDS: Final = 8.0
RETRY_AFTER_MOST_SECONDS: Final = 10.0
"""An upstream that asks for a longer pause gets it from the caller, who is told so."""
SHARE: Final = 0.09
"""Repeats for each first attempt: with what is saved below, a tenth more at most from 1,000 of them on."""
SAVED: Final = 10.0
"""Repeats that may come at once after a time without any: for those who ask seldom."""


class RetryBudget:
    """Each call puts a share of a repeat in, each repeat takes a whole one out."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = SAVED

    def called(self) -> None:
        """A call was made for the first time."""
        self._left = min(self._left + SHARE, SAVED)

    def take(self) -> bool:
        """Whether a call may be made once more; if so, that is counted."""
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def give_back(self) -> None:
        """What was taken was not made after all."""
        self._left = min(self._left + 1, SAVED)


def pause(attempt: int, error: UpstreamError) -> float:
    """Seconds before the next attempt: what the upstream asks for, else growing, with full jitter."""
    if error.retry_after_seconds is not None:
        return error.retry_after_seconds
    return random.uniform(0, min(BACKOFF_SECONDS * 2 ** (attempt - 1), BACKOFF_MOST_SECONDS))
