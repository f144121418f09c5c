"""The words of the domain, as plain values without behaviour of the outside world.

`RequestRecord` is the centre: one is made for each request that reaches a model, filled on the way,
and closed exactly once. The ledger, the metrics, the span and the canonical log line are views of
that one record, so their sums agree by construction.
"""

from __future__ import annotations

import time
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


ANONYMOUS: Final = Principal(name="anonymous", tenant="default")


class UsageSource(StrEnum):
    """Who counted the tokens: the provider, or Weir where the provider's count never came."""

    PROVIDER = "provider"
    ESTIMATED = "estimated"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request. `cached_input`, `cache_write` and `reasoning` are parts of the totals."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
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
    provider: str = ""
    upstream: str = ""
    stream: bool = False
    outcome: Outcome = Outcome.INTERNAL_ERROR
    error_code: str | None = None
    usage: Usage | None = None
    cost: Cost = UNPRICED
    attempts: int = 0
    duration_seconds: float = 0.0
    upstream_seconds: float = 0.0
    time_to_first_token_seconds: float | None = None
    time_per_output_token_seconds: float | None = None
    finish_reason: str | None = None
    response_id: str | None = None
    upstream_request_id: str | None = None
    conversation_id: str | None = None
    trace_id: str | None = None


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
