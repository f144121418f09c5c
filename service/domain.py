"""The words of the domain, as plain values without behaviour of the outside world.

`RequestRecord` is the centre: one is made for each request that reaches a model, filled on the way,
and closed exactly once. The ledger, the metrics, the span and the canonical log line are views of
that one record, so their sums agree by construction.
"""

from __future__ import annotations

import time
import uuid
from enum import StrEnum
from typing import Any, Final

import msgspec


class Outcome(StrEnum):
    """How a request truly ended; each request has exactly one."""

    SUCCESS = "success"
    CLIENT_ERROR = "client_error"
    RATE_LIMITED = "rate_limited"
    BUDGET_REJECTED = "budget_rejected"
    CLIENT_DISCONNECTED = "client_disconnected"
    UPSTREAM_ERROR = "upstream_error"
    TIMEOUT = "timeout"
    STREAM_TRUNCATED = "stream_truncated"
    OVERLOADED = "overloaded"
    INTERNAL_ERROR = "internal_error"


FAULTS: Final = frozenset(
    (
        *(Outcome.UPSTREAM_ERROR, Outcome.TIMEOUT, Outcome.STREAM_TRUNCATED),
        *(Outcome.OVERLOADED, Outcome.INTERNAL_ERROR),
    )
)
"""Ends that count against the availability: docs/slo.md. Errors of spans, warnings of the log."""

CALLERS_FAULTS: Final = frozenset(
    (
        *(Outcome.CLIENT_ERROR, Outcome.RATE_LIMITED),
        *(Outcome.BUDGET_REJECTED, Outcome.CLIENT_DISCONNECTED),
    )
)
"""Ends that say nothing of the service: the availability does not count them at all."""


class Operation(StrEnum):
    """What a caller asks of a model; the value is the path below an OpenAI-compatible base URL."""

    CHAT = "chat/completions"
    TEXT_COMPLETION = "completions"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"

    @property
    def genai_name(self) -> str:
        """The operation's name in OpenTelemetry's GenAI conventions."""
        return _GENAI_NAMES[self]


_GENAI_NAMES: Final = {
    Operation.CHAT: "chat",
    Operation.TEXT_COMPLETION: "text_completion",
    Operation.EMBEDDINGS: "embeddings",
    Operation.RESPONSES: "chat",
}


class Principal(msgspec.Struct, frozen=True):
    """Who calls: the name of an API key and the tenant that it belongs to. Never the key itself."""

    name: str
    tenant: str
    priority: str = "normal"
    """The class of its requests under overload: high, normal or low."""
    admin: bool = False
    """May see all tenants' usage, export and erase; says nothing of models."""
    models: tuple[str, ...] = ()
    """Those that it may use, with `*` for any letters; all where none is named."""


ANONYMOUS: Final = Principal(name="anonymous", tenant="default")


class UsageSource(StrEnum):
    """Who counted the tokens: the provider, or Weir where the provider's count never came."""

    PROVIDER = "provider"
    ESTIMATED = "estimated"


class CacheUse(StrEnum):
    """What the response cache was to a request: it answered, it did not know, or nobody asked it."""

    HIT = "hit"
    MISS = "miss"
    BYPASS = "bypass"


class AttemptKind(StrEnum):
    """Why an upstream was asked: first, again, elsewhere, for another model, to be quicker."""

    FIRST = "first"
    RETRY = "retry"
    FAILOVER = "failover"
    FALLBACK = "fallback"
    HEDGE = "hedge"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request; all but the first two are parts of these: cached, written, reasoning, audio."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    source: UsageSource = UsageSource.PROVIDER

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class Cost(msgspec.Struct, frozen=True):
    """What a request cost in US dollars; `usd` is None where nobody knows the model's price."""

    usd: float | None
    source: str


UNPRICED: Final = Cost(usd=None, source="unpriced")


class Call(msgspec.Struct):
    """One question to a model: the request body as bytes, and the few fields of it that Weir reads."""

    operation: Operation
    model: str
    body: bytes
    stream: bool = False
    usage_shown: bool = False
    """The caller asked for the usage chunk of a stream (`stream_options.include_usage`)."""
    parameters: dict[str, Any] | None = None
    """The decoded body, where somebody made it already: else it is decoded only when it is needed."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers of the caller that go on to the upstream."""
    session: str = ""
    """What its caller names so that calls of one conversation are known as such."""


class Window(msgspec.Struct, frozen=True):
    """Where a principal stands with a limit: `remaining` of `limit`, whole again in `reset_seconds`."""

    limit: int
    remaining: int
    reset_seconds: float


class BudgetState(msgspec.Struct, frozen=True):
    """How much of a budget is spent; `key` is empty where a whole tenant shares it."""

    name: str
    key: str
    used_ratio: float
    remaining_usd: float
    warns: bool


class Standing(msgspec.Struct, frozen=True):
    """How near a principal is to its ends: the tightest limit of each kind, and all budgets."""

    requests: Window | None = None
    tokens: Window | None = None
    budgets: tuple[BudgetState, ...] = ()


class RequestRecord(msgspec.Struct):
    """All that is known of one request; see the module's docstring. Times are seconds."""

    id: str
    """Made here and never taken from the caller: what makes a ledger entry the only one."""
    request_id: str
    route: str
    operation: Operation
    principal: Principal = ANONYMOUS
    started_at: float = msgspec.field(default_factory=time.time)
    request_model: str = ""
    response_model: str = ""
    answered_by: str | None = None
    """The model that stood in for the one that was asked for."""
    provider: str = ""
    upstream: str = ""
    stream: bool = False
    outcome: Outcome = Outcome.INTERNAL_ERROR
    error_code: str | None = None
    usage: Usage | None = None
    cost: Cost = UNPRICED
    cache: CacheUse | None = None
    """None where there is no cache at all."""
    saved_usd: float | None = None
    """What the answer cost when it was first given, for one that came from the cache."""
    attempts: int = 0
    duration_seconds: float = 0.0
    queue_seconds: float | None = None
    """The wait for a place; None where there was one at once."""
    upstream_seconds: float = 0.0
    """All attempts, each until the whole answer or the first event of its stream was there."""
    overhead_seconds: float | None = None
    """Weir's own part of the duration: without any waiting, and without the passing on of a stream."""
    time_to_first_token_seconds: float | None = None
    time_per_output_token_seconds: float | None = None
    finish_reason: str | None = None
    response_id: str | None = None
    upstream_request_id: str | None = None
    conversation_id: str | None = None
    trace_id: str | None = None
    sampled: bool = False
    """Its trace has spans, and can be looked up."""


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str
    at: float = 0.0
    """Seconds since 1970, UTC."""


class Turn(msgspec.Struct, frozen=True):
    """What one answered question adds to a conversation, all of it or nothing."""

    messages: tuple[Message, ...]
    tokens: int
    cost_usd: float | None
    id: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    """What makes it the same turn when it is sent to a store once more."""


class Conversation(msgspec.Struct):
    """A conversation as its owner sees it: the latest messages, and totals over its whole life."""

    id: str
    principal: Principal
    system_prompt: str | None = None
    messages: tuple[Message, ...] = ()
    total_messages: int = 0
    total_tokens: int = 0
    total_cost_usd: float = 0.0
    unpriced_turns: int = 0
    created_at: float = 0.0
    updated_at: float = 0.0


class ChatRequest(msgspec.Struct, frozen=True):
    """One turn that a caller of /api/v1/chat asks for; None means: as configured."""

    message: str
    conversation_id: str | None = None
    system_prompt: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    model: str | None = None


class Price(msgspec.Struct, frozen=True):
    """US dollars per million tokens. What has no price of its own costs what its total costs."""

    input: float
    output: float
    cached_input: float | None = None
    cache_write: float | None = None
    audio_input: float | None = None
    audio_output: float | None = None
