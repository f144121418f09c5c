"""The admin port's application: probes, metrics, the level of the log. It needs nothing of the main loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from service.logging import LEVELS, MOST_LEVEL_SECONDS, LogLevel

JSON = b"application/json"
MOST_BODY_BYTES: Final = 4_096
USUAL_LEVEL_SECONDS: Final = 600.0


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
    """/startupz, /livez, /readyz: 200 or 503 with the reason; /metrics: OpenMetrics on request; /config;
    /log-level, which may be changed for a while."""

    def __init__(
        self,
        probe: Probe,
        metrics: Callable[[str], tuple[bytes, str]],
        config: Callable[[], dict[str, object]] | None = None,
        log_level: LogLevel | None = None,
    ) -> None:
        self._probe = probe
        self._metrics = metrics
        self._config = config
        self._log_level = log_level

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/log-level" and self._log_level is not None:
            return await self._level(self._log_level, scope, receive, send)
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
        if scope["path"] == "/config" and self._config is not None:
            return await _answer(send, 200, msgspec.json.encode(self._config()), JSON)
        told = {"status": f"not found; there are {' '.join(self._links)}"}
        await _answer(send, 404, msgspec.json.encode(told), JSON)

    @property
    def _links(self) -> list[str]:
        links = ["/livez", "/readyz", "/startupz", "/metrics"]
        if self._config is not None:
            links.append("/config")
        if self._log_level is not None:
            links.append("/log-level")
        return links

    async def _level(self, log_level: LogLevel, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "PUT":
            try:
                log_level.change(*_wish(await _body(receive)))
            except ValueError as error:
                return await _answer(send, 400, msgspec.json.encode({"status": str(error)}), JSON)
        elif scope["method"] not in ("GET", "HEAD"):
            return await _answer(send, 405, b'{"status":"only GET and PUT"}', JSON)
        await _answer(send, 200, msgspec.json.encode(log_level.tell()), JSON)

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
        return True, {"status": "admin", "links": self._links}


async def _body(receive: Receive) -> bytes:
    """Raises ValueError."""
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > MOST_BODY_BYTES:
            raise ValueError(f"the body is larger than {MOST_BODY_BYTES} bytes")
        if not message.get("more_body"):
            return body


def _wish(body: bytes) -> tuple[str, float]:
    """A level, and for how many seconds. Raises ValueError."""
    try:
        wish: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        wish = None
    if not isinstance(wish, dict) or not wish.keys() <= {"level", "seconds"}:
        raise ValueError('the body must be JSON such as {"level": "debug", "seconds": 600}')
    level, seconds = wish.get("level"), wish.get("seconds", USUAL_LEVEL_SECONDS)
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds <= MOST_LEVEL_SECONDS:
        raise ValueError(f"seconds must be a number above 0, at most {MOST_LEVEL_SECONDS}")
    return level, float(seconds)


async def _answer(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
