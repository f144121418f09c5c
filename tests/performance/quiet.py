"""Weir without metrics and without a line for each request: what its telemetry is compared with.

Run as `python -m tests.performance.quiet`, with the environment of `python -m service`. The product has no
switch for it: here the two parts that `create_app` makes are others, which do nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import service.app
from service.__main__ import main
from service.canonical import RequestLog
from service.domain import AttemptKind, RequestRecord
from service.errors import WeirError
from service.telemetry import Metrics


class NoMetrics(Metrics):
    """Nothing of what happens at each request."""

    def opened(self) -> None: ...

    def queued(self, priority: str, seconds: float) -> None: ...

    def attempted(
        self,
        record: RequestRecord,
        error: WeirError | None,
        kind: AttemptKind,
        seconds: float,
        response_model: str = "",
    ) -> None: ...

    def pace(self, record: RequestRecord, response_model: str) -> Callable[[float, int], None]:
        return _nothing

    def streamed(self, record: RequestRecord, seconds: float) -> None: ...

    def closed(self, record: RequestRecord) -> None: ...

    def http(self, method: str, route: str, status: int, seconds: float) -> None: ...


class NoRequestLog(RequestLog):
    """No lines of requests."""

    def write(self, *_: Any, **__: Any) -> None: ...


def _nothing(_seconds: float, _events: int) -> None: ...


if __name__ == "__main__":
    setattr(service.app, "Metrics", NoMetrics)  # noqa: B010  # no assignment to a type that mypy knows
    setattr(service.app, "RequestLog", NoRequestLog)  # noqa: B010
    sys.exit(main())
