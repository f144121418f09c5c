"""The bare reference's work in a FastAPI route."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from tests.performance.references import EVENT_STREAM, PATH, open_session


def make_proxy(upstream: str) -> FastAPI:
    url = upstream + PATH

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_session() as app.state.http:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def ready() -> Response:
        return Response(b"ok")

    @app.post(PATH)
    async def chat(request: Request) -> Response:
        http: aiohttp.ClientSession = request.app.state.http
        answer = await http.post(url, data=await request.body())
        if answer.content_type == EVENT_STREAM:
            return StreamingResponse(_chunks(answer), answer.status, media_type=EVENT_STREAM)
        async with answer:
            return Response(await answer.read(), answer.status, media_type=answer.content_type)

    return app


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with answer:
        async for chunk in answer.content.iter_any():
            yield chunk
