"""What is known of an HTTP request while it runs: made by the outermost middleware, filled by the rest."""

from __future__ import annotations

import time
from enum import Enum
from typing import Any, Final

from service.domain import ANONYMOUS, Principal, RequestRecord

SCOPE_KEY: Final = "weir"


class Dialect(Enum):
    """How a stream that has begun tells of an error."""

    CHUNKS = "data-only events, as in chat and text completions"
    RESPONSES = "named events, as in the Responses API"
    NATIVE = "events of /api/v1/chat/stream"


class RequestContext:
    """One HTTP request. `headers` has lower-case names; of several equal ones the last."""

    __slots__ = (
        "body",
        "complete",
        "dialect",
        "headers",
        "method",
        "path",
        "principal",
        "record",
        "request_id",
        "started",
        "status",
    )

    def __init__(self, scope: Any, request_id: str) -> None:
        self.request_id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.started = time.perf_counter()
        self.principal: Principal = ANONYMOUS
        self.body = b""
        self.record: RequestRecord | None = None
        """The last exchange's record; a batch has several."""
        self.dialect: Dialect | None = None
        """Set when a stream begins."""
        self.complete = False
        """The answer's last byte was sent."""
        self.status: int | None = None
        """Set once the status line was sent."""

    @property
    def streams(self) -> bool:
        return self.dialect is not None

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return value.decode("latin-1") if value is not None else None


def context_of(scope: Any) -> RequestContext:
    context: RequestContext = scope[SCOPE_KEY]
    return context
