"""What the core asks of the outside: Protocols of one to three methods each.

Adapters live in `stores` and `upstreams`; `app.create_app` joins them. All of them raise only
errors of `service.errors`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from enum import Enum, auto
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from service.domain import (
    AttemptKind,
    Call,
    Conversation,
    Cost,
    Outcome,
    Price,
    Principal,
    RequestRecord,
    Standing,
    Turn,
    Usage,
)
from service.errors import UpstreamError, WeirError


class WholeAnswer(msgspec.Struct, frozen=True):
    """A complete answer: JSON bytes as the upstream sent them."""

    body: bytes
    upstream_request_id: str | None = None
    secret: str | None = None
    """As that of a stream."""


class StreamedAnswer(Protocol):
    """An answer that comes in pieces: Server-Sent Events as bytes, cut anywhere."""

    @property
    def upstream_request_id(self) -> str | None: ...

    @property
    def secret(self) -> str | None:
        """The API key that it was asked for with: nobody else is to read it in the upstream's words."""
        ...

    async def read(self) -> bytes:
        """The next bytes, b"" at the end. Raises StreamTruncated when the connection breaks."""
        ...

    async def close(self) -> None:
        """Give up the upstream's connection at once, unless the stream was read to its end."""
        ...


class Upstream(Protocol):
    """A place that serves models."""

    name: str
    provider: str

    async def send(self, call: Call) -> WholeAnswer | StreamedAnswer:
        """Ask. Raises UpstreamError when there is no good answer; cancelling gives up the call."""
        ...

    async def models(self) -> Sequence[dict[str, Any]]:
        """The models that the upstream lists, as OpenAI's model objects."""
        ...

    def note(self, key: str | None, error: UpstreamError) -> None:
        """A call with `key` failed after its head: an error below a status of 200 may be that of its key."""
        ...

    async def close(self) -> None: ...


class Target(msgspec.Struct, frozen=True):
    """Where a model's calls go: the upstream, the model's name there, and what is known of it. Seconds."""

    upstream: Upstream
    model: str
    stream_usage: bool = True
    """The upstream counts tokens in streams when it is asked to."""
    name: str = ""
    """What the model is called here, whichever alias a caller used."""
    max_output_tokens: int | None = None
    context_tokens: int | None = None
    cache_ttl_seconds: float | None = None
    """None: as for all."""
    price: Price | None = None
    """Of the configuration, for this place or for the model."""
    first_byte_seconds: float | None = None
    """For a whole answer, or the first event of a stream."""
    idle_seconds: float | None = None


class PriceBook(Protocol):
    """What tokens cost and how much context a model has. Never waits."""

    def cost(self, model: str, provider: str, response_model: str, usage: Usage) -> Cost: ...

    def context_tokens(self, model: str, provider: str) -> int | None: ...


class Authenticator(Protocol):
    """Credential -> principal. Raises AuthenticationFailed. Never waits."""

    def principal(self, authorization: str | None) -> Principal: ...


class Demand(msgspec.Struct, frozen=True):
    """What a request asks for before its call; tokens and dollars are estimates, 0 where none are needed."""

    model: str
    address: str = ""
    """The client's, as the nearest trusted proxy names it."""
    tokens: int = 0
    usd: float = 0.0
    most_usd: float = 0.0
    """What the call may cost at the most, as far as anybody can say."""


class Reservation(msgspec.Struct, frozen=True):
    """What was set aside for one request, until `settle` says what it really used."""

    standing: Standing = Standing()
    held: Any = None
    """The store's own note."""


class Accounts(Protocol):
    """Limits, budgets and the book of all requests: reserve before a call, settle after it.

    Whatever its end, each request comes into the book exactly once, by its record's id.
    """

    @property
    def by_address(self) -> bool:
        """Whether any rule counts by the client's address, so that a demand needs it."""
        ...

    def estimates(self, principal: Principal, model: str) -> bool:
        """Whether any rule for them counts tokens or dollars, so that a demand needs estimates."""
        ...

    async def reserve(self, record: RequestRecord, demand: Demand) -> Reservation:
        """Set aside what `demand` says. Raises RateLimited, BudgetExceeded, StateUnavailable."""
        ...

    async def settle(self, record: RequestRecord, reservation: Reservation | None) -> None:
        """Enter the record, count what it used, give back the rest; None: nothing was reserved."""
        ...


class Cache(Protocol):
    """Answers, and whatever else is slow to get, kept for a while. Never raises: what fails is a miss."""

    async def get(self, tenant: str, name: str) -> bytes | None: ...

    async def put(self, tenant: str, name: str, value: bytes, ttl_seconds: float) -> None: ...


class Place(msgspec.Struct, frozen=True):
    """Where the answer to one idempotency key is: each owner has its own, for each route."""

    tenant: str
    key: str
    """The name of the API key."""
    name: str
    """Made of the route and the idempotency key; letters and digits."""


class ClaimState(Enum):
    """What a request with an idempotency key finds."""

    TAKEN = auto()
    """Nobody else runs it: go on."""
    RUNNING = auto()
    """An equal one runs."""
    KEPT = auto()
    """An equal one was answered."""
    OTHER = auto()
    """The key is that of another request."""


class Claim(msgspec.Struct, frozen=True):
    """What was found, and with KEPT the answer."""

    state: ClaimState
    answer: bytes = b""


class Replays(Protocol):
    """Which requests with an idempotency key run, and the answers to those that did, for all pods.

    A claim is a lease: whoever runs a request takes its claim again before `lease_seconds` are over.
    """

    @property
    def lease_seconds(self) -> float: ...

    async def claim(self, place: Place, fingerprint: bytes, token: str) -> Claim:
        """Take the place for one request, or take it again with the same token. Raises StateUnavailable."""
        ...

    async def keep(self, place: Place, fingerprint: bytes, token: str, answer: bytes) -> bool:
        """End the claim with an answer; False if the place is another's by now. Raises StateUnavailable."""
        ...

    async def release(self, place: Place, token: str) -> None:
        """End the claim without one: the next request runs. Raises StateUnavailable."""
        ...

    async def erase(self, tenant: str) -> int:
        """Forget all answers of a tenant; how many there were. Raises StateUnavailable."""
        ...


PlaceName: TypeAlias = tuple[str, str]
"""An upstream, and a model's name there."""


class Circuits(Protocol):
    """Which places the processes of a fleet have found failing."""

    @property
    def available(self) -> bool:
        """Whether it makes sense to ask just now."""
        ...

    async def exchange(
        self, opened: Mapping[PlaceName, float], closed: Collection[PlaceName]
    ) -> Mapping[PlaceName, float]:
        """Tell what was opened, for so many seconds, and closed; all that are open, with the seconds left.

        Raises StateUnavailable.
        """
        ...


class UsageRow(msgspec.Struct, frozen=True):
    """What was used in one hour or day by one key at one model. `at`: its first second since 1970, UTC."""

    at: int
    tenant: str
    key: str
    model: str
    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nano_usd: int = 0
    """Billionths of a US dollar, so that sums are exact."""
    unpriced: int = 0
    """Requests with tokens whose price nobody knows."""
    cache_hits: int = 0


class UsageBook(Protocol):
    """The sums of the ledger by hour (for 35 days) and by day (for 400 days)."""

    async def tenants(self) -> Sequence[str]: ...

    async def rows(
        self, tenant: str, since: int, until: int, unit: Literal["hour", "day"]
    ) -> Sequence[UsageRow]:
        """Those whose `at` is from `since` up to and without `until`. Raises StateUnavailable."""
        ...


class Conversations(Protocol):
    """Conversations, each seen by its owner alone: another's id is as unknown as no id at all."""

    async def load(self, principal: Principal, conversation_id: str) -> Conversation | None: ...

    async def append(
        self,
        principal: Principal,
        conversation_id: str,
        turn: Turn,
        system_prompt: str | None,
        *,
        begin: bool,
    ) -> bool:
        """Add a whole turn, or with `begin` begin the conversation with it.

        False if it is not there any more: what was deleted during a turn stays deleted. A
        `system_prompt` of None leaves the conversation's own.
        """
        ...

    async def list(self, principal: Principal, limit: int) -> Sequence[Conversation]:
        """The latest `limit` conversations of a principal, the newest first, without their messages."""
        ...

    async def delete(self, principal: Principal, conversation_id: str) -> bool:
        """True if there was one."""
        ...

    def of_tenant(self, tenant: str) -> AsyncGenerator[Conversation]:
        """All of a tenant's conversations with the messages that are kept, owner by owner."""
        ...

    async def erase(self, tenant: str) -> int:
        """Delete all conversations of a tenant; how many there were."""
        ...


class Step(Protocol):
    """A span over a block of code: `with step:`."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class AttemptSpan(Protocol):
    """The span of one attempt at an upstream. It ends once: by `failed`, `cut` or `done`."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What tells the upstream that its own spans belong below this one."""
        ...

    def answered(self, answer: WholeAnswer | StreamedAnswer) -> WholeAnswer | StreamedAnswer:
        """The upstream answered well. Returns the answer, maybe as another object that reads as it does."""
        ...

    def begun(self) -> None:
        """The whole answer, or a stream's first event, is there."""
        ...

    def failed(self, error: Exception) -> None: ...

    def cut(self, error: WeirError) -> None:
        """Nobody waited for its end any more, for the reason that `error` is."""
        ...

    def done(self, record: RequestRecord | None) -> None:
        """The answer is over: that of `record`, or with None one that nobody took."""
        ...


class Spans(Protocol):
    """The spans of one request that is sampled. Nothing here waits or fails, and each span ends once.

    The request's own span ends when whoever opened it, and each exchange that it went on to, has left.
    """

    def part(self, name: str) -> Spans:
        """The spans of one of several exchanges of a request, below one of their own."""
        ...

    def opened(self) -> None:
        """An exchange begins, which will leave."""
        ...

    def step(self, name: str) -> Step: ...

    def attempt(self, call: Call, target: Target, kind: AttemptKind) -> AttemptSpan: ...

    def first_token(self, seconds: float) -> None:
        """The first piece of a stream's answer came, so long after the exchange began."""
        ...

    def closed(self, record: RequestRecord) -> None:
        """What is known of an exchange is in its record."""
        ...

    def finished(self, method: str, route: str, status: int, outcome: Outcome, request_id: str) -> None:
        """The request was answered; this leaves, too."""
        ...

    def left(self) -> None:
        """An exchange was settled."""
        ...


class Trace(msgspec.Struct, frozen=True):
    """A request's place in a trace; `span_id` is that of its span here, if anything knows it."""

    id: str
    span_id: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    """What goes on to upstreams of it, where it is not sampled."""
    spans: Spans | None = None
    """Of a request that is sampled."""

    def part(self, name: str) -> Trace:
        """For one of several exchanges of a request."""
        return self if self.spans is None else msgspec.structs.replace(self, spans=self.spans.part(name))


class Recorder(Protocol):
    """Metrics and health: further views of the same record. Never waits, never fails."""

    def opened(self, record: RequestRecord) -> None: ...

    def queued(self, priority: str, seconds: float) -> None:
        """A request got its place, or was turned away, after so long."""
        ...

    def attempted(
        self,
        record: RequestRecord,
        error: WeirError | None,
        kind: AttemptKind,
        seconds: float,
        response_model: str = "",
    ) -> None:
        """One attempt at an upstream ended: with `error`, or well, in a stream with its first event."""
        ...

    def pace(self, record: RequestRecord, response_model: str) -> Callable[[float, int], None]:
        """What is told of a stream's further events: the seconds waited for them, and how many came."""
        ...

    def streamed(self, record: RequestRecord, seconds: float) -> None:
        """A stream is over, so long after it was asked for; the record says how, and is closed by now."""
        ...

    def unheard(self, record: RequestRecord, kind: AttemptKind, seconds: float) -> None:
        """A stream that had begun was given up for a quicker one."""
        ...

    def hedged(self, *, won: bool, wasted_usd: float) -> None:
        """A second call was made to be quicker: whether it was, and what the one that was given up cost."""
        ...

    def late(self, wasted_usd: float) -> None:
        """A call was given up as late, and another one stands in the record: what its question cost."""
        ...

    def standing(self, record: RequestRecord, standing: Standing) -> None:
        """How the request's principal stands with its limits and budgets."""
        ...

    def closed(self, record: RequestRecord) -> None: ...
