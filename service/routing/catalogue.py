"""The models of the configuration as routes, and what is remembered of each place."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

from service.config import Configuration, FallbackConfig, ModelConfig, PlaceConfig
from service.domain import Price, Principal
from service.errors import ModelNotFound, WeirError
from service.ports import Target, Upstream
from service.refusals import Failure
from service.routing.breaker import Breaker, Circuit
from service.routing.places import Condition, Peer, Place
from service.routing.routes import Route

LIST_SECONDS: Final = 3.0
"""For an upstream's list of models, where there are other models to show."""
MOST_MADE_UP: Final = 1_000
"""Names of models come from callers where a pattern or no model at all is configured."""
_CLEAN_NAME: Final = re.compile(r"[\x21-\x7e]{1,200}")

Lister = Callable[[str], Awaitable[Sequence[dict[str, Any]]]]
OnChange = Callable[[str, str, Circuit], None]
OnForget = Callable[[str, str], None]


class Conditions:
    """How all places fare: it outlives the configuration, so that a reload forgets no open circuit."""

    def __init__(
        self,
        on_change: OnChange = lambda _upstream, _model, _state: None,
        on_forget: OnForget = lambda _upstream, _model: None,
    ) -> None:
        self.on_change = on_change
        """Hears the upstream, the model there and the new state of each circuit that changes."""
        self._on_forget = on_forget
        self._peers: dict[str, Peer] = {}
        self._configured: dict[tuple[str, str], Condition] = {}
        self._made_up: OrderedDict[tuple[str, str], Condition] = OrderedDict()
        self.most_made_up = MOST_MADE_UP

    def peer(self, name: str, *, most: int | None, region: str | None) -> Peer:
        peer = self._peers.setdefault(name, Peer(name))
        peer.most, peer.region = most, region
        return peer

    def of(self, peer: Peer, model: str, *, made_up: bool = False) -> Condition:
        """The one of a model at an upstream. Of names that callers have made up the oldest are forgotten."""
        key = (peer.name, model)
        known = self._configured.get(key)
        if known is not None:
            return known
        known = self._made_up.pop(key, None)
        if known is None:
            breaker = Breaker(on_change=lambda state: self.on_change(*key, state))
            known = Condition(peer, breaker)
        if not made_up:
            self._configured[key] = known
            return known
        self._made_up[key] = known
        self._forget_oldest()
        return known

    def _forget_oldest(self) -> None:
        while len(self._made_up) > self.most_made_up:
            self._retire(*self._made_up.popitem(last=False))

    def used(self, places: Sequence[Place]) -> None:
        """A call goes to one of them: of names that callers have made up these are the youngest again."""
        for place in places:
            key = (place.condition.peer.name, place.target.model)
            if key in self._made_up:
                self._made_up.move_to_end(key)

    def find(self, upstream: str, model: str) -> Condition | None:
        """None where no call has gone to that place, nor may by the configuration's own names."""
        key = (upstream, model)
        return self._configured.get(key) or self._made_up.get(key)

    @contextmanager
    def forgetting(self, upstreams: Collection[str]) -> Iterator[None]:
        """These are others now, or gone: what calls to the old ones show says nothing of the new.

        What is made of the new ones is made inside; if that fails, nothing was forgotten.
        """
        before = self._configured, self._made_up
        self._configured = {k: c for k, c in before[0].items() if k[0] not in upstreams}
        self._made_up = OrderedDict((k, c) for k, c in before[1].items() if k[0] not in upstreams)
        try:
            yield
        except BaseException:
            self._configured, self._made_up = before
            raise
        for known in before:
            for key, condition in known.items():
                if key[0] in upstreams:
                    self._retire(key, condition)

    def keep(self, named: Collection[tuple[str, str]], may_be: Callable[[str, str], bool]) -> None:
        """Forget the places that are neither named by the configuration of now nor may be made up by it."""
        for key, condition in self.items():
            if key in named:
                continue
            made_up = self._configured.pop(key, None) is None
            if not may_be(*key):
                self._made_up.pop(key, None)
                self._retire(key, condition)
            elif not made_up:
                self._made_up[key] = condition
        self._forget_oldest()

    def _retire(self, key: tuple[str, str], condition: Condition) -> None:
        """Nobody asks for it any more: who heard that its circuit is open hears that it is not."""
        condition.breaker.close()
        condition.breaker.mute()
        if self.find(*key) is None:
            self._on_forget(*key)

    def items(self) -> Sequence[tuple[tuple[str, str], Condition]]:
        """Upstream and model there, and how they fare."""
        return (*self._configured.items(), *self._made_up.items())


class ModelCatalogue:
    """The models of the YAML; without any there, every name goes to the first upstream."""

    def __init__(
        self,
        configuration: Configuration,
        upstreams: Mapping[str, Upstream],
        conditions: Conditions | None = None,
        keep: Callable[[Lister], Lister] = lambda ask: ask,
    ) -> None:
        """`keep` makes of a function that asks an upstream for its list one that asks less often."""
        self._list = keep(self._ask)
        self._upstreams = upstreams
        self._conditions = conditions or Conditions()
        self._configs = {u.name: u for u in configuration.upstreams}
        self._region = configuration.settings.region
        self._peers = {
            u.name: self._conditions.peer(u.name, most=u.max_concurrent, region=u.region)
            for u in configuration.upstreams
        }
        self._routes = {
            name: self._route(model, model.name, made_up=False)
            for model in configuration.file.models
            if "*" not in model.name
            for name in (model.name, *model.aliases)
        }
        self._patterns = [model for model in configuration.file.models if "*" in model.name]
        # So many that no route which is still known loses the memory of how its places fare.
        most_places = max((len(pattern.places) for pattern in self._patterns), default=1)
        self._conditions.most_made_up = MOST_MADE_UP * most_places
        self._first = next(iter(upstreams))
        self._made_up: OrderedDict[str, Route] = OrderedDict()

    def resolve(self, model: str) -> Route:
        """Raises ModelNotFound. Other than the file's own, names are kept as long as they are in use."""
        route = self._routes.get(model)
        if route is not None:
            return route
        route = self._made_up.get(model)
        if route is not None:
            self._made_up.move_to_end(model)
            self._conditions.used(route.places)
            return route
        if not _CLEAN_NAME.fullmatch(model):
            raise ModelNotFound("The model's name holds letters that no model has.", param="model")
        found = next((p for p in self._patterns if matches((p.name,), model)), None)
        if found is None and (self._routes or self._patterns):
            raise _unknown(model)
        self._made_up[model] = route = self._route(found or self._any(model), model, made_up=True)
        if len(self._made_up) > MOST_MADE_UP:
            self._made_up.popitem(last=False)
        return route

    def forget_others(self) -> None:
        """How places fare that this configuration does not have: they are of one before it."""
        named = {
            (place.condition.peer.name, place.target.model)
            for route in self._routes.values()
            for place in route.places
        } | {
            (p.upstream, p.model) for pattern in self._patterns for p in pattern.places if p.model is not None
        }
        self._conditions.keep(named, self._may_make_up)

    def _may_make_up(self, upstream: str, model: str) -> bool:
        """Whether a name that a caller makes up may go to that model there."""
        if not self._routes and not self._patterns:
            return upstream == self._first
        return any(
            place.upstream == upstream and place.model is None and matches((pattern.name,), model)
            for pattern in self._patterns
            for place in pattern.places
        )

    def check(self, principal: Principal, model: str) -> None:
        """Raises ModelNotFound for a model that the principal's key may not use: to it there is none."""
        if principal.models and not matches(principal.models, model):
            raise _unknown(model)

    async def models(self, principal: Principal) -> Sequence[dict[str, Any]]:
        """What the principal may use. For patterns the upstreams are asked; one that is silent lists none."""
        if not self._routes and not self._patterns:
            return self._seen_by(principal, await self._list(self._first))
        listed = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": self._owner(route.first.upstream),
            }
            for name, route in self._routes.items()
        ]
        found = await asyncio.gather(*map(self._list_in_time, self._patterns))
        for pattern, there in zip(self._patterns, found, strict=True):
            known = {model["id"] for model in listed}
            listed += [m for m in there if matches((pattern.name,), m["id"]) and m["id"] not in known]
        return self._seen_by(principal, listed)

    async def _list_in_time(self, pattern: ModelConfig) -> Sequence[dict[str, Any]]:
        """The list of the first of the pattern's upstreams that gives one."""
        for place in pattern.places:
            try:
                async with asyncio.timeout(LIST_SECONDS):
                    return await self._list(place.upstream)
            except (WeirError, TimeoutError):
                continue
        return ()

    async def _ask(self, upstream: str) -> Sequence[dict[str, Any]]:
        """The models that an upstream lists."""
        return await self._upstreams[upstream].models()

    def _owner(self, upstream: Upstream) -> str:
        """Its provider. Of one that nobody knows that is its host, which callers have no business to see."""
        config = self._configs[upstream.name]
        host = urlsplit(config.base_url or "").hostname
        return config.name if upstream.provider in ("", host, "unknown") else upstream.provider

    def _seen_by(self, principal: Principal, models: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        if not principal.models:
            return models
        return [m for m in models if matches(principal.models, m["id"])]

    def _route(self, model: ModelConfig, name: str, *, made_up: bool) -> Route:
        return Route(
            name,
            [self._place(place, model, name, made_up=made_up) for place in model.places],
            strategy=model.strategy,
            sticky=model.sticky,
            hedge=model.hedge,
            region=self._region,
            stand_ins=_stand_ins(model.fallbacks),
        )

    def _any(self, name: str) -> ModelConfig:
        return ModelConfig(name=name, upstream=self._first)

    def _place(self, place: PlaceConfig, model: ModelConfig, name: str, *, made_up: bool) -> Place:
        config = self._configs[place.upstream]
        price = place.price or model.price
        target = Target(
            self._upstreams[place.upstream],
            place.model or name,
            stream_usage=config.stream_usage,
            name=name,
            max_output_tokens=model.max_output_tokens,
            cache_ttl_seconds=model.cache_ttl,
            price=Price(**price.model_dump()) if price is not None else None,
            context_tokens=model.context_tokens,
            first_byte_seconds=config.first_byte_timeout,
            idle_seconds=config.idle_timeout,
        )
        # One that the file names itself is known for ever, whichever names callers make up.
        made_up = made_up and place.model is None
        condition = self._conditions.of(self._peers[place.upstream], target.model, made_up=made_up)
        return Place(target, condition, place.weight)


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether one of the patterns is the name; `*` stands for any letters, and all else for itself."""
    return _compiled(patterns).fullmatch(name) is not None


@lru_cache(maxsize=1_000)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(p).replace(r"\*", ".*") for p in patterns), re.DOTALL)


def _stand_ins(fallbacks: FallbackConfig) -> dict[Failure, Sequence[str]]:
    given = {
        Failure.CONTEXT_LENGTH: fallbacks.context_length,
        Failure.CONTENT_FILTER: fallbacks.content_filter,
        Failure.RATE_LIMIT: fallbacks.rate_limit,
        Failure.UNAVAILABLE: fallbacks.unavailable,
    }
    return {failure: names for failure, names in given.items() if names}


def _unknown(model: str) -> ModelNotFound:
    clean = model if _CLEAN_NAME.fullmatch(model) else model.encode("unicode_escape").decode()[:200]
    return ModelNotFound(f"The model `{clean}` is not served here.", param="model")
