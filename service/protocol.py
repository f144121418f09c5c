"""uvicorn's HTTP protocol with a bound for the head of a request, which uvicorn has none for."""

from __future__ import annotations

from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 512 * 1024
"""Counted in packets, whose last may hold the beginning of a body too: more than any head needs."""
_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedHeadProtocol(HttpToolsProtocol):
    """Answers 431 and closes when a head does not end; nobody has been asked for a key by then."""

    _in_head = True
    _head_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # After a reset uvicorn leaves it, and with it for 75 s the request that was the last.
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self, *arguments: Any) -> None:
        self._in_head = False
        super().on_headers_complete(*arguments)

    def on_message_complete(self, *arguments: Any) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete(*arguments)
