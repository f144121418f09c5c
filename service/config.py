"""Settings: the only reader of the environment, of `.env` and of the YAML file.

The environment wins over `.env`. The YAML file (`WEIR_CONFIG`) holds what has a structure: upstreams,
models, prices, API keys. A wrong value becomes a `ConfigurationError` whose message is one line for
each: the setting, the value (never a secret's) and what is allowed.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import ConfigurationError

OPENAI_HOST: Final = "api.openai.com"
SIMULATOR: Final = "simulator"
_REDIS_SCHEMES: Final = (
    "redis",
    "rediss",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)
_KEY: Final = re.compile(r"[\x21-\x7e]+")
"""What a header can carry: a line end at the end of a key would fail every request."""


_OPENAI_KEY: Final = re.compile(r"sk-[A-Za-z0-9_-]{5,}")
_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,99}")
"""Anything else in api_key_env may be the key itself, put into the wrong place."""
_CREDENTIALS: Final = re.compile(r"//[^/@]*@")
"""In an address; people put them there though no setting asks for it."""

_Shape = TypeVar("_Shape", bound=BaseModel)


class UpstreamKind(StrEnum):
    """How an upstream is reached."""

    DIRECT = "direct"
    OPENAI_SDK = "openai_sdk"
    AZURE = "azure"
    SIMULATOR = "simulator"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PriceConfig(_File):
    """US dollars per million tokens, in place of the price table's."""

    input: float = Field(ge=0)
    output: float = Field(default=0.0, ge=0)
    cached_input: float | None = Field(default=None, ge=0)
    cache_write: float | None = Field(default=None, ge=0)
    audio_input: float | None = Field(default=None, ge=0)
    audio_output: float | None = Field(default=None, ge=0)


class KeySource(_File):
    """Where one key of an upstream is."""

    env: str | None = None
    file: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("each of api_keys names one of env and file")
        return self


class UpstreamConfig(_File):
    """One place that serves models."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    kind: UpstreamKind = UpstreamKind.DIRECT
    base_url: str | None = None
    api_key_env: str | None = None
    api_key_file: Path | None = None
    api_version: str | None = None
    """Azure only: the version of its API."""
    provider: str | None = None
    """The provider's name in the price table and in metrics; guessed from the address if absent."""
    stream_usage: bool = True
    """Ask for usage in streams (`stream_options`). False for servers that refuse the parameter."""
    api_keys: tuple[KeySource, ...] = ()
    """Several keys, taken in turn; one that is refused or limited rests for a while."""
    region: str | None = Field(default=None, min_length=1, max_length=63)
    """Where it is; with the setting REGION those of the same region are asked first."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Calls of one process at a time; above it another upstream is asked, if there is one."""
    connect_timeout: float | None = Field(default=None, gt=0, le=120)
    first_byte_timeout: float | None = Field(default=None, gt=0, le=86400)
    """Seconds until a whole answer, or a stream's first event; then the next attempt is made."""
    idle_timeout: float | None = Field(default=None, gt=0, le=86400)
    health_path: str | None = Field(default=None, pattern=r"^/")
    """Asked while its circuit is open, below base_url, `/models` for example: 200 closes it early."""

    @field_validator("api_version", mode="before")
    @classmethod
    def _date(cls, value: Any) -> Any:
        # YAML reads 2024-10-21 as a date; Azure's versions look like that.
        return value.isoformat() if isinstance(value, date) else value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind is not UpstreamKind.SIMULATOR and not self.base_url:
            raise ValueError(f"upstream {self.name!r} needs a base_url")
        if self.kind is UpstreamKind.AZURE and not self.api_version:
            raise ValueError(f"upstream {self.name!r} of kind azure needs an api_version")
        if self.base_url:
            _check_http_url(self.base_url)
        given = [bool(self.api_key_env), bool(self.api_key_file), bool(self.api_keys)]
        if sum(given) > 1:
            raise ValueError(f"upstream {self.name!r} takes one of api_key_env, api_key_file and api_keys")
        if self.health_path and self.kind is not UpstreamKind.DIRECT:
            raise ValueError(f"upstream {self.name!r}: a health_path is for the kind direct alone")
        if len(self.api_keys) > 1 and self.kind is not UpstreamKind.DIRECT:
            raise ValueError(f"upstream {self.name!r}: several api_keys are for the kind direct alone")
        return self


class PlaceConfig(_File):
    """One of the places that serve a model."""

    upstream: str
    model: str | None = None
    """The model's name there, if it is another one."""
    weight: float = Field(default=1.0, gt=0, le=1_000)
    price: PriceConfig | None = None


class FallbackConfig(_File):
    """Models that stand in when this one cannot answer, by what went wrong; asked in their order."""

    context_length: tuple[str, ...] = ()
    """The request is too long for the model."""
    content_filter: tuple[str, ...] = ()
    rate_limit: tuple[str, ...] = ()
    unavailable: tuple[str, ...] = ()
    """No upstream of the model gave an answer."""


class ModelConfig(_File):
    """One model that callers may name, and where its calls go. `*` in the name: any letters."""

    name: str = Field(min_length=1, max_length=200)
    upstream: str = ""
    upstream_model: str | None = None
    upstreams: tuple[PlaceConfig, ...] = ()
    """Several, in place of `upstream` and `upstream_model`."""
    strategy: Literal["ordered", "weighted", "least_busy", "fastest"] = "ordered"
    """How one of them is chosen; whichever it is, those that fail are left out."""
    sticky: bool = False
    """Calls of one conversation go to the same upstream, whose prompt cache knows it."""
    hedge: bool = False
    """Ask a second upstream where the first has not answered after the time in which most answers come."""
    fallbacks: FallbackConfig = FallbackConfig()
    aliases: tuple[str, ...] = ()
    price: PriceConfig | None = None
    context_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    """The longest answer, which budgets count with where a call names no max_tokens of its own."""
    cache_ttl: float | None = Field(default=None, ge=0)
    """Seconds that its answers are kept, in place of CACHE_TTL; 0 keeps none."""

    @model_validator(mode="after")
    def _served(self) -> Self:
        if bool(self.upstream) == bool(self.upstreams):
            raise ValueError(f"model {self.name!r} needs one of upstream and upstreams")
        if self.upstreams and self.upstream_model:
            raise ValueError(f"model {self.name!r}: with upstreams, each has its own `model`")
        if "*" in self.name and self.aliases:
            raise ValueError(f"model {self.name!r} stands for many names and takes no aliases")
        if any("*" in alias for alias in self.aliases):
            raise ValueError(f"model {self.name!r}: an alias is one name; `*` goes into a model's name")
        there = [(place.upstream, place.model) for place in self.upstreams]
        for upstream, model in there:
            if there.count((upstream, model)) > 1:
                raise ValueError(f"model {self.name!r} names the upstream {upstream!r} twice; use weight")
        if self.hedge and len(self.upstreams) < 2:
            raise ValueError(f"model {self.name!r}: hedge needs a second upstream to ask")
        return self

    @property
    def places(self) -> tuple[PlaceConfig, ...]:
        """Where it is served, in either way of writing."""
        return self.upstreams or (PlaceConfig(upstream=self.upstream, model=self.upstream_model),)


class KeyConfig(_File):
    """One API key: only its SHA-256 is kept. `python -m service make-key` makes one."""

    name: str = Field(min_length=1, max_length=64)
    tenant: str = Field(default="default", min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    models: tuple[str, ...] = ()
    """The models that it may use, with `*` for any letters; all where none is named."""
    admin: bool = False
    """May see all tenants' usage, export and erase."""
    priority: Literal["high", "normal", "low"] = "normal"
    """The class of its requests under overload; the header X-Weir-Priority asks for a lower one."""


class _Rule(_File):
    """Whom a rule is for: names with `*` and `?` for any letters; all where it names none."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    tenants: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class LimitConfig(_Rule):
    """How much may be asked for, counted apart for each of what `per` names."""

    per: tuple[Literal["key", "tenant", "model", "address"], ...] = ("key",)
    requests: int | None = Field(default=None, ge=1)
    """Requests in a window."""
    tokens: int | None = Field(default=None, ge=1)
    """Input and output tokens in a window."""
    window: float = Field(default=60.0, gt=0, le=86400)
    """Seconds."""
    concurrent: int | None = Field(default=None, ge=1)
    """Requests that run at the same time."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.requests is None and self.tokens is None and self.concurrent is None:
            raise ValueError(f"limit {self.name!r} needs one of requests, tokens, concurrent")
        return self


class BudgetConfig(_Rule):
    """How many US dollars may be spent in a day or month (UTC), counted apart for each tenant or key."""

    per: Literal["key", "tenant"] = "tenant"
    usd: float = Field(gt=0, le=1_000_000)
    period: Literal["day", "month"] = "month"
    warn_at: float = Field(default=0.8, gt=0, le=1)
    """From this share on answers carry a warning."""
    hard: bool = True
    """Refuse calls once it is spent; False only warns."""


class TracingConfig(_File):
    """What traces hold of prompts and answers, where they hold any."""

    redact: tuple[str, ...] = ()
    """Regular expressions: what they match is left out, beside keys, tokens, e-mail addresses and cards."""

    @field_validator("redact")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                matches_nothing = re.compile(pattern).match("") is not None
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            if matches_nothing:
                raise ValueError(f"{pattern!r} matches the empty text, and so everywhere")
        return value


class FileConfig(_File):
    """The YAML file as a whole."""

    upstreams: tuple[UpstreamConfig, ...] = ()
    models: tuple[ModelConfig, ...] = ()
    keys: tuple[KeyConfig, ...] = ()
    limits: tuple[LimitConfig, ...] = ()
    budgets: tuple[BudgetConfig, ...] = ()
    tracing: TracingConfig = TracingConfig()

    @property
    def key_files(self) -> frozenset[Path]:
        """The files that hold upstreams' keys."""
        sources = [KeySource(file=u.api_key_file) for u in self.upstreams if u.api_key_file is not None]
        sources += [source for upstream in self.upstreams for source in upstream.api_keys]
        return frozenset(source.file for source in sources if source.file is not None)

    @model_validator(mode="after")
    def _joined(self) -> Self:
        upstreams = [u.name for u in self.upstreams]
        names = [n for m in self.models for n in (m.name, *m.aliases)]
        for what, given in (
            ("upstream", upstreams),
            ("model or alias", names),
            ("key", [k.name for k in self.keys]),
            ("key hash of", [k.sha256 for k in self.keys]),
            ("limit", [r.name for r in self.limits]),
            ("budget", [r.name for r in self.budgets]),
        ):
            twice = {n for n in given if given.count(n) > 1}
            if twice:
                raise ValueError(f"the {what} {min(twice)!r} is there twice")
        for model in self.models:
            for place in model.places:
                if self.upstreams and place.upstream not in upstreams:
                    raise ValueError(
                        f"model {model.name!r} names the upstream {place.upstream!r}, "
                        f"which is not one of {', '.join(upstreams)}"
                    )
            for other in (name for names in model.fallbacks for name in names[1]):
                if other not in names or "*" in other or other in (model.name, *model.aliases):
                    raise ValueError(
                        f"model {model.name!r} falls back to {other!r}, which is no other model of this file"
                    )
        return self


class KeysFile(_File):
    """A file of keys alone (`WEIR_KEYS_FILE`), so that it can be mounted from a Secret."""

    keys: tuple[KeyConfig, ...] = ()


class Settings(BaseSettings):
    """Every setting that the environment can carry; field names in capitals are the variables."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        allow_inf_nan=False,
    )

    # Where it listens
    host: str | None = Field(
        default=None, description="Address to listen on. Without API keys only loopback is allowed."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port of the API; 0 takes a free one.")
    admin_host: str | None = Field(default=None, description="Address of the admin port; as HOST if not set.")
    admin_port: int = Field(
        default=9000, ge=0, le=65535, description="Port of probes and metrics; 0 takes a free one."
    )
    worker_count: int = Field(
        default=1, ge=1, le=64, description="Processes. Above 1 gunicorn runs them; in a pod leave 1."
    )
    max_requests_per_worker: int = Field(
        default=0,
        ge=0,
        description="Above 1 worker: each is replaced after so many requests (10 % jitter); 0: never.",
    )
    drain_timeout: float = Field(
        default=120.0,
        ge=0,
        le=3600,
        description="Seconds that running requests and streams get after SIGTERM.",
    )
    drain_delay: float = Field(
        default=0.0,
        ge=0,
        le=300,
        description="Seconds after SIGTERM in which new connections are still served, with readiness off.",
    )
    liveness_timeout: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Seconds without a heartbeat of the main loop until /livez fails.",
    )

    # The upstream that needs no YAML
    openai_api_key: SecretStr | None = Field(
        default=None, description="Key of the upstream. OpenAI's own begin with `sk-`."
    )
    openai_base_url: str | None = Field(
        default=None, description="Base URL of the upstream; OpenAI's own if only a key is set."
    )
    openai_model: str | None = Field(
        default=None,
        description="Model for calls that name none; `gpt-4o-mini`, or `simulator` on the simulator.",
    )
    openai_max_tokens: int | None = Field(
        default=None, ge=1, description="max_tokens of /api/v1 calls that name none; unset: the model's own."
    )
    openai_temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Temperature of /api/v1 calls that name none; unset: the model's own.",
    )
    openai_timeout: float = Field(
        default=600.0,
        gt=0,
        le=86400,
        description="Seconds to wait for a whole answer, or a stream's first event.",
    )
    openai_max_retries: int = Field(
        default=2,
        ge=0,
        le=10,
        description="Further attempts after a failure, before anything reached the caller.",
    )
    upstream_connect_timeout: float = Field(
        default=5.0, gt=0, le=120, description="Seconds to connect to an upstream."
    )
    upstream_max_connections: int = Field(
        default=0, ge=0, description="Connections to one upstream at a time; 0: as many as requests."
    )
    stream_idle_timeout: float = Field(
        default=120.0,
        gt=0,
        le=86400,
        description="Seconds without an event until a stream counts as stalled.",
    )
    stream_keepalive: float = Field(
        default=15.0,
        gt=0,
        le=3600,
        description="Seconds of silence after which a stream gets a comment line.",
    )
    simulator_tokens_per_second: float = Field(
        default=50.0, gt=0, le=100_000, description="Speed of the simulator's streams."
    )
    weir_config: Path | None = Field(
        default=None,
        description="YAML file with upstreams, models, aliases, prices and keys; read again when it changes.",
    )

    # Who may call
    auth: Literal["keys", "none"] = Field(
        default="keys", description="`none` lets everybody in, also from other hosts than this one."
    )
    weir_keys_file: Path | None = Field(
        default=None, description="YAML file with API keys (hashes); read again when it changes."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Origins of browsers that may call, separated by commas; `*` for all."
    )

    # How much
    max_body_bytes: int = Field(
        default=32 * 1024 * 1024, ge=1024, description="Largest request body in bytes; above it 413."
    )
    body_timeout: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Seconds in which a request body must have arrived; then 408.",
    )
    region: str | None = Field(
        default=None, description="Where this process runs: upstreams of the same region are asked first."
    )
    request_timeout: float = Field(
        default=0.0,
        ge=0,
        le=86400,
        description="Seconds for a whole request, its stream too; 0: no end. X-Request-Timeout shortens it.",
    )
    max_concurrent_requests: int = Field(
        default=512,
        ge=0,
        le=100_000,
        description="Requests to models that run at a time in one process, streams until their end; 0: all.",
    )
    max_queued_requests: int = Field(
        default=128,
        ge=0,
        le=100_000,
        description="Requests that wait for one of those places; what does not fit gets 503 at once.",
    )
    max_queue_seconds: float = Field(
        default=1.0, gt=0, le=60, description="Seconds that a request may wait for a place; then 503."
    )
    rate_limit_requests: int | None = Field(
        default=None, ge=1, description="Requests that each principal may make per window; unset: no limit."
    )
    rate_limit_window: float = Field(
        default=60.0, gt=0, le=86400, description="Length of the window in seconds."
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Networks (10.0.0.0/8,...) whose X-Forwarded-For names the client's address.",
    )
    cache_ttl: float = Field(
        default=300.0,
        ge=0,
        le=31 * 86400,
        description="Seconds that answers are kept for equal requests of temperature 0 or that ask; 0: none.",
    )
    cache_max_bytes: int = Field(
        default=32 * 1024 * 1024,
        ge=0,
        description="Bytes of answers that each process keeps in memory, before Redis.",
    )
    cache_max_answer_bytes: int = Field(
        default=1024 * 1024, ge=1024, description="The largest answer that is kept."
    )
    idempotency_ttl: float = Field(
        default=86400.0,
        gt=0,
        le=31 * 86400,
        description="Seconds that the answer to a request with an Idempotency-Key is kept and given again.",
    )
    idempotency_max_bytes: int = Field(
        default=1024 * 1024,
        ge=1024,
        le=64 * 1024 * 1024,
        description="The largest answer that is given again; after a larger one a repeat is 409.",
    )
    idempotency_store_bytes: int = Field(
        default=32 * 1024 * 1024,
        ge=1024,
        description="Bytes of such answers: on Redis of each tenant, in memory of all; the oldest go first.",
    )
    batch_concurrency: int = Field(
        default=8, ge=1, le=100, description="Prompts of one /api/v1/batch call that run at a time."
    )
    conversation_messages: int = Field(
        default=20, ge=0, le=1000, description="Messages of a conversation that go along with a call."
    )
    conversation_ttl: float = Field(
        default=86400.0, gt=0, description="Seconds after its last turn until a conversation is forgotten."
    )
    conversations_max: int = Field(
        default=10_000,
        ge=1,
        description="Conversations kept, on Redis of each API key; the longest unused goes first.",
    )

    # The state that all pods share
    redis_url: SecretStr | None = Field(
        default=None,
        description="redis://, rediss://, redis+sentinel://h:26379,h2:26379/0?master=NAME, redis+cluster://h:6379,h2.",
    )
    redis_password: SecretStr | None = Field(
        default=None, description="Password of Redis where REDIS_URL holds none; any letters, unescaped."
    )
    redis_sentinel_password: SecretStr | None = Field(
        default=None, description="Password of the Sentinels, where they ask for one of their own."
    )
    redis_max_connections: int = Field(
        default=50, ge=1, le=10_000, description="Connections to Redis from one process."
    )
    redis_timeout: float = Field(
        default=0.1, gt=0, le=10, description="Seconds that a call of Redis may take; then it counts as away."
    )
    redis_prefix: str = Field(
        default="weir:",
        pattern=r"^[A-Za-z0-9._:/-]{1,64}$",
        description="Beginning of every key; another one for another Weir on the same Redis.",
    )
    limits_without_redis: Literal["share", "open", "closed"] = Field(
        default="share",
        description="While Redis is away: each pod counts its share of the limits, or all get in, or none.",
    )
    replicas: int = Field(
        default=1, ge=1, le=10_000, description="Pods that share the limits while Redis is away."
    )
    ledger_records: int = Field(
        default=20_000, ge=1, description="Records that each tenant's ledger in Redis keeps, about."
    )
    ledger_postgres_url: SecretStr | None = Field(
        default=None,
        description="postgresql://user@host:5432/database, where `service worker` copies the ledger to.",
    )
    ledger_postgres_password: SecretStr | None = Field(
        default=None,
        description="Password of PostgreSQL where LEDGER_POSTGRES_URL holds none; any letters, unescaped.",
    )
    ledger_postgres_schema: str = Field(
        default="weir",
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="Schema of the ledger's tables; the worker makes it where it is not there and it may.",
    )
    ledger_batch_records: int = Field(
        default=1000, ge=1, le=10_000, description="Records that the worker copies in one transaction."
    )
    ledger_poll_seconds: float = Field(
        default=2.0, gt=0, le=3600, description="Seconds between two looks of the worker for new records."
    )
    lease_seconds: float = Field(
        default=60.0,
        ge=3,
        le=3600,
        description="Seconds after which what a vanished pod had reserved is given back and recorded.",
    )
    backlog_writes: int = Field(
        default=10_000, ge=0, description="Writes that wait in memory while Redis is away; more are dropped."
    )

    # What it tells
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        default="info", description="debug, info, warning, error or critical."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="json, console (coloured), or auto: console on a terminal."
    )
    log_slow_request_seconds: float = Field(
        default=60.0,
        ge=0,
        le=86_400,
        description="Seconds from which on a request is told as a warning, with `slow`; 0: none.",
    )
    log_sample_success: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="The share of lines of good requests that is written; others are written in any case.",
    )
    debug: bool = Field(
        default=False, description="Log level debug, and the cause of internal errors in their answers."
    )
    otel_sdk_disabled: bool = Field(default=False, description="true: no traces, whatever else is set.")
    otel_service_name: str = Field(default="weir", description="Service name in traces.")
    otel_resource_attributes: str = Field(default="", description="key=value,... added to each trace.")
    otel_exporter_otlp_endpoint: str | None = Field(
        default=None, description="OTLP collector (HTTP), e.g. http://collector:4318; unset: no traces."
    )
    otel_exporter_otlp_traces_endpoint: str | None = Field(
        default=None, description="The whole URL for traces, in place of the endpoint with /v1/traces."
    )
    otel_exporter_otlp_headers: SecretStr | None = Field(
        default=None, description="key=value,... sent to the collector."
    )
    otel_exporter_otlp_protocol: Literal["http/protobuf"] = Field(
        default="http/protobuf", description="How traces are sent; there is no other way."
    )
    otel_exporter_otlp_timeout: float = Field(
        default=10_000.0,
        gt=0,
        le=600_000,
        description="Milliseconds for sending a batch of spans, its repetitions too; then they are dropped.",
    )
    otel_exporter_otlp_compression: Literal["none", "gzip", "deflate"] = Field(
        default="none", description="none, gzip or deflate."
    )
    otel_exporter_otlp_certificate: Path | None = Field(
        default=None, description="PEM file of the authority that the collector's certificate is checked by."
    )
    otel_exporter_otlp_client_certificate: Path | None = Field(
        default=None, description="PEM file of the certificate that is shown to the collector."
    )
    otel_exporter_otlp_client_key: Path | None = Field(
        default=None, description="PEM file of that certificate's key."
    )
    otel_traces_exporter: Literal["otlp", "none"] = Field(
        default="otlp", description="none: no traces, though an endpoint is set."
    )
    otel_propagators: Annotated[tuple[Literal["tracecontext", "baggage", "none"], ...], NoDecode] = Field(
        default=("tracecontext",),
        description="Of a caller's trace taken and sent on to upstreams: tracecontext,baggage or none.",
    )
    otel_bsp_max_queue_size: int = Field(
        default=2048,
        ge=1,
        le=1_000_000,
        description="Spans that wait to be sent; more are dropped and counted.",
    )
    otel_bsp_max_export_batch_size: int = Field(
        default=512, ge=1, le=100_000, description="Spans that are sent at once, if so many may wait."
    )
    otel_bsp_schedule_delay: float = Field(
        default=5_000.0, gt=0, le=600_000, description="Milliseconds that spans wait for others at the most."
    )
    otel_instrumentation_genai_capture_message_content: Literal["no_content", "span_only"] = Field(
        default="no_content",
        description="span_only: prompts and answers go into traces, without keys, tokens, addresses, cards.",
    )
    otel_span_content_bytes: int = Field(
        default=16 * 1024,
        ge=256,
        le=256 * 1024,
        description="Then of each span: so many bytes of the prompt, the latest, and as many of the answer.",
    )
    otel_traces_sampler: Literal[
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    ] = Field(default="parentbased_always_on", description="Which requests are traced.")
    otel_traces_sampler_arg: float = Field(
        default=1.0, ge=0, le=1, description="The share for the traceidratio samplers."
    )

    @field_validator(
        *("log_level", "log_format", "auth", "otel_traces_sampler", "limits_without_redis"),
        *("otel_traces_exporter", "otel_exporter_otlp_protocol", "otel_exporter_otlp_compression"),
        "otel_instrumentation_genai_capture_message_content",
        mode="before",
    )
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("cors_origins", "trusted_proxies", "otel_propagators", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(v.strip() for v in value.split(",") if v.strip()) if isinstance(value, str) else value

    @field_validator("openai_base_url", "otel_exporter_otlp_endpoint", "otel_exporter_otlp_traces_endpoint")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None:
            _check_http_url(value)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(f"{network!r} is no network such as 10.0.0.0/8") from None
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_redis_url(value.get_secret_value())
        return value

    @field_validator("ledger_postgres_url")
    @classmethod
    def _postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_postgres_url(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _openai_key_fits(self) -> Self:
        # With a YAML file the upstreams are those of the file; `api_key` looks at each.
        if not self.uses_simulator and self.weir_config is None and _is_openai(self.effective_base_url):
            key = self.openai_api_key.get_secret_value() if self.openai_api_key else ""
            if not _OPENAI_KEY.fullmatch(key):
                raise ValueError(
                    "OPENAI_API_KEY (its value is not shown) must be a key that begins with `sk-` "
                    f"for {OPENAI_HOST}; for another host set OPENAI_BASE_URL"
                )
        return self

    @property
    def uses_simulator(self) -> bool:
        """Neither a key nor an address of a real upstream is in the environment."""
        return self.openai_api_key is None and self.openai_base_url is None

    @property
    def effective_base_url(self) -> str:
        return self.openai_base_url or f"https://{OPENAI_HOST}/v1"

    @property
    def level(self) -> str:
        """Of the log."""
        return "debug" if self.debug else self.log_level

    @property
    def traces_endpoint(self) -> str | None:
        """Where spans go, or None when there are no traces."""
        if self.otel_sdk_disabled or self.otel_traces_exporter == "none":
            return None
        if self.otel_exporter_otlp_traces_endpoint:
            return self.otel_exporter_otlp_traces_endpoint
        if self.otel_exporter_otlp_endpoint:
            return self.otel_exporter_otlp_endpoint.rstrip("/") + "/v1/traces"
        return None


class Configuration(_File):
    """Settings and file together, checked as one: what `app.create_app` is made from."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    settings: Settings
    file: FileConfig = FileConfig()
    keys: tuple[KeyConfig, ...] = ()
    version: str = ""
    """SHA-256 of the YAML file; empty without one."""
    _api_keys: dict[str, tuple[str, ...]] = PrivateAttr(default_factory=dict)

    @property
    def upstreams(self) -> tuple[UpstreamConfig, ...]:
        """Those of the file, else the one that the environment describes."""
        if self.file.upstreams:
            return self.file.upstreams
        if self.settings.uses_simulator:
            return (UpstreamConfig(name=SIMULATOR, kind=UpstreamKind.SIMULATOR),)
        return (
            UpstreamConfig(
                name="openai", base_url=self.settings.effective_base_url, api_key_env="OPENAI_API_KEY"
            ),
        )

    def api_keys(self, upstream: UpstreamConfig) -> tuple[str, ...]:
        """The upstream's own keys, read once. Raises ConfigurationError if one is not where it should be."""
        known = self._api_keys.get(upstream.name)
        if known is None:
            known = self._api_keys[upstream.name] = self._read_api_keys(upstream)
        return known

    def _read_api_keys(self, upstream: UpstreamConfig) -> tuple[str, ...]:
        if upstream.api_keys:
            sources = upstream.api_keys
        elif upstream.api_key_file is not None:
            sources = (KeySource(file=upstream.api_key_file),)
        elif upstream.api_key_env is not None:
            sources = (KeySource(env=upstream.api_key_env),)
        else:
            return ()
        found = [self._api_key(upstream, source) for source in sources]
        return tuple(key for key in found if key is not None)

    def _api_key(self, upstream: UpstreamConfig, source: KeySource) -> str | None:
        where = source.file or _shown(source.env or "")
        if source.file is not None:
            try:
                key: str | None = source.file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                raise ConfigurationError(
                    f"WEIR_CONFIG: upstream {upstream.name!r}: its api_key_file "
                    f"{_shown(str(source.file))} cannot be read"
                ) from None
        elif source.env == "OPENAI_API_KEY":
            key = revealed(self.settings.openai_api_key)
            if key is None and not self.file.upstreams:
                return None  # the upstream that needs no YAML may need no key either
        else:
            key = os.environ.get(source.env or "") or None
        if key is None:
            raise ConfigurationError(
                f"WEIR_CONFIG: upstream {upstream.name!r}: the environment has no "
                f"{_shown(source.env or '')}, its api_key_env"
            )
        if not _KEY.fullmatch(key):
            raise ConfigurationError(
                f"upstream {upstream.name!r}: its key (not shown) in {where} must be one word of "
                "ASCII letters"
            )
        if upstream.base_url and _is_openai(upstream.base_url) and not _OPENAI_KEY.fullmatch(key):
            raise ConfigurationError(
                f"upstream {upstream.name!r}: its key (not shown) in {where} must begin with `sk-` for "
                f"{OPENAI_HOST}"
            )
        return key

    @property
    def default_model(self) -> str:
        """The model for calls of /api/v1 that name none."""
        if self.settings.openai_model:
            return self.settings.openai_model
        if self.file.models:
            return self.file.models[0].name
        if all(u.kind is UpstreamKind.SIMULATOR for u in self.upstreams):
            return SIMULATOR
        return "gpt-4o-mini"

    @property
    def open_to_all(self) -> bool:
        """No credential is asked for."""
        return self.settings.auth == "none" or not (self.keys or self.settings.weir_keys_file)

    @property
    def host(self) -> str:
        """Where to listen: loopback unless told otherwise, and then only with keys or AUTH=none."""
        return self.settings.host or "127.0.0.1"

    @property
    def admin_host(self) -> str:
        return self.settings.admin_host or self.host

    def check_exposure(self) -> None:
        """Raises ConfigurationError if strangers could use the upstream's key."""
        if self.settings.auth == "keys" and self.open_to_all and not is_loopback(self.host):
            raise ConfigurationError(
                f"HOST={self.host}: without API keys only loopback (127.0.0.1) is allowed; "
                "give keys in WEIR_CONFIG or WEIR_KEYS_FILE (python -m service make-key makes one), "
                "or set AUTH=none to let everybody in"
            )


def load_settings() -> Settings:
    """Read the environment alone. Raises ConfigurationError."""
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigurationError(_explain(error, Settings)) from None


def load(settings: Settings | None = None) -> Configuration:
    """Read the environment and the files that it names. Raises ConfigurationError."""
    if settings is None:
        settings = load_settings()
    return join(settings, *read_config(settings))


def read_config(settings: Settings) -> tuple[FileConfig, str]:
    """The YAML file and its version, its SHA-256. Raises ConfigurationError."""
    if settings.weir_config is None:
        return FileConfig(), ""
    content = _read(settings.weir_config)
    return _parse(settings.weir_config, content, FileConfig), hashlib.sha256(content).hexdigest()


def join(settings: Settings, file: FileConfig, version: str) -> Configuration:
    """Settings and a YAML file that was read, with the keys that they name. Raises ConfigurationError."""
    keys = read_keys(settings.weir_keys_file, file.keys) if settings.weir_keys_file else file.keys
    configuration = Configuration(settings=settings, file=file, keys=keys, version=version)
    known = [u.name for u in configuration.upstreams]
    for model in file.models:
        for place in model.places:
            if place.upstream not in known:
                raise ConfigurationError(
                    f"WEIR_CONFIG: model {model.name!r} names the upstream {place.upstream!r}; "
                    f"there is {', '.join(known)}"
                )
    for upstream in configuration.upstreams:
        configuration.api_keys(upstream)
    configuration.check_exposure()
    return configuration


def read_keys(path: Path, always: tuple[KeyConfig, ...] = ()) -> tuple[KeyConfig, ...]:
    """`always`, those of WEIR_CONFIG, and the keys of a file. Raises ConfigurationError.

    Keys never appear in its message, hashes neither.
    """
    keys = always + read_file(path, KeysFile).keys
    if len({k.name for k in keys}) < len(keys) or len({k.sha256 for k in keys}) < len(keys):
        also = " (WEIR_CONFIG has keys too)" if always else ""
        raise ConfigurationError(f"{path}: a key's name or hash is there twice{also}")
    return keys


def read_file(path: Path, shape: type[_Shape]) -> _Shape:
    """A YAML file as `shape`. Raises ConfigurationError with the place in the file."""
    return _parse(path, _read(path), shape)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: Path, text: bytes, shape: type[_Shape]) -> _Shape:
    try:
        content = yaml.safe_load(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "no YAML"
        raise ConfigurationError(f"{path}: is not valid YAML{where}: {problem}") from None
    except (ValueError, RecursionError, LookupError, AttributeError):
        # What PyYAML lets through: a date such as 2024-99-99, a tag such as `!!int` with nothing behind it.
        raise ConfigurationError(f"{path}: is not valid YAML: a value in it cannot be read") from None
    try:
        return shape.model_validate(content if content is not None else {})
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {_explain(error, shape)}") from None


def _shown(source: str) -> str:
    """Where a key is said to be, unless that looks like the key itself."""
    return source if "/" in source or _VARIABLE.fullmatch(source) else "(not shown)"


def revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_openai(base_url: str) -> bool:
    return urlsplit(base_url).hostname == OPENAI_HOST


def _check_http_url(url: str) -> None:
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        good = False
    if not good:
        raise ValueError("must be a URL such as https://host/v1")


def _check_redis_url(url: str) -> None:
    parts = _split_secret_url(url)
    if parts.scheme not in _REDIS_SCHEMES or not parts.netloc.rpartition("@")[2]:
        raise ValueError(f"must be a URL with one of the schemes {', '.join(_REDIS_SCHEMES)} and a host")
    if parts.scheme.endswith("+sentinel") and "master=" not in parts.query:
        raise ValueError("a Sentinel URL must name the master: redis+sentinel://host:26379/0?master=NAME")


def _check_postgres_url(url: str) -> None:
    parts = _split_secret_url(url)
    if parts.scheme not in ("postgresql", "postgres") or not parts.netloc.rpartition("@")[2]:
        raise ValueError("must be a URL such as postgresql://user@host:5432/database")
    if parts.netloc.count("@") > 1 or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("cannot be read as an address; letters such as / @ # ? in a password want %-codes")
    if not parts.path.strip("/"):
        raise ValueError("must name a database: postgresql://user@host:5432/database")


def _split_secret_url(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # its words would show a piece of the address, which may be of the password
        raise ValueError(
            "cannot be read as an address; letters such as [ ] / @ in a password want %-codes"
        ) from None


def _explain(error: ValidationError, shape: type[BaseModel]) -> str:
    return "\n".join(_line(detail, shape) for detail in error.errors(include_url=False))


def _line(detail: ErrorDetails, shape: type[BaseModel]) -> str:
    """One line: where=value: what is allowed."""
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    environment = shape is Settings
    name = ".".join(str(part) for part in detail["loc"])
    field = str(detail["loc"][0])
    if environment:
        annotation = shape.model_fields[field].annotation
        secret = "SecretStr" in str(annotation)
        hint = f" ({shape.model_fields[field].description})"
        shown = "(hidden)" if secret else _CREDENTIALS.sub("//(hidden)@", str(detail["input"]))
        return f"{name.upper()}={shown}: {message}{hint}"
    # Not the value of an unknown field either: it may be an `api_key` that has no place here.
    hidden = (
        "keys" in detail["loc"]
        or any(str(part).startswith("api_key") for part in detail["loc"])
        or detail["type"] == "extra_forbidden"
    )
    value = "" if hidden or isinstance(detail["input"], dict | list) else f" {detail['input']!r}"
    return f"{name}{value}: {message}"
