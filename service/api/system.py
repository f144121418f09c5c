"""What says that the service is there: `/` and `/health`; no credential is asked for."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from service import __version__
from service.api import schemas

LINKS = {
    "docs": "/docs",
    "redoc": "/redoc",
    "openapi": "/openapi.json",
    "health": "/health",
    "chat_completions": "/v1/chat/completions",
    "models": "/v1/models",
    "chat": "/api/v1/chat",
}


def make_router(
    *, parts: Callable[[], dict[str, schemas.Part]], uptime_seconds: Callable[[], float]
) -> APIRouter:
    router = APIRouter(tags=["system"])

    @router.get("/", summary="It is ready, and where everything is")
    async def root() -> schemas.Ready:
        return schemas.Ready(name="weir", status="ready", version=__version__, links=LINKS)

    @router.get("/health", summary="The state of each part")
    async def health() -> schemas.Health:
        found = parts()
        troubled = any(part.status in ("failing", "degraded") for part in found.values())
        return schemas.Health(
            status="degraded" if troubled else "ok",
            version=__version__,
            uptime_seconds=round(uptime_seconds(), 3),
            parts=found,
        )

    return router
