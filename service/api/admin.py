"""The admin port's application: probes and metrics. It needs nothing of the main loop to answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

JSON = b"application/json"


class Probe(Protocol):
    """What the probes ask; answered from any thread."""

    @property
    def started(self) -> bool: ...

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    @property
    def heartbeat_age_seconds(self) -> float: ...


class AdminApp:
    """/startupz, /livez, /readyz: 200 or 503 with the reason; /metrics: OpenMetrics on request."""

    def __init__(self, probe: Probe, metrics: Callable[[str], tuple[bytes, str]]) -> None:
        self._probe = probe
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] not in ("GET", "HEAD"):
            return await _answer(send, 405, b'{"status":"only GET"}', JSON)
        answer = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/startupz": self._startupz,
            "/": self._index,
        }.get(scope["path"])
        if answer is not None:
            good, told = answer()
            return await _answer(send, 200 if good else 503, msgspec.json.encode(told), JSON)
        if scope["path"] == "/metrics":
            accept = dict(scope["headers"]).get(b"accept", b"").decode("latin-1")
            body, content_type = self._metrics(accept)
            return await _answer(send, 200, body, content_type.encode())
        await _answer(send, 404, b'{"status":"not found; there are /livez /readyz /startupz /metrics"}', JSON)

    def _livez(self) -> tuple[bool, dict[str, object]]:
        alive = self._probe.alive
        age = round(self._probe.heartbeat_age_seconds, 3)
        return alive, {"status": "alive" if alive else "main loop is stuck", "heartbeat_age_seconds": age}

    def _readyz(self) -> tuple[bool, dict[str, object]]:
        if self._probe.ready:
            return True, {"status": "ready"}
        if self._probe.draining:
            return False, {"status": "draining"}
        return False, {"status": "starting" if not self._probe.started else "main loop is stuck"}

    def _startupz(self) -> tuple[bool, dict[str, object]]:
        started = self._probe.started
        return started, {"status": "started" if started else "starting"}

    def _index(self) -> tuple[bool, dict[str, object]]:
        return True, {"status": "admin", "links": ["/livez", "/readyz", "/startupz", "/metrics"]}


async def _answer(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
