"""What the core asks of the outside: Protocols of one to three methods each.

Adapters live in `stores` and `upstreams`; `app.create_app` joins them. All of them raise only
errors of `service.errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from service.domain import Call, Conversation, Cost, Principal, RequestRecord, Turn, Usage
from service.errors import WeirError


class WholeAnswer(msgspec.Struct, frozen=True):
    """A complete answer: JSON bytes as the upstream sent them."""

    body: bytes
    upstream_request_id: str | None = None


class StreamedAnswer(Protocol):
    """An answer that comes in pieces: Server-Sent Events as bytes, cut anywhere."""

    @property
    def upstream_request_id(self) -> str | None: ...

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

    async def close(self) -> None: ...


class Target(msgspec.Struct, frozen=True):
    """Where a model's calls go: the upstream, the model's name there, and whether it counts in streams."""

    upstream: Upstream
    model: str
    stream_usage: bool = True


class Catalogue(Protocol):
    """Which models there are and where each is served."""

    def resolve(self, model: str) -> Target:
        """The target for a model or alias. Raises ModelNotFound."""
        ...

    async def models(self) -> Sequence[dict[str, Any]]:
        """All that a caller may name, as OpenAI's model objects."""
        ...


class PriceBook(Protocol):
    """What tokens cost and how much context a model has. Never waits."""

    def cost(self, model: str, provider: str, response_model: str, usage: Usage) -> Cost: ...

    def context_tokens(self, model: str, provider: str) -> int | None: ...


class Authenticator(Protocol):
    """Credential -> principal. Raises AuthenticationFailed. Never waits."""

    def principal(self, authorization: str | None) -> Principal: ...


class Limiter(Protocol):
    """How much a principal may ask for."""

    async def admit(self, principal: Principal) -> None:
        """Count one request. Raises RateLimited."""
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
        """The latest `limit` conversations of a principal, the newest first."""
        ...

    async def delete(self, principal: Principal, conversation_id: str) -> bool:
        """True if there was one."""
        ...


class Ledger(Protocol):
    """The book of all requests: exactly one record for each."""

    async def enter(self, record: RequestRecord) -> None: ...


class Recorder(Protocol):
    """Metrics and spans: further views of the same record. Never waits, never fails."""

    def opened(self, record: RequestRecord, traceparent: str | None) -> None: ...

    def attempted(self, record: RequestRecord, error: WeirError | None) -> None:
        """One attempt at an upstream ended: well, or with `error`."""
        ...

    def closed(self, record: RequestRecord) -> None: ...
