"""A model as its callers know it: the places that serve it, and which model stands in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from service.domain import Principal
from service.errors import (
    RequestDeadline,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnavailable,
)
from service.ports import Target
from service.refusals import Failure, asked_too_much
from service.routing.breaker import Cause, Circuit
from service.routing.places import Place, Strategy, choose


class Route:
    """One model. `places` in the order of the configuration; `stand_ins` by what went wrong."""

    def __init__(
        self,
        name: str,
        places: Sequence[Place],
        *,
        strategy: Strategy = "ordered",
        sticky: bool = False,
        hedge: bool = False,
        region: str | None = None,
        stand_ins: Mapping[Failure, Sequence[str]] | None = None,
    ) -> None:
        self.name = name
        self.places = tuple(places)
        self.strategy = strategy
        self.sticky = sticky
        self.hedge = hedge and len(self.places) > 1
        self.stand_ins = stand_ins or {}
        self._region = region

    @property
    def first(self) -> Target:
        """What is told of the model where no place is chosen yet: all serve the same one."""
        return self.places[0].target

    def choose(self, session: str, avoid: Sequence[Place]) -> Place | None:
        kept = session if self.sticky else ""
        return choose(self.places, self.strategy, session=kept, region=self._region, avoid=avoid)

    def admits_in(self, seconds: float) -> bool:
        """Whether any of its places may be asked in so many seconds, as far as is known now."""
        return any(p.condition.breaker.admits_in(seconds) and not p.condition.peer.full for p in self.places)

    def closed(self) -> UpstreamError:
        """What a caller is told when no place may be asked just now."""
        seconds = min(place.condition.breaker.open_seconds for place in self.places)
        breakers = [place.condition.breaker for place in self.places]
        if all(b.state is not Circuit.CLOSED and b.cause is Cause.ASKED for b in breakers):
            return UpstreamRateLimited(
                "The model's provider limits the rate of requests.", retry_after_seconds=max(seconds, 1.0)
            )
        full = any(place.condition.peer.full for place in self.places)
        reason = "they have as many calls as they may" if full else "calls there failed of late"
        return UpstreamUnavailable(
            f"No upstream of this model is asked just now, because {reason}.",
            retry_after_seconds=max(seconds, 1.0),
        )


class Catalogue(Protocol):
    """Which models there are and where each is served."""

    def resolve(self, model: str) -> Route:
        """The route for a model or alias. Raises ModelNotFound."""
        ...

    def check(self, principal: Principal, model: str) -> None:
        """Raises ModelNotFound for a model that the principal may not use."""
        ...

    async def models(self, principal: Principal) -> Sequence[dict[str, Any]]:
        """All that a caller may name, as OpenAI's model objects."""
        ...


def failure_of(error: UpstreamError) -> Failure | None:
    """What kind of failure it is; None where no other model would do better."""
    if isinstance(error, UpstreamRateLimited):
        return Failure.RATE_LIMIT
    if isinstance(error, UpstreamRejected):
        known = asked_too_much(error.body()["error"])
        # A request that may go through later is not what is wrong.
        return Failure.UNAVAILABLE if known is None and error.retry else known
    return None if isinstance(error, RequestDeadline) else Failure.UNAVAILABLE
