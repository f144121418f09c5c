"""What requests are served by: one configuration made ready, which a request keeps from beginning to end.

A reload puts another `Snapshot` into the place of the one that is there. Clients of upstreams that are made
of the same parts are in both. One that no snapshot in use has any more is closed: the last request of an old
snapshot takes with it what only that one had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec
import structlog

from service.auth import KeyRing, OpenDoor
from service.caching.answers import AnswerCache
from service.caching.lookups import cached
from service.chat import ChatService
from service.config import Configuration
from service.dialogue import Defaults, Dialogue
from service.domain import Price
from service.ports import Accounts, Authenticator, Cache, Conversations, PriceBook, Upstream
from service.pricing import PriceTable
from service.routing.catalogue import Conditions, ModelCatalogue
from service.rules import Rulebook
from service.upstreams.making import make_upstream, parts_of

MODELS_SECONDS: Final = 30.0

log = structlog.get_logger("weir")


class Client:
    """An upstream's client, and what it is made of: an API key too, so it is never shown."""

    __slots__ = ("parts", "snapshots", "upstream")

    def __init__(self, upstream: Upstream, parts: tuple[Any, ...]) -> None:
        self.upstream = upstream
        self.parts = parts
        self.snapshots = 0
        """Of those that are in use."""


class Snapshot:
    """One configuration. Requests `enter` it before all else, and `leave` it at their end."""

    __slots__ = (
        "_running",
        "_when_unused",
        "authenticator",
        "clients",
        "configuration",
        "dialogue",
        "service",
    )

    def __init__(
        self,
        configuration: Configuration,
        *,
        service: ChatService,
        dialogue: Dialogue,
        authenticator: Authenticator,
        clients: Mapping[str, Client],
    ) -> None:
        self.configuration = configuration
        self.service = service
        self.dialogue = dialogue
        self.authenticator = authenticator
        self.clients = clients
        self._running = 0
        self._when_unused: Callable[[Snapshot], None] | None = None

    def enter(self) -> None:
        self._running += 1

    def leave(self) -> None:
        self._running -= 1
        if not self._running and self._when_unused is not None:
            self._when_unused(self)

    def retire(self, when_unused: Callable[[Snapshot], None]) -> None:
        """No request enters any more; `when_unused` is called when the last one has left."""
        self._when_unused = when_unused
        if not self._running:
            when_unused(self)


class RuledAccounts(Accounts, Protocol):
    """Accounts whose rules a reload changes."""

    def under(self, rules: Rulebook) -> Accounts:
        """The same counters and the same book under other rules. Either settles what the other reserved."""
        ...


class Shared(msgspec.Struct):
    """What a reload leaves as it is."""

    conversations: Conversations
    accounts: RuledAccounts
    conditions: Conditions
    answers: AnswerCache
    cache: Cache


def make_catalogue(
    configuration: Configuration,
    upstreams: Mapping[str, Upstream],
    conditions: Conditions,
    cache: Cache,
) -> ModelCatalogue:
    """The models of a configuration; the upstreams' own lists are asked for once in `MODELS_SECONDS`."""
    keep = cached(cache, f"models:{configuration.version}", MODELS_SECONDS)
    return ModelCatalogue(configuration, upstreams, conditions, keep)


class Serving:
    """The snapshot of now: `now` is read once by each request."""

    def __init__(self, first: Snapshot, shared: Shared) -> None:
        self.now = first
        self._shared = shared
        self._closing: set[asyncio.Task[None]] = set()
        self._open: set[Client] = set()
        self._hold(first)

    async def reload(self, configuration: Configuration) -> None:
        """Serve by another configuration. Raises ConfigurationError, and then nothing has changed."""
        before = self.now
        # In a thread: loading the SDK and certificates takes as long as many requests.
        clients = await asyncio.to_thread(_clients, configuration, before.clients)
        others = [name for name, client in before.clients.items() if clients.get(name) is not client]
        shared = self._shared
        prices, keys = price_table(configuration), authenticator(configuration)
        accounts = shared.accounts.under(rulebook(configuration))
        # After all that may fail: a catalogue tells the upstreams that stay what is new of them.
        with shared.conditions.forgetting(others):
            upstreams = {name: client.upstream for name, client in clients.items()}
            catalogue = make_catalogue(configuration, upstreams, shared.conditions, shared.cache)
            service = before.service.under(
                catalogue=catalogue,
                prices=prices,
                accounts=accounts,
                cache=shared.answers if wants_cache(configuration) else None,
            )
            snapshot = Snapshot(
                configuration,
                service=service,
                dialogue=make_dialogue(configuration, shared.conversations, service),
                authenticator=keys,
                clients=clients,
            )
        self._swap(snapshot)
        catalogue.forget_others()

    async def close(self) -> None:
        """Close all clients, once no request runs."""
        while self._open:
            self._close(self._open.pop())
        while self._closing:
            await asyncio.wait(self._closing)

    def _swap(self, snapshot: Snapshot) -> None:
        before, self.now = self.now, snapshot
        self._hold(snapshot)  # first: what both have must not be without any for a moment
        before.retire(self._let_go)

    def _hold(self, snapshot: Snapshot) -> None:
        for client in snapshot.clients.values():
            client.snapshots += 1
            self._open.add(client)

    def _let_go(self, snapshot: Snapshot) -> None:
        for client in snapshot.clients.values():
            client.snapshots -= 1
            if not client.snapshots and client in self._open:
                self._open.discard(client)
                self._close(client)

    def _close(self, client: Client) -> None:
        closing = asyncio.get_running_loop().create_task(client.upstream.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closed)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled() and (error := closing.exception()) is not None:
            log.warning("upstream_not_closed", reason=type(error).__name__)


def make_dialogue(
    configuration: Configuration, conversations: Conversations, service: ChatService
) -> Dialogue:
    settings = configuration.settings
    return Dialogue(
        conversations=conversations,
        catalogue=service.catalogue,
        prices=service.prices,
        defaults=Defaults(
            model=configuration.default_model,
            max_tokens=settings.openai_max_tokens,
            temperature=settings.openai_temperature,
            history_messages=settings.conversation_messages,
        ),
    )


def rulebook(configuration: Configuration) -> Rulebook:
    settings, file = configuration.settings, configuration.file
    return Rulebook(
        file.limits,
        file.budgets,
        requests=settings.rate_limit_requests,
        window_seconds=settings.rate_limit_window,
    )


def price_table(configuration: Configuration) -> PriceBook:
    named = [(name, model) for model in configuration.file.models for name in (model.name, *model.aliases)]
    return PriceTable(
        {name: Price(**model.price.model_dump()) for name, model in named if model.price is not None}
    )


def authenticator(configuration: Configuration) -> Authenticator:
    return OpenDoor() if configuration.open_to_all else KeyRing(configuration.keys)


def wants_cache(configuration: Configuration) -> bool:
    """Whether the settings or any model want answers to be kept."""
    return bool(
        configuration.settings.cache_ttl or any(model.cache_ttl for model in configuration.file.models)
    )


def served_names(configuration: Configuration) -> list[str]:
    """Models and aliases by name, and what they are called at their upstreams."""
    return [
        name
        for model in configuration.file.models
        for name in (model.name, *model.aliases, *(p.model for p in model.places if p.model))
    ]


def _clients(configuration: Configuration, known: Mapping[str, Client]) -> dict[str, Client]:
    """One for each upstream; those made of the same parts are kept, with their connections."""
    clients = {}
    for config in configuration.upstreams:
        parts, old = parts_of(config, configuration), known.get(config.name)
        same = old is not None and old.parts == parts
        clients[config.name] = (
            old if old is not None and same else Client(make_upstream(config, configuration), parts)
        )
    return clients


def clients_of(configuration: Configuration, upstreams: Mapping[str, Upstream]) -> dict[str, Client]:
    """Those of upstreams that are there already."""
    return {
        config.name: Client(upstreams[config.name], parts_of(config, configuration))
        for config in configuration.upstreams
    }
