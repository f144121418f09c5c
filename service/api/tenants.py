"""A tenant's conversations as a whole: all of them out, or all of them gone. For admins alone."""

from __future__ import annotations

from contextlib import aclosing
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

import structlog
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from service.api import schemas
from service.api.caller import CallerWatch
from service.api.context import context_of
from service.deadlines import Sweep
from service.domain import Conversation, Principal
from service.errors import InternalError, PermissionDenied, ShuttingDown, WeirError
from service.ports import Conversations

log = structlog.get_logger("weir")


class Answers(Protocol):
    """Answers that are kept to be given once more."""

    async def erase(self, tenant: str) -> int:
        """Forget all of a tenant; how many there were."""
        ...


def make_router(
    conversations: Conversations, answers: Answers | None, replays: Answers, sweep: Sweep
) -> APIRouter:
    """`answers`: of the cache, None where no pod shares them; `replays`: of idempotency keys."""
    router = APIRouter(prefix="/api/v1/tenants", tags=["tenants"])

    @router.get(
        "/{tenant:path}/conversations/export",
        summary="All conversations of a tenant",
        response_class=_Export,
        response_model=schemas.ConversationExport,
        status_code=200,
        responses={
            200: {
                "description": "A line for each conversation. If the export ends early its last line is an "
                "error, of the form `ErrorBody`.",
                "content": {
                    "application/x-ndjson": {"schema": {"$ref": "#/components/schemas/ConversationExport"}}
                },
            }
        },
    )
    async def export(tenant: str, request: Request) -> Response:
        admin = _admin(request)
        log.info("tenant_export", tenant=tenant, by=admin.name)
        return _Export(conversations, tenant, sweep)

    @router.delete("/{tenant:path}/conversations", summary="Erase all conversations of a tenant")
    async def erase(tenant: str, request: Request) -> schemas.Erased:
        admin = _admin(request)
        erased = await conversations.erase(tenant)
        # After the conversations: what is answered from now on is made of none of them.
        forgotten = await answers.erase(tenant) if answers is not None else 0
        repeated = await replays.erase(tenant)
        log.info(
            "tenant_erased",
            tenant=tenant,
            by=admin.name,
            conversations=erased,
            answers=forgotten,
            replays=repeated,
        )
        return schemas.Erased(
            tenant=tenant, conversations=erased, cached_answers=forgotten, idempotent_answers=repeated
        )

    return router


def _admin(request: Request) -> Principal:
    principal = context_of(request.scope).principal
    if not principal.admin:
        # A tenant may have several keys, whose conversations are not each other's.
        raise PermissionDenied("This is for keys with `admin: true`.")
    return principal


class _Export(Response):
    """Conversations as lines of JSON, each sent before the next batch is read."""

    media_type = "application/x-ndjson"

    def __init__(self, conversations: Conversations, tenant: str, sweep: Sweep) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._conversations = conversations
        self._tenant = tenant
        self._sweep = sweep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._conversations.of_tenant(self._tenant)) as found:
            with CallerWatch(receive, self._sweep):
                # Before the status line: what fails here is a proper error.
                one = await anext(found, None)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    while one is not None:
                        await _send_line(send, _line(one))
                        one = await anext(found, None)
                except BaseException as fault:
                    await _send_line(send, _last_line(fault))
                    raise  # what ends the answer logs it, too
                await send({"type": "http.response.body", "body": b""})


async def _send_line(send: Send, line: bytes) -> None:
    await send({"type": "http.response.body", "body": line + b"\n", "more_body": True})


def _last_line(fault: BaseException) -> bytes:
    if isinstance(fault, WeirError):
        error = fault
    elif isinstance(fault, Exception):
        error = InternalError("An internal error happened; the export is not whole.")
    else:
        error = ShuttingDown("This server is shutting down; the export is not whole.")
    return schemas.ErrorBody.model_validate(error.body()).model_dump_json().encode()


def _line(conversation: Conversation) -> bytes:
    return (
        schemas.ConversationExport(
            id=UUID(conversation.id),
            key=conversation.principal.name,
            created_at=_time(conversation.created_at),
            updated_at=_time(conversation.updated_at),
            message_count=conversation.total_messages,
            total_tokens=conversation.total_tokens,
            total_cost=conversation.total_cost_usd,
            unpriced_turns=conversation.unpriced_turns,
            system_prompt=conversation.system_prompt,
            messages=[
                schemas.MessageOut(role=m.role, content=m.content, timestamp=_time(m.at))
                for m in conversation.messages
            ],
        )
        .model_dump_json()
        .encode()
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)
