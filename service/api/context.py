"""What is known of an HTTP request while it runs: made by the outermost middleware, filled by the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final
from urllib.parse import quote

from service.api.address import Network, client_address
from service.caching.policy import NO_WISH, Wish, read_wish
from service.chat import Exchange
from service.domain import ANONYMOUS, Principal, RequestRecord
from service.errors import InvalidRequest
from service.overload import Priority
from service.ports import Trace
from service.serving import Snapshot

SCOPE_KEY: Final = "weir"
TIMEOUT_MOST_SECONDS: Final = 1_000_000.0
_AS_THEY_ARE: Final = "/:@+,=;!$&'()*[]"
"""In the name of a model in a header; other letters than these and ASCII's own are percent-encoded."""


class Dialect(Enum):
    """How a stream that has begun tells of an error."""

    CHUNKS = "data-only events, as in chat and text completions"
    RESPONSES = "named events, as in the Responses API"
    NATIVE = "events of /api/v1/chat/stream"


class RequestContext:
    """One HTTP request. `headers` has lower-case names; of several equal ones the last."""

    __slots__ = (
        "_client",
        "_raw_headers",
        "_trusted",
        "batch",
        "body",
        "complete",
        "dialect",
        "error_code",
        "exchange",
        "headers",
        "method",
        "path",
        "principal",
        "priority",
        "record",
        "request_id",
        "snapshot",
        "started",
        "status",
        "trace",
    )

    def __init__(self, scope: Any, request_id: str, trusted: Sequence[Network] = ()) -> None:
        """`trusted` are the networks of TRUSTED_PROXIES."""
        self._trusted = trusted
        self.request_id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._client: tuple[str, int] | None = scope.get("client")
        self._raw_headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self.headers: dict[bytes, bytes] = dict(self._raw_headers)
        self.started = time.perf_counter()
        self.snapshot: Snapshot
        """The configuration that the request has been served by since it was let in."""
        self.principal: Principal = ANONYMOUS
        self.priority = Priority.NORMAL
        self.body = b""
        self.record: RequestRecord | None = None
        """The last exchange's record."""
        self.batch: Sequence[RequestRecord] = ()
        """All records of a request that has several; then `record` is the one that speaks for it."""
        self.error_code: str | None = None
        """Of the error that was answered."""
        self.exchange: Exchange | None = None
        """The last one; None before the request came so far."""
        self.dialect: Dialect | None = None
        """Set when a stream begins."""
        self.complete = False
        """The answer's last byte was sent."""
        self.trace: Trace | None = None
        self.status: int | None = None
        """Set once the status line was sent."""

    @property
    def streams(self) -> bool:
        return self.dialect is not None

    @property
    def wish(self) -> Wish:
        """What the caller says of the response cache. Raises InvalidRequest."""
        asked, control = self.header(b"x-weir-cache"), self.header(b"cache-control")
        return NO_WISH if asked is None and control is None else read_wish(asked, control)

    @property
    def left_seconds(self) -> float | None:
        """What is left of `timeout_seconds` since the request came."""
        seconds = self.timeout_seconds
        return None if seconds is None else seconds - (time.perf_counter() - self.started)

    @property
    def timeout_seconds(self) -> float | None:
        """What X-Request-Timeout gives to the whole request. Raises InvalidRequest."""
        given = self.header(b"x-request-timeout")
        if given is None:
            return None
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < TIMEOUT_MOST_SECONDS:
            raise InvalidRequest(
                f"X-Request-Timeout must be seconds, above 0 and below {TIMEOUT_MOST_SECONDS:.0f}.",
                param="X-Request-Timeout",
            )
        return seconds

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return value.decode("latin-1") if value is not None else None

    def client_address(self) -> str:
        """Found anew at each call, for few ask."""
        return client_address(self._client, self._raw_headers, self._trusted)


def context_of(scope: Any) -> RequestContext:
    context: RequestContext = scope[SCOPE_KEY]
    return context


def source_headers(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    """Where an answer came from: the provider's own id of the call, and the model, if it stood in."""
    headers = []
    if record.upstream_request_id:
        headers.append((b"x-upstream-request-id", record.upstream_request_id.encode("latin-1", "replace")))
    if record.answered_by is not None:
        headers.append((b"x-weir-model", quote(record.answered_by, safe=_AS_THEY_ARE).encode()))
    return headers
