"""Settings: the only reader of the environment, of `.env` and of the YAML file.

The environment wins over `.env`. The YAML file (`WEIR_CONFIG`) holds what has a structure: upstreams,
models, prices, API keys. A wrong value becomes a `ConfigurationError` whose message is one line for
each: the setting, the value (never a secret's) and what is allowed.
"""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
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
        return self


class ModelConfig(_File):
    """One model that callers may name, and where its calls go."""

    name: str = Field(min_length=1, max_length=200)
    upstream: str
    upstream_model: str | None = None
    aliases: tuple[str, ...] = ()
    price: PriceConfig | None = None
    context_tokens: int | None = Field(default=None, ge=1)


class KeyConfig(_File):
    """One API key: only its SHA-256 is kept. `python -m service make-key` makes one."""

    name: str = Field(min_length=1, max_length=64)
    tenant: str = Field(default="default", min_length=1, max_length=64)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class FileConfig(_File):
    """The YAML file as a whole."""

    upstreams: tuple[UpstreamConfig, ...] = ()
    models: tuple[ModelConfig, ...] = ()
    keys: tuple[KeyConfig, ...] = ()

    @model_validator(mode="after")
    def _joined(self) -> Self:
        upstreams = [u.name for u in self.upstreams]
        names = [n for m in self.models for n in (m.name, *m.aliases)]
        for what, given in (
            ("upstream", upstreams),
            ("model or alias", names),
            ("key", [k.name for k in self.keys]),
            ("key hash of", [k.sha256 for k in self.keys]),
        ):
            twice = {n for n in given if given.count(n) > 1}
            if twice:
                raise ValueError(f"the {what} {min(twice)!r} is there twice")
        for model in self.models:
            if self.upstreams and model.upstream not in upstreams:
                raise ValueError(
                    f"model {model.name!r} names the upstream {model.upstream!r}, "
                    f"which is not one of {', '.join(upstreams)}"
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
        default=None, description="YAML file with upstreams, models, aliases, prices and keys."
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
    rate_limit_requests: int | None = Field(
        default=None, ge=1, description="Requests that each principal may make per window; unset: no limit."
    )
    rate_limit_window: float = Field(
        default=60.0, gt=0, le=86400, description="Length of the window in seconds."
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
        default=10_000, ge=1, description="Conversations kept in memory; the longest unused one goes first."
    )

    # Redis: read and checked; its stores come with a later version
    redis_url: SecretStr | None = Field(
        default=None,
        description="redis://, rediss://, redis+sentinel://h:26379,h2:26379/0?master=NAME, redis+cluster://h:6379,h2.",
    )
    redis_max_connections: int = Field(
        default=50, ge=1, le=10_000, description="Connections to Redis from one process."
    )

    # What it tells
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        default="info", description="debug, info, warning, error or critical."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="json, console (coloured), or auto: console on a terminal."
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

    @field_validator("log_level", "log_format", "auth", "otel_traces_sampler", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(v.strip() for v in value.split(",") if v.strip()) if isinstance(value, str) else value

    @field_validator("openai_base_url", "otel_exporter_otlp_endpoint", "otel_exporter_otlp_traces_endpoint")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None:
            _check_http_url(value)
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_redis_url(value.get_secret_value())
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
    def traces_endpoint(self) -> str | None:
        """Where spans go, or None when there are no traces."""
        if self.otel_sdk_disabled:
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

    def api_key(self, upstream: UpstreamConfig) -> str | None:
        """The upstream's own key. Raises ConfigurationError if its file or variable is not there."""
        if upstream.api_key_file is not None:
            try:
                key: str | None = upstream.api_key_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                raise ConfigurationError(
                    f"WEIR_CONFIG: upstream {upstream.name!r}: its api_key_file "
                    f"{upstream.api_key_file} cannot be read"
                ) from None
        elif upstream.api_key_env is None:
            return None
        elif upstream.api_key_env == "OPENAI_API_KEY":
            known = self.settings.openai_api_key
            key = known.get_secret_value() if known else None
            if key is None and not self.file.upstreams:
                return None  # the upstream that needs no YAML may need no key either
        else:
            key = os.environ.get(upstream.api_key_env) or None
        if key is None:
            raise ConfigurationError(
                f"WEIR_CONFIG: upstream {upstream.name!r}: the environment has no "
                f"{upstream.api_key_env}, its api_key_env"
            )
        if not _KEY.fullmatch(key):
            raise ConfigurationError(
                f"upstream {upstream.name!r}: its key (not shown) in "
                f"{upstream.api_key_file or upstream.api_key_env} must be one word of ASCII letters"
            )
        if upstream.base_url and _is_openai(upstream.base_url) and not _OPENAI_KEY.fullmatch(key):
            raise ConfigurationError(
                f"upstream {upstream.name!r}: its key (not shown) in "
                f"{upstream.api_key_file or upstream.api_key_env} must begin with `sk-` for {OPENAI_HOST}"
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


def load(settings: Settings | None = None) -> Configuration:
    """Read the environment and the files that it names. Raises ConfigurationError."""
    if settings is None:
        try:
            settings = Settings()
        except ValidationError as error:
            raise ConfigurationError(_explain(error, Settings)) from None
    file = read_file(settings.weir_config, FileConfig) if settings.weir_config else FileConfig()
    keys = read_keys(settings.weir_keys_file, file.keys) if settings.weir_keys_file else file.keys
    configuration = Configuration(settings=settings, file=file, keys=keys)
    known = [u.name for u in configuration.upstreams]
    for model in file.models:
        if model.upstream not in known:
            raise ConfigurationError(
                f"WEIR_CONFIG: model {model.name!r} names the upstream {model.upstream!r}; "
                f"there is {', '.join(known)}"
            )
    for upstream in configuration.upstreams:
        configuration.api_key(upstream)
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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "no YAML"
        raise ConfigurationError(f"{path}: is not valid YAML{where}: {problem}") from None
    except (ValueError, RecursionError):  # what PyYAML lets through: a date such as 2024-99-99
        raise ConfigurationError(f"{path}: is not valid YAML: a value in it cannot be read") from None
    try:
        return shape.model_validate(content if content is not None else {})
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {_explain(error, shape)}") from None


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
    parts = urlsplit(url)
    if parts.scheme not in _REDIS_SCHEMES or not parts.netloc.rpartition("@")[2]:
        raise ValueError(f"must be a URL with one of the schemes {', '.join(_REDIS_SCHEMES)} and a host")
    if parts.scheme.endswith("+sentinel") and "master=" not in parts.query:
        raise ValueError("a Sentinel URL must name the master: redis+sentinel://host:26379/0?master=NAME")


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
    hidden = "keys" in detail["loc"] or detail["type"] == "extra_forbidden"
    value = "" if hidden or isinstance(detail["input"], dict | list) else f" {detail['input']!r}"
    return f"{name}{value}: {message}"
