"""The one place where the parts are joined: `create_app` makes a whole working application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import ip_network

import msgspec
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from service import __version__
from service.api import native, openai, schemas, system, tenants, usage
from service.api.documentation import DESCRIPTION, TAGS, document
from service.api.idempotency import Idempotency, IdempotencyMiddleware
from service.asking import Limits
from service.auth import KeyRing
from service.caching.answers import AnswerCache
from service.caching.flights import Flights, Locks
from service.canonical import RequestLog
from service.chat import ChatService
from service.config import Configuration, Settings, revealed
from service.configwatch import ConfigFiles, ConfigWatch
from service.domain import AttemptKind, Operation, RequestRecord, Standing
from service.errors import InvalidRequest, MethodNotAllowed, NotFound, ValidationFailed, WeirError
from service.health import UpstreamHealth
from service.lifecycle import Lifecycle
from service.middleware import (
    MODEL_ROUTES,
    BodyMiddleware,
    ErrorMiddleware,
    GateMiddleware,
    PlainRoutes,
    RequestContextMiddleware,
)
from service.overload import Gate
from service.ports import (
    Authenticator,
    Cache,
    Conversations,
    PriceBook,
    Replays,
    Upstream,
    UsageBook,
)
from service.pricing import checked_at
from service.routing.breaker import Circuit
from service.routing.catalogue import Conditions
from service.routing.probing import Prober
from service.routing.sharing import CircuitSharing
from service.serving import (
    RuledAccounts,
    Serving,
    Shared,
    Snapshot,
    authenticator,
    clients_of,
    make_catalogue,
    make_dialogue,
    price_table,
    rulebook,
    served_names,
    wants_cache,
)
from service.stores.memory import MemoryConversations
from service.stores.memory_accounts import MemoryAccounts
from service.stores.memory_book import MemoryUsageBook
from service.stores.memory_cache import MemoryCache
from service.stores.memory_idempotency import MemoryReplays
from service.stores.redis.address import make_client
from service.stores.redis.answers import RedisAnswers
from service.stores.redis.book import RedisUsageBook
from service.stores.redis.cache import RedisCache, RedisLocks, TwoLevelCache
from service.stores.redis.circuits import RedisCircuits
from service.stores.redis.fleet import Fleet, FleetAccounts, FleetConversations
from service.stores.redis.idempotency import FleetReplays, RedisReplays
from service.stores.redis.stores import RedisConversations
from service.telemetry import Metrics
from service.tracing import Tracing, make_tracing
from service.upstreams.making import make_upstreams

EXPOSED_HEADERS = (
    *("X-Request-ID", "X-Trace-ID", "X-Conversation-ID", "X-Process-Time", "Retry-After"),
    *("X-Weir-Cache", "X-Weir-Model", "X-Should-Retry", "X-Upstream-Request-ID"),
    *(
        f"X-RateLimit-{what}-{kind}"
        for kind in ("Requests", "Tokens")
        for what in ("Limit", "Remaining", "Reset")
    ),
    *("X-Weir-Budget-Warning", "Idempotent-Replayed", "X-Weir-Original-Request-ID"),
)
"""What the scripts of other origins may read."""

log = structlog.get_logger("weir")


class Adapters(msgspec.Struct):
    """What fills the ports; `fleet` is what the stores among them share, if they share anything."""

    upstreams: dict[str, Upstream]
    conversations: Conversations
    accounts: RuledAccounts
    book: UsageBook
    cache: Cache
    prices: PriceBook
    authenticator: Authenticator
    locks: Locks | None = None
    answers: tenants.Answers | None = None
    fleet: Fleet | None = None


class Weir(msgspec.Struct):
    """The parts of one application, for those who run it: probes, metrics, tests."""

    files: ConfigFiles
    adapters: Adapters
    lifecycle: Lifecycle
    metrics: Metrics
    tracing: Tracing
    health: UpstreamHealth
    serving: Serving
    gate: Gate
    conditions: Conditions
    answers: AnswerCache
    idempotency: Idempotency
    log: RequestLog

    @property
    def configuration(self) -> Configuration:
        """The one that is in use."""
        return self.serving.now.configuration

    @property
    def service(self) -> ChatService:
        """The one under that configuration."""
        return self.serving.now.service


class _Recorder:
    """The views of a record that are neither the ledger's nor its spans: metrics, health."""

    def __init__(self, metrics: Metrics, health: UpstreamHealth) -> None:
        self._metrics = metrics
        self._health = health

    def opened(self, record: RequestRecord) -> None:
        self._metrics.opened()

    def queued(self, priority: str, seconds: float) -> None:
        self._metrics.queued(priority, seconds)

    def attempted(
        self,
        record: RequestRecord,
        error: WeirError | None,
        kind: AttemptKind,
        seconds: float,
        response_model: str = "",
    ) -> None:
        self._metrics.attempted(record, error, kind, seconds, response_model)
        self._health.attempted(record, error)

    def pace(self, record: RequestRecord, response_model: str) -> Callable[[float, int], None]:
        return self._metrics.pace(record, response_model)

    def streamed(self, record: RequestRecord, seconds: float) -> None:
        self._metrics.streamed(record, seconds)

    def unheard(self, record: RequestRecord, kind: AttemptKind, seconds: float) -> None:
        self._metrics.unheard(record, kind, seconds)

    def hedged(self, *, won: bool, wasted_usd: float) -> None:
        self._metrics.hedged(won=won, wasted_usd=wasted_usd)

    def late(self, wasted_usd: float) -> None:
        self._metrics.late(wasted_usd)

    def standing(self, record: RequestRecord, standing: Standing) -> None:
        self._metrics.standing(record, standing)

    def closed(self, record: RequestRecord) -> None:
        self._metrics.closed(record)


def make_adapters(configuration: Configuration) -> Adapters:
    """In this process's memory, or on Redis where REDIS_URL names one."""
    adapters = memory_adapters(configuration)
    url = configuration.settings.redis_url
    return adapters if url is None else _on_redis(adapters, configuration, url.get_secret_value())


def memory_adapters(configuration: Configuration) -> Adapters:
    """Everything in this process's memory: what runs without anything else."""
    settings = configuration.settings
    book = MemoryUsageBook()
    return Adapters(
        upstreams=make_upstreams(configuration),
        conversations=MemoryConversations(
            ttl_seconds=settings.conversation_ttl,
            most=settings.conversations_max,
            keep_messages=_kept_messages(settings),
        ),
        accounts=MemoryAccounts(rulebook(configuration), book=book),
        book=book,
        cache=MemoryCache(settings.cache_max_bytes),
        prices=price_table(configuration),
        authenticator=authenticator(configuration),
    )


def _on_redis(adapters: Adapters, configuration: Configuration, url: str) -> Adapters:
    """The same with those stores on Redis whose state all pods share."""
    settings = configuration.settings
    timeout, connections = settings.redis_timeout, settings.redis_max_connections
    fleet = Fleet(
        make_client(
            url,
            password=revealed(settings.redis_password),
            sentinel_password=revealed(settings.redis_sentinel_password),
            timeout_seconds=timeout,
            max_connections=connections,
        ),
        prefix=settings.redis_prefix,
        timeout_seconds=timeout,
        max_connections=connections,
        backlog_writes=settings.backlog_writes,
        rules=rulebook(configuration),
        ledger_records=settings.ledger_records,
        lease_seconds=settings.lease_seconds,
    )
    sharers = settings.replicas * settings.worker_count
    conversations = RedisConversations(
        fleet.link,
        ttl_seconds=settings.conversation_ttl,
        most=settings.conversations_max,
        keep_messages=_kept_messages(settings),
    )
    return msgspec.structs.replace(
        adapters,
        conversations=FleetConversations(conversations, fleet.link, fleet.backlog),
        accounts=FleetAccounts(fleet, settings.limits_without_redis, sharers),
        book=RedisUsageBook(fleet.link),
        cache=TwoLevelCache(adapters.cache, RedisCache(fleet.link)),
        locks=RedisLocks(fleet.link),
        answers=RedisAnswers(fleet.link),
        fleet=fleet,
    )


def _kept_messages(settings: Settings) -> int:
    return max(settings.conversation_messages, 200)


def create_app(
    configuration: Configuration,
    adapters: Adapters | None = None,
    *,
    registry: CollectorRegistry | None = None,
    lifecycle: Lifecycle | None = None,
    files: ConfigFiles | None = None,
) -> FastAPI:
    """A whole application; its parts are at `app.state.weir`. `files` are those that it was read from."""
    adapters = adapters or make_adapters(configuration)
    weir = _join(files or ConfigFiles(configuration), adapters, registry or CollectorRegistry(), lifecycle)
    app = FastAPIOffline(
        title="Weir",
        version=__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=_lifespan(weir),
        static_url="/docs-assets",
        redirect_slashes=False,
        # FastAPI's own spans, metrics and logs know nothing of models: tracing.py makes ours.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.weir = weir
    hot = _add_routes(app, weir)
    _surround(app, weir, hot)
    app.openapi = document(app)  # type: ignore[method-assign]
    return app


def _join(
    files: ConfigFiles,
    adapters: Adapters,
    registry: CollectorRegistry,
    lifecycle: Lifecycle | None,
) -> Weir:
    configuration = files.good
    settings = configuration.settings
    metrics = Metrics(registry, __version__, models=served_names(configuration))
    metrics.prices_known(checked_at())
    tracing = make_tracing(settings, __version__, partial(metrics.telemetry_dropped, "traces"))
    tracing.know(configuration)
    health = UpstreamHealth((u.name, u.kind.value) for u in configuration.upstreams)
    gate = Gate(
        most=settings.max_concurrent_requests,
        most_waiting=settings.max_queued_requests,
        wait_seconds=settings.max_queue_seconds,
        on_shed=metrics.shed,
    )
    conditions = Conditions(metrics.circuit, metrics.forget_circuit)
    answers = AnswerCache(
        adapters.cache,
        Flights(adapters.locks),
        ttl_seconds=settings.cache_ttl,
        most_answer_bytes=settings.cache_max_answer_bytes,
    )
    service = ChatService(
        catalogue=make_catalogue(configuration, adapters.upstreams, conditions, adapters.cache),
        gate=gate,
        prices=adapters.prices,
        accounts=adapters.accounts,
        cache=answers if wants_cache(configuration) else None,
        recorder=_Recorder(metrics, health),
        limits=Limits(
            settings.openai_timeout,
            settings.stream_idle_timeout,
            settings.openai_max_retries,
            settings.request_timeout,
        ),
    )
    lifecycle = lifecycle or Lifecycle(settings.liveness_timeout)
    if adapters.fleet is not None:
        adapters.fleet.watch(metrics.shared_state, metrics.write_dropped)
    first = Snapshot(
        configuration,
        service=service,
        dialogue=make_dialogue(configuration, adapters.conversations, service),
        authenticator=adapters.authenticator,
        clients=clients_of(configuration, adapters.upstreams),
    )
    shared = Shared(adapters.conversations, adapters.accounts, conditions, answers, adapters.cache)
    return Weir(
        files,
        adapters,
        lifecycle,
        metrics,
        tracing,
        health,
        Serving(first, shared),
        gate,
        conditions,
        answers,
        _idempotency(settings, adapters.fleet),
        RequestLog(
            slow_seconds=settings.log_slow_request_seconds,
            keep=settings.log_sample_success,
            sampled=metrics.log_line_sampled,
        ),
    )


def _idempotency(settings: Settings, fleet: Fleet | None) -> Idempotency:
    ttl, lease, most = settings.idempotency_ttl, settings.lease_seconds, settings.idempotency_store_bytes
    near = MemoryReplays(ttl_seconds=ttl, lease_seconds=lease, most_bytes=most)
    replays: Replays = near
    if fleet is not None:
        far = RedisReplays(fleet.link, ttl_seconds=ttl, lease_seconds=lease, most_bytes=most)
        replays = FleetReplays(near, far)
    return Idempotency(replays, routes=MODEL_ROUTES, most_bytes=settings.idempotency_max_bytes)


def _add_routes(app: FastAPI, weir: Weir) -> dict[str, ASGIApp]:
    """All routes; returns those of the hot path by their paths."""
    settings, service = weir.configuration.settings, weir.service
    keepalive = settings.stream_keepalive
    hot: dict[str, ASGIApp] = {}
    for operation in Operation:
        endpoint = openai.ModelEndpoint(operation, keepalive_seconds=keepalive)
        hot[endpoint.path] = endpoint
    plain = [Route(path, endpoint, methods=["POST"]) for path, endpoint in hot.items()]
    plain.append(Route("/v1/models", openai.ModelList(), methods=["GET"]))
    plain.append(Route("/v1/models/{model:path}", openai.ModelShow(), methods=["GET"]))
    app.router.routes[:0] = plain
    app.include_router(
        native.make_router(batch_concurrency=settings.batch_concurrency, keepalive_seconds=keepalive)
    )
    app.include_router(usage.make_router(weir.adapters.book, service.sweep))
    app.include_router(
        tenants.make_router(
            weir.adapters.conversations, weir.adapters.answers, weir.idempotency.replays, service.sweep
        )
    )
    began = time.monotonic()
    app.include_router(
        system.make_router(parts=lambda: _parts(weir), uptime_seconds=lambda: time.monotonic() - began)
    )
    return hot


def _surround(app: FastAPI, weir: Weir, hot: dict[str, ASGIApp]) -> None:
    """Put the same middleware around FastAPI's routes and, without FastAPI's own layers, the hot ones."""
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_not_served)
    layers = _layers(weir, _plain_templates(app))
    app.user_middleware[:0] = layers
    surrounded = {path: _wrapped(endpoint, layers) for path, endpoint in hot.items()}
    app.middleware_stack = PlainRoutes(app.build_middleware_stack(), surrounded)


def _plain_templates(app: FastAPI) -> dict[object, str]:
    """Of the routes that are not FastAPI's, by what answers them."""
    found: dict[object, str] = {}
    for route in app.routes:
        if isinstance(route, Mount):
            found[route.app] = route.path
        elif isinstance(route, Route):
            found[route.endpoint] = route.path_format
    return found


def _layers(weir: Weir, plain: Mapping[object, str]) -> list[Middleware]:
    """The middleware of every request, the outermost first."""
    settings = weir.configuration.settings
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=list(EXPOSED_HEADERS),
    )
    return [
        Middleware(
            RequestContextMiddleware,
            weir.metrics,
            weir.lifecycle,
            tuple(map(ip_network, settings.trusted_proxies)),
            weir.tracing,
            weir.log,
            plain,
        ),
        *([cors] if settings.cors_origins else []),
        Middleware(ErrorMiddleware, debug=settings.debug),
        Middleware(GateMiddleware, weir.serving, weir.gate),
        Middleware(
            BodyMiddleware,
            weir.service.sweep,
            max_bytes=settings.max_body_bytes,
            timeout_seconds=settings.body_timeout,
        ),
        Middleware(IdempotencyMiddleware, weir.idempotency),
    ]


def _wrapped(app: ASGIApp, layers: list[Middleware]) -> ASGIApp:
    for layer in reversed(layers):
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app


def _lifespan(weir: Weir) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            # In a thread: it waits for the collector, and the loop must beat meanwhile.
            stack.push_async_callback(asyncio.to_thread, weir.tracing.close)
            fleet = weir.adapters.fleet
            if fleet is not None:
                await fleet.open()
                stack.push_async_callback(fleet.close)
            stack.push_async_callback(weir.idempotency.settled)
            stack.push_async_callback(weir.serving.close)
            stack.push_async_callback(weir.answers.flights.settled)
            stack.push_async_callback(weir.service.settled)
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(weir.lifecycle.beat(partial(_tell, weir))),
                    tasks.create_task(weir.gate.watch()),
                    tasks.create_task(Prober(weir.conditions, partial(_watched, weir)).run()),
                ]
                if fleet is not None:
                    sharing = CircuitSharing(weir.conditions, RedisCircuits(fleet.link))
                    running.append(tasks.create_task(sharing.run()))
                if weir.files:
                    watch = ConfigWatch(weir.files, partial(_reload, weir), weir.metrics.config_read)
                    await watch.look()
                    running.append(tasks.create_task(watch.run()))
                weir.lifecycle.started = True
                yield
                weir.lifecycle.draining = True
                for task in running:
                    task.cancel()

    return lifespan


async def _reload(weir: Weir, configuration: Configuration) -> None:
    """Serve by another configuration. Raises ConfigurationError, and then nothing has changed."""
    await weir.serving.reload(configuration)
    weir.health.know((u.name, u.kind.value) for u in configuration.upstreams)
    weir.metrics.know(served_names(configuration))
    weir.tracing.know(configuration)


def _watched(weir: Weir) -> dict[str, tuple[Upstream, str]]:
    """The upstreams that have a health path, with it."""
    now = weir.serving.now
    return {
        upstream.name: (now.clients[upstream.name].upstream, upstream.health_path)
        for upstream in now.configuration.upstreams
        if upstream.health_path is not None
    }


def _tell(weir: Weir, loop_lag_seconds: float) -> None:
    """What is told at each heartbeat."""
    weir.metrics.beat(loop_lag_seconds, waiting=weir.gate.waiting, places=weir.gate.limit)
    for (upstream, model), condition in weir.conditions.items():
        # Nothing happens when a pause is over, until a call comes.
        if condition.breaker.state is Circuit.OPEN:
            weir.metrics.show_circuit(upstream, model, condition.breaker.shown)
    dropped = weir.log.take_dropped()
    if dropped:
        weir.metrics.telemetry_dropped("logs", dropped)
        log.warning("log_lines_dropped", lines=dropped)


def _parts(weir: Weir) -> dict[str, schemas.Part]:
    """The state of each part, by names alone: `/health` is open to everybody."""
    parts = {
        f"upstream:{name}": schemas.Part(
            status=state.status,
            detail={k: v for k, v in msgspec.structs.asdict(state).items() if v is not None and k != "status"}
            | ({"note": "a simulator, not a model"} if state.kind == "simulator" else {}),
        )
        for name, state in weir.health.states.items()
    }
    fleet = weir.adapters.fleet
    well = "ok" if fleet is None or fleet.link.available else "failing"
    store = "memory" if fleet is None else "redis"
    parts["conversations"] = schemas.Part(status=well, detail={"store": store})
    if fleet is not None:
        parts["redis"] = schemas.Part(status=well, detail={"waiting_writes": len(fleet.backlog)})
    keys = weir.serving.now.authenticator
    parts["auth"] = schemas.Part(
        status="ok", detail={"keys": len(keys)} if isinstance(keys, KeyRing) else {"open": True}
    )
    return parts


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """FastAPI's validation errors in the envelope: the first one, and how many there are."""
    details = error.errors()
    first = details[0]
    if first["type"] == "json_invalid":
        raise InvalidRequest("The body is not JSON.") from None
    where = ".".join(str(part) for part in first["loc"][1:]) or None
    more = f" ({len(details) - 1} more)" if len(details) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    raise ValidationFailed(f"{where or 'body'}: {message}{more}.", param=where) from None


async def _not_served(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors in the envelope."""
    if error.status_code == 404:
        raise NotFound(f"There is nothing at {request.method} {request.url.path}.") from None
    if error.status_code == 405:
        raise MethodNotAllowed(f"{request.method} is not served at {request.url.path}.") from None
    raise InvalidRequest(str(error.detail)) from None
