"""The one place where the parts are joined: `create_app` makes a whole working application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

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
from starlette.routing import Route
from starlette.types import ASGIApp

from service import __version__
from service.api import native, openai, schemas, system
from service.api.documentation import DESCRIPTION, TAGS, document
from service.auth import KeyRing, OpenDoor
from service.chat import ChatService, Limits
from service.config import Configuration
from service.dialogue import Defaults, Dialogue
from service.domain import Operation, Price, RequestRecord
from service.errors import InvalidRequest, MethodNotAllowed, NotFound, ValidationFailed, WeirError
from service.health import UpstreamHealth
from service.keywatch import KeyWatch
from service.lifecycle import Lifecycle
from service.middleware import (
    BodyMiddleware,
    ErrorMiddleware,
    GateMiddleware,
    PlainRoutes,
    RequestContextMiddleware,
)
from service.ports import Authenticator, Conversations, Ledger, Limiter, PriceBook, Upstream
from service.pricing import PriceTable
from service.stores.memory import MemoryConversations, MemoryLedger, MemoryLimiter
from service.telemetry import Metrics
from service.tracing import NoTracing, Tracing, make_tracing
from service.upstreams.router import ModelCatalogue, make_upstreams

log = structlog.get_logger("weir")


class Adapters(msgspec.Struct):
    """What fills the ports."""

    upstreams: dict[str, Upstream]
    conversations: Conversations
    limiter: Limiter
    ledger: Ledger
    prices: PriceBook
    authenticator: Authenticator


class Weir(msgspec.Struct):
    """The parts of one application, for those who run it: probes, metrics, tests."""

    configuration: Configuration
    adapters: Adapters
    lifecycle: Lifecycle
    metrics: Metrics
    tracing: NoTracing | Tracing
    health: UpstreamHealth
    service: ChatService


class _Recorder:
    """The views of a record that are not the ledger's: metrics, span, health."""

    def __init__(self, metrics: Metrics, tracing: NoTracing | Tracing, health: UpstreamHealth) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self._health = health

    def opened(self, record: RequestRecord, traceparent: str | None) -> None:
        self._metrics.opened()
        self._tracing.opened(record, traceparent)

    def attempted(self, record: RequestRecord, error: WeirError | None) -> None:
        self._metrics.attempted(record, error)
        self._health.attempted(record, error)

    def closed(self, record: RequestRecord) -> None:
        self._metrics.closed(record)
        self._tracing.closed(record)


def memory_adapters(configuration: Configuration) -> Adapters:
    """Everything in this process's memory: what runs without anything else."""
    settings = configuration.settings
    models = configuration.file.models
    return Adapters(
        upstreams=make_upstreams(configuration),
        conversations=MemoryConversations(
            ttl_seconds=settings.conversation_ttl,
            most=settings.conversations_max,
            keep_messages=max(settings.conversation_messages, 200),
        ),
        limiter=MemoryLimiter(settings.rate_limit_requests, settings.rate_limit_window),
        ledger=MemoryLedger(),
        prices=PriceTable(
            overrides={
                name: Price(**model.price.model_dump())
                for model in models
                if model.price is not None
                for name in (model.name, *model.aliases)
            },
            contexts={
                name: model.context_tokens
                for model in models
                if model.context_tokens is not None
                for name in (model.name, *model.aliases)
            },
        ),
        authenticator=OpenDoor() if configuration.open_to_all else KeyRing(configuration.keys),
    )


def create_app(
    configuration: Configuration,
    adapters: Adapters | None = None,
    *,
    registry: CollectorRegistry | None = None,
    lifecycle: Lifecycle | None = None,
) -> FastAPI:
    """A whole application; its parts are at `app.state.weir`."""
    adapters = adapters or memory_adapters(configuration)
    weir = _join(configuration, adapters, registry or CollectorRegistry(), lifecycle)
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
    configuration: Configuration,
    adapters: Adapters,
    registry: CollectorRegistry,
    lifecycle: Lifecycle | None,
) -> Weir:
    settings = configuration.settings
    names = [n for m in configuration.file.models for n in (m.name, *m.aliases)]
    metrics = Metrics(registry, __version__, models=names)
    tracing = make_tracing(settings, __version__)
    health = UpstreamHealth((u.name, u.kind.value) for u in configuration.upstreams)
    service = ChatService(
        catalogue=ModelCatalogue(configuration, adapters.upstreams),
        prices=adapters.prices,
        limiter=adapters.limiter,
        ledger=adapters.ledger,
        recorder=_Recorder(metrics, tracing, health),
        limits=Limits(settings.openai_timeout, settings.stream_idle_timeout, settings.openai_max_retries),
    )
    lifecycle = lifecycle or Lifecycle(settings.liveness_timeout)
    return Weir(configuration, adapters, lifecycle, metrics, tracing, health, service)


def _add_routes(app: FastAPI, weir: Weir) -> dict[str, ASGIApp]:
    """All routes; returns those of the hot path by their paths."""
    settings, service = weir.configuration.settings, weir.service
    dialogue = Dialogue(
        conversations=weir.adapters.conversations,
        catalogue=service.catalogue,
        prices=weir.adapters.prices,
        defaults=Defaults(
            model=weir.configuration.default_model,
            max_tokens=settings.openai_max_tokens,
            temperature=settings.openai_temperature,
            history_messages=settings.conversation_messages,
        ),
    )
    keepalive = settings.stream_keepalive
    hot: dict[str, ASGIApp] = {}
    for operation in Operation:
        endpoint = openai.ModelEndpoint(service, operation, keepalive_seconds=keepalive)
        hot[endpoint.path] = endpoint
    plain = [Route(path, endpoint, methods=["POST"]) for path, endpoint in hot.items()]
    plain.append(Route("/v1/models", openai.ModelList(service), methods=["GET"]))
    plain.append(Route("/v1/models/{model:path}", openai.ModelShow(service), methods=["GET"]))
    app.router.routes[:0] = plain
    app.include_router(
        native.make_router(
            service,
            dialogue,
            batch_concurrency=settings.batch_concurrency,
            keepalive_seconds=keepalive,
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
    layers = _layers(weir)
    app.user_middleware[:0] = layers
    surrounded = {path: _wrapped(endpoint, layers) for path, endpoint in hot.items()}
    app.middleware_stack = PlainRoutes(app.build_middleware_stack(), surrounded)


def _layers(weir: Weir) -> list[Middleware]:
    """The middleware of every request, the outermost first."""
    settings = weir.configuration.settings
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["X-Request-ID", "X-Conversation-ID", "X-Process-Time", "Retry-After"],
    )
    return [
        Middleware(RequestContextMiddleware, weir.metrics),
        *([cors] if settings.cors_origins else []),
        Middleware(ErrorMiddleware, debug=settings.debug),
        Middleware(GateMiddleware, weir.adapters.authenticator),
        Middleware(
            BodyMiddleware,
            weir.service.sweep,
            max_bytes=settings.max_body_bytes,
            timeout_seconds=settings.body_timeout,
        ),
    ]


def _wrapped(app: ASGIApp, layers: list[Middleware]) -> ASGIApp:
    for layer in reversed(layers):
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app


def _lifespan(weir: Weir) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(weir.tracing.close)
            for upstream in weir.adapters.upstreams.values():
                stack.push_async_callback(upstream.close)
            stack.push_async_callback(weir.service.settled)
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(weir.lifecycle.beat(weir.metrics.beat))]
                keys, path = weir.adapters.authenticator, weir.configuration.settings.weir_keys_file
                if isinstance(keys, KeyRing) and path is not None:
                    watch = KeyWatch(keys, path, weir.configuration.file.keys)
                    watch.look()
                    running.append(tasks.create_task(watch.run()))
                weir.lifecycle.started = True
                yield
                weir.lifecycle.draining = True
                for task in running:
                    task.cancel()

    return lifespan


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
    parts["conversations"] = schemas.Part(status="ok", detail={"store": "memory"})
    keys = weir.adapters.authenticator
    parts["auth"] = schemas.Part(
        status="ok", detail={"keys": len(keys)} if isinstance(keys, KeyRing) else {"open": True}
    )
    if weir.configuration.settings.redis_url is not None:
        parts["redis"] = schemas.Part(status="unused", detail={"note": "set, and not used by this version"})
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
