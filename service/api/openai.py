"""The drop-in endpoints under /v1: plain ASGI, because this is the hot path.

Bytes come in, one decoder reads the three fields that matter, bytes go out. A FastAPI route would
cost a third of the throughput; `documentation.py` puts these routes onto the OpenAPI page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from starlette.types import Receive, Scope, Send

from service.api.caller import CallerWatch
from service.api.context import Dialect, context_of
from service.api.sse import send_stream
from service.chat import read_call
from service.deadlines import Deadline
from service.domain import Operation
from service.errors import ModelNotFound, RequestDeadline, UpstreamTimeout

JSON: Final = (b"content-type", b"application/json")
_FORWARDED: Final = ((b"openai-beta", "OpenAI-Beta"),)


class ModelEndpoint:
    """POST /v1/... for one operation, streamed or not."""

    def __init__(self, operation: Operation, *, keepalive_seconds: float) -> None:
        self.path = f"/v1/{operation.value}"
        self._operation = operation
        self._keepalive = keepalive_seconds
        self._dialect = Dialect.RESPONSES if operation is Operation.RESPONSES else Dialect.CHUNKS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        exchange = context.snapshot.service.exchange(
            request_id=context.request_id,
            route=self.path,
            operation=self._operation,
            principal=context.principal,
            trace=context.trace,
            address=context.client_address,
        )
        context.record, context.exchange = exchange.record, exchange
        exchange.priority = context.priority
        async with exchange:
            with CallerWatch(receive, exchange.sweep):
                exchange.expire(context.left_seconds)
                call = read_call(self._operation, context.body)
                for key, name in _FORWARDED:
                    if key in context.headers:
                        call.headers += ((name, context.headers[key].decode("latin-1")),)
                await exchange.open(call, wish=context.wish)
                if exchange.whole is not None:
                    await send_json(send, exchange.whole)
                else:
                    await send_stream(
                        send, context, self._dialect, exchange.events(), keepalive_seconds=self._keepalive
                    )


class ModelList:
    """GET /v1/models."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        models = await self.models(scope, receive)
        await send_json(send, msgspec.json.encode({"object": "list", "data": models}))

    async def models(self, scope: Scope, receive: Receive) -> Sequence[dict[str, Any]]:
        """What the catalogue lists; it may have to ask an upstream."""
        context = context_of(scope)
        service = context.snapshot.service
        seconds, left = service.limits.timeout_seconds, context.left_seconds
        late = _no_list
        if left is not None and left < seconds:
            seconds, late = left, _over
        until = asyncio.get_running_loop().time() + seconds
        with CallerWatch(receive, service.sweep), Deadline(service.sweep, until, late):
            return await service.catalogue.models(context.principal)


class ModelShow(ModelList):
    """GET /v1/models/{id}; an id may hold slashes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scope["path_params"]["model"]
        for model in await self.models(scope, receive):
            if model["id"] == wanted:
                return await send_json(send, msgspec.json.encode(model))
        raise ModelNotFound("There is no such model here.", param="model")


def _no_list() -> UpstreamTimeout:
    return UpstreamTimeout("The upstream did not list its models in time.")


def _over() -> RequestDeadline:
    return RequestDeadline("The list of models took longer than it may.")


async def send_json(
    send: Send, body: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [JSON, length, *headers]})
    await send({"type": "http.response.body", "body": body})
