"""A collector: an OTLP/HTTP receiver on a real socket that keeps the spans it is sent, and can misbehave.

::

    with FakeCollector() as collector:
        ...  # something sends to collector.url
        spans = collector.wait_for(3)
        assert children(spans, root_of(spans)) == ["reserve", "chat gpt-4o-mini", "settle"]

`misbehave(503)` answers with a status until `behave()`; `misbehave("hang")` takes requests and answers none
before `behave()`; `misbehave("refuse")` closes each connection without a word.
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

WAIT_SECONDS = 20.0


class Span:
    """One span as it came."""

    def __init__(self, wire: WireSpan, resource: dict[str, Any]) -> None:
        self.wire = wire
        self.resource = resource
        self.name: str = wire.name
        self.trace_id: str = wire.trace_id.hex()
        self.id: str = wire.span_id.hex()
        self.parent_id: str = wire.parent_span_id.hex()
        self.attributes = plain(wire.attributes)
        self.events = {event.name: plain(event.attributes) for event in wire.events}
        self.kind = WireSpan.SpanKind.Name(wire.kind).removeprefix("SPAN_KIND_")
        self.status = Status.StatusCode.Name(wire.status.code).removeprefix("STATUS_CODE_")

    def __repr__(self) -> str:
        return f"<{self.name} {self.status} {self.attributes}>"


class FakeCollector:
    """`with FakeCollector() as collector:` receives at `collector.url` until the end of the block."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.raw = b""
        """All bodies that were taken, uncompressed."""
        self._spans: list[Span] = []
        self._fault: int | Literal["hang", "refuse"] | None = None
        self._asked = 0
        self._changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = collector._take(self.path, dict(self.headers.items()), body)
                if status is None:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.behave()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def misbehave(self, fault: int | Literal["hang", "refuse"]) -> None:
        with self._changed:
            self._fault = fault

    def behave(self) -> None:
        with self._changed:
            self._fault = None
            self._changed.notify_all()

    @property
    def spans(self) -> list[Span]:
        """Those that came so far."""
        with self._changed:
            return list(self._spans)

    def wait_for(self, count: int) -> list[Span]:
        """The spans, once there are at least so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._spans) >= count, WAIT_SECONDS), self._spans
            return list(self._spans)

    def wait_until_asked(self, times: int = 1) -> None:
        """Returns once it was sent so many requests, whatever it made of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._asked >= times, WAIT_SECONDS)

    def _take(self, path: str, headers: dict[str, str], body: bytes) -> int | None:
        """The status to answer with; None for no answer."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            if self._fault == "hang":
                self._changed.wait_for(lambda: self._fault != "hang")
                return None
            if self._fault == "refuse":
                return None
            if self._fault is not None:
                return self._fault
            self._keep(path, {name.lower(): value for name, value in headers.items()}, body)
            self._changed.notify_all()
            return 200

    def _keep(self, path: str, headers: dict[str, str], body: bytes) -> None:
        encoding = headers.get("content-encoding")
        if encoding == "gzip":
            body = gzip.decompress(body)
        elif encoding == "deflate":
            body = zlib.decompress(body)
        self.paths.append(path)
        self.headers.append(headers)
        self.raw += body
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = plain(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self._spans.extend(Span(wire, resource) for wire in of_scope.spans)


def root_of(spans: Sequence[Span]) -> Span:
    """The one span that is below none of the others."""
    ids = {span.id for span in spans}
    (root,) = [span for span in spans if span.parent_id not in ids]
    return root


def below(spans: Sequence[Span], parent: Span) -> list[Span]:
    """The spans right below `parent`, as they began."""
    found = [span for span in spans if span.parent_id == parent.id]
    return sorted(found, key=lambda span: span.wire.start_time_unix_nano)


def names(spans: Sequence[Span]) -> list[str]:
    return [span.name for span in spans]


def plain(attributes: Any) -> dict[str, Any]:
    """OTLP's attributes as a dictionary."""
    return {a.key: _value_of(a.value) for a in attributes}


def _value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value_of(item) for item in value.array_value.values]
    return getattr(value, kind)
