"""The drop-in endpoints under /v1: plain ASGI, because this is the hot path.

Bytes come in, one decoder reads the three fields that matter, bytes go out. A FastAPI route would
cost a third of the throughput; `documentation.py` puts these routes onto the OpenAPI page.
"""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.types import Receive, Scope, Send

from service.api.caller import CallerWatch
from service.api.context import Dialect, context_of
from service.api.sse import send_stream
from service.chat import ChatService, read_call
from service.domain import Operation
from service.errors import ModelNotFound
from service.ports import Catalogue

JSON: Final = (b"content-type", b"application/json")
_FORWARDED: Final = ((b"openai-beta", "OpenAI-Beta"), (b"traceparent", "traceparent"))


class ModelEndpoint:
    """POST /v1/... for one operation, streamed or not."""

    def __init__(self, service: ChatService, operation: Operation, *, keepalive_seconds: float) -> None:
        self.path = f"/v1/{operation.value}"
        self._service = service
        self._operation = operation
        self._keepalive = keepalive_seconds
        self._dialect = Dialect.RESPONSES if operation is Operation.RESPONSES else Dialect.CHUNKS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        exchange = self._service.exchange(
            request_id=context.request_id,
            route=self.path,
            operation=self._operation,
            principal=context.principal,
            traceparent=context.header(b"traceparent"),
        )
        context.record = exchange.record
        async with exchange:
            with CallerWatch(receive, self._service.sweep):
                call = read_call(self._operation, context.body)
                for key, name in _FORWARDED:
                    if key in context.headers:
                        call.headers += ((name, context.headers[key].decode("latin-1")),)
                await exchange.open(call)
                if exchange.whole is not None:
                    await send_json(send, exchange.whole)
                else:
                    await send_stream(
                        send, context, self._dialect, exchange.events(), keepalive_seconds=self._keepalive
                    )


class ModelList:
    """GET /v1/models."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        models = await self._catalogue.models()
        await send_json(send, msgspec.json.encode({"object": "list", "data": models}))


class ModelShow:
    """GET /v1/models/{id}; an id may hold slashes."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scope["path_params"]["model"]
        for model in await self._catalogue.models():
            if model["id"] == wanted:
                return await send_json(send, msgspec.json.encode(model))
        raise ModelNotFound("There is no such model here.", param="model")


async def send_json(
    send: Send, body: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [JSON, length, *headers]})
    await send({"type": "http.response.body", "body": body})
