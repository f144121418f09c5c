"""The shapes of Weir's own API: they validate what comes in and make the OpenAPI page."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NotBlank = StringConstraints(min_length=1, max_length=5_000, pattern=r"\S")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ChatBody(_Body):
    """One turn of a conversation."""

    message: Annotated[str, NotBlank] = Field(
        description="What the user says: 1 to 5000 characters, not blank.",
        examples=["Why does a weir have steps?"],
    )
    conversation_id: UUID | None = Field(
        default=None, description="Goes on with this conversation; without it a new one begins."
    )
    system_prompt: str | None = Field(
        default=None,
        max_length=1_000,
        description="Kept for the conversation's later turns.",
        examples=["Answer in one sentence."],
    )
    temperature: float | None = Field(default=None, ge=0, le=2, examples=[0.2])
    max_tokens: int | None = Field(default=None, ge=1, le=4_000, examples=[300])
    model: str | None = Field(
        default=None, min_length=1, max_length=200, description="The configured model if absent."
    )
    stream: bool = Field(default=False, description="Answer as /api/v1/chat/stream does.")


class UsageOut(_Body):
    """Tokens of one call; all others are parts of the first two."""

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    audio_input_tokens: int
    audio_output_tokens: int
    source: str = Field(description="`provider`, or `estimated` where the provider did not count.")


class ChatAnswer(_Body):
    """The answer to one turn."""

    message: str
    conversation_id: UUID
    tokens_used: int
    model: str
    timestamp: datetime
    cost_estimate: float | None = Field(description="US dollars; null where the model's price is not known.")
    usage: UsageOut
    request_id: str


class StreamEvent(_Body):
    """One event of a streamed turn; the last has `finished` and the tokens used."""

    delta: str
    conversation_id: UUID
    finished: bool
    tokens_used: int | None = None


class MessageOut(_Body):
    role: str
    content: str
    timestamp: datetime


class ConversationSummary(_Body):
    """A conversation without its messages."""

    id: UUID
    created_at: datetime
    updated_at: datetime
    message_count: int
    total_tokens: int
    total_cost: float = Field(description="US dollars over all turns whose price is known.")
    unpriced_turns: int


class ConversationOut(ConversationSummary):
    """A conversation with the latest of its messages."""

    system_prompt: str | None
    messages: list[MessageOut]


class ConversationList(_Body):
    conversations: list[ConversationSummary]


class ConversationExport(ConversationOut):
    """One line of an export: a conversation, and the name of the API key that owns it."""

    key: str


class Erased(_Body):
    """What was erased of a tenant."""

    tenant: str
    conversations: int
    cached_answers: int = Field(description="In Redis; those in the memory of pods end by themselves.")
    idempotent_answers: int = Field(description="Those kept for their Idempotency-Key.")


class UsageQuery(_Body):
    """What `GET /api/v1/usage` may be asked for."""

    since: str | None = Field(
        default=None,
        alias="from",
        max_length=40,
        description="First day or time: a date or RFC 3339, UTC if it does not say. 30 days before `to`.",
        examples=["2026-11-01"],
    )
    until: str | None = Field(
        default=None,
        alias="to",
        max_length=40,
        description="Day or time at which it ends, itself not included; the end of today.",
        examples=["2026-12-01"],
    )
    group_by: str = Field(
        default="day,model",
        max_length=40,
        description="Any of tenant, key, model, day, hour, separated by commas: the columns in their order.",
    )
    unit: Literal["hour", "day"] | None = Field(
        default=None,
        description="Of which sums it is made: of days, kept for 400 days, or of hours, kept for 35 days. "
        "Hours if something asked for needs them.",
    )
    tenant: str | None = Field(
        default=None, max_length=200, description="Your own; with an admin's key any, or all if absent."
    )
    key: str | None = Field(default=None, max_length=200, description="Only this API key, by its name.")
    model: str | None = Field(
        default=None, max_length=200, description="Only this model; empty: requests that reached none."
    )
    format: Literal["json", "csv"] | None = Field(
        default=None, description="`json`, or `csv`, which `Accept: text/csv` asks for too."
    )


class UsageSums(_Body):
    """What was used. Requests that ended with an error are among the requests."""

    requests: int
    errors: int = Field(description="Neither success nor a caller who left.")
    input_tokens: int
    output_tokens: int
    cached_input_tokens: int = Field(description="Part of the input tokens.")
    reasoning_tokens: int = Field(description="Part of the output tokens.")
    total_tokens: int
    cost_usd: float = Field(description="US dollars, exact, with up to 9 decimals.")
    unpriced_requests: int = Field(description="Requests with tokens whose price is not known.")
    cache_hits: int


class UsageRowOut(UsageSums):
    """The sums of one group; it has the fields that `group_by` names."""

    tenant: str | None = None
    key: str | None = None
    model: str | None = Field(default=None, description="Empty for requests that reached no model.")
    day: str | None = None
    hour: str | None = None


class UsageReport(_Body):
    """What was used from one time to another, in groups and together."""

    since: datetime = Field(alias="from")
    until: datetime = Field(alias="to")
    unit: Literal["hour", "day"]
    group_by: list[str]
    rows: list[UsageRowOut] = Field(description="Sorted by the fields of `group_by`, in their order.")
    totals: UsageSums


class GenerateBody(_Body):
    """A single prompt without a conversation."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=20_000, pattern=r"\S")] = Field(
        examples=["Write a haiku about a river."]
    )
    max_tokens: int = Field(default=200, ge=1, le=4_000)
    temperature: float = Field(default=0.7, ge=0, le=2)
    model: str | None = Field(default=None, min_length=1, max_length=200)


class GenerateAnswer(_Body):
    text: str
    tokens_used: int
    model: str
    cost_estimate: float | None
    request_id: str


class BatchBody(_Body):
    """Up to 100 prompts; each has its own result or error."""

    prompts: list[Annotated[str, StringConstraints(min_length=1, max_length=20_000, pattern=r"\S")]] = Field(
        min_length=1, max_length=100, examples=[["Name a river.", "Name a lake."]]
    )
    max_tokens: int = Field(default=200, ge=1, le=4_000)
    temperature: float = Field(default=0.7, ge=0, le=2)
    model: str | None = Field(default=None, min_length=1, max_length=200)


class ErrorDetail(_Body):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(_Body):
    """Every error of every endpoint."""

    error: ErrorDetail


class BatchResult(_Body):
    """One prompt's end: either `text` or `error`."""

    index: int
    text: str | None = None
    tokens_used: int = 0
    cost_estimate: float | None = None
    error: ErrorDetail | None = None


class BatchAnswer(_Body):
    """Results in the order of the prompts."""

    results: list[BatchResult]
    succeeded: int
    failed: int
    tokens_used: int
    cost_estimate: float | None = Field(description="Sum in US dollars; null if a price is not known.")
    request_id: str


class Ready(_Body):
    """What answers at `/`."""

    name: str
    status: str
    version: str
    links: dict[str, str]


class Part(_Body):
    """The state of one part of the service."""

    status: str
    detail: dict[str, Any] = {}


class Health(_Body):
    """`ok`, or `degraded` while a part does not work as it should."""

    status: str
    version: str
    uptime_seconds: float
    parts: dict[str, Part]
