"""One model at one upstream, with what calls there have shown; and the choice among several such places."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import ceil, exp
from typing import Final, Literal

from service.ports import Target
from service.routing.breaker import Breaker

Strategy = Literal["ordered", "weighted", "least_busy", "fastest"]
DECAY_SECONDS: Final = 10.0
"""How fast the memory of a latency fades: after so long two thirds of it are new."""
KEPT_LATENCIES: Final = 100
HEDGE_LEAST_LATENCIES: Final = 20
"""Below so many nobody knows what is late."""
HEDGE_LEAST_SECONDS: Final = 0.05


class Peer:
    """An upstream as this process uses it: its calls that run, and how many may."""

    __slots__ = ("most", "name", "region", "running")

    def __init__(self, name: str, *, most: int | None = None, region: str | None = None) -> None:
        self.name = name
        self.most = most
        self.region = region
        self.running = 0

    @property
    def full(self) -> bool:
        return self.most is not None and self.running >= self.most


class Condition:
    """How one model at one upstream fares; the same for all names under which it is served."""

    __slots__ = ("_clock", "_latency", "_recent", "_seen_at", "breaker", "peer", "running")

    def __init__(self, peer: Peer, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self.peer = peer
        self.breaker = breaker
        self.running = 0
        self._clock = clock
        self._latency = 0.0
        self._seen_at = 0.0
        self._recent: deque[float] = deque(maxlen=KEPT_LATENCIES)

    @property
    def latency_seconds(self) -> float:
        """To the first event of a stream or the whole answer, a mean that fades; 0 until one was seen.

        It fades without calls, too: else one slow answer would keep all others from a place for ever.
        """
        return self._latency * exp((self._seen_at - self._clock()) / DECAY_SECONDS)

    @property
    def late_seconds(self) -> float | None:
        """The time in which 95 of 100 of the latest answers came; None where too few are known."""
        count = len(self._recent)
        if count < HEDGE_LEAST_LATENCIES:
            return None
        return max(sorted(self._recent)[ceil(count * 0.95) - 1], HEDGE_LEAST_SECONDS)

    def begin(self) -> int:
        """A call is sent. The ticket that its breaker gives it."""
        self.running += 1
        self.peer.running += 1
        return self.breaker.begin()

    def end(self) -> None:
        self.running -= 1
        self.peer.running -= 1

    def answered(self, seconds: float) -> None:
        """An answer began after so long. A slow one counts at once, a quick one little by little."""
        now = self._clock()
        if seconds >= self._latency:
            self._latency = seconds
        else:
            old = exp((self._seen_at - now) / DECAY_SECONDS)
            self._latency = self._latency * old + seconds * (1 - old)
        self._seen_at = now
        self._recent.append(seconds)

    def given_up(self, seconds: float) -> None:
        """A call was given up for a quicker one: that its answer takes longer is known all the same."""
        self._recent.append(seconds)


class Place:
    """A target as one of those that serve a model."""

    __slots__ = ("condition", "target", "weight")

    def __init__(self, target: Target, condition: Condition, weight: float = 1.0) -> None:
        self.target = target
        self.condition = condition
        self.weight = weight

    @property
    def admits(self) -> bool:
        return self.condition.breaker.admits and not self.condition.peer.full

    @property
    def load(self) -> float:
        """What one more call would meet: the latency here times those who run, it included."""
        return self.condition.latency_seconds * (self.condition.running + 1) / self.weight


def choose(
    places: Sequence[Place],
    strategy: Strategy,
    *,
    session: str = "",
    region: str | None = None,
    avoid: Sequence[Place] = (),
) -> Place | None:
    """The place for the next attempt: one that may be asked and was not tried; None if there is none.

    Those of `region` go before all others. With a `session`, its calls go to one and the same place as
    long as that is well, whatever the strategy: its prompt cache is there.
    """
    if len(places) == 1:  # nearly always
        return places[0] if not avoid and places[0].admits else None
    open_to = [place for place in places if place not in avoid and place.admits]
    near = [place for place in open_to if place.condition.peer.region == region] if region else []
    open_to = near or open_to
    if len(open_to) < 2:
        return open_to[0] if open_to else None
    if session:
        return max(open_to, key=lambda place: _affinity(session, place) ** (1 / place.weight))
    if strategy == "weighted":
        return random.choices(open_to, [place.weight for place in open_to])[0]
    if strategy == "least_busy":
        return min(open_to, key=lambda place: place.condition.running / place.weight)
    if strategy == "fastest":
        return min(random.sample(open_to, 2), key=lambda place: place.load)
    return open_to[0]


def _affinity(session: str, place: Place) -> float:
    """A number from 0 to 1 for each pair. The highest wins, so a place that goes takes no other sessions."""
    name = f"{session}\n{place.condition.peer.name}\n{place.target.model}".encode()
    return (int.from_bytes(blake2b(name, digest_size=7).digest()) + 1) / (2**56 + 1)
