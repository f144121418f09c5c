"""What Weir is compared with: the simplest proxies that a good programmer would write.

Run as `python -m tests.performance.references NAME --port PORT --upstream URL`. They neither check keys
nor count, limit or log anything. `GET /` answers 200.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

import aiohttp
import uvicorn

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PATH: Final = "/v1/chat/completions"
_HEADERS: Final = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
EVENT_STREAM: Final = "text/event-stream"


def open_session() -> aiohttp.ClientSession:
    # aiohttp's own limit of 100 connections would hold back 200 streams.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), headers=_HEADERS
    )


class BareProxy:
    """A plain ASGI callable over one shared aiohttp session."""

    _http: aiohttp.ClientSession

    def __init__(self, upstream: str) -> None:
        self._url = upstream + PATH

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["path"] == PATH:
            await self._pass_on(receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

    async def _pass_on(self, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        async with self._http.post(self._url, data=body) as answer:
            content_type = answer.content_type
            headers = [(b"content-type", content_type.encode())]
            if content_type == EVENT_STREAM:
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                async for chunk in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            else:
                whole = await answer.read()
                headers.append((b"content-length", b"%d" % len(whole)))
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                await send({"type": "http.response.body", "body": whole})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with open_session() as self._http:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _app(name: str, upstream: str) -> ASGIApp:
    if name == "bare":
        return BareProxy(upstream)
    # Imported here, so that the bare proxy's memory and start are its own.
    from tests.performance.references_fastapi import make_proxy

    return make_proxy(upstream)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["bare", "fastapi"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    options = parser.parse_args()
    uvicorn.run(
        _app(options.name, options.upstream),
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
