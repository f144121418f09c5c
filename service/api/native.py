"""Weir's own API below /api/v1: conversations, single prompts, batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from service.api import schemas
from service.api.caller import CallerWatch
from service.api.context import Dialect, RequestContext, context_of
from service.api.sse import event, send_stream
from service.chat import ChatService, Exchange
from service.dialogue import Dialogue, Opening
from service.domain import (
    UNPRICED,
    ChatRequest,
    Conversation,
    Cost,
    Operation,
    Outcome,
    RequestRecord,
    Usage,
)
from service.errors import UpstreamProtocolError, WeirError

PREFIX = "/api/v1"


def make_router(
    service: ChatService, dialogue: Dialogue, *, batch_concurrency: int, keepalive_seconds: float
) -> APIRouter:
    """The routes, bound to one service."""
    router = APIRouter(prefix=PREFIX)

    def exchange(context: RequestContext, route: str) -> Exchange:
        opened = service.exchange(
            request_id=context.request_id,
            route=PREFIX + route,
            operation=Operation.CHAT,
            principal=context.principal,
            traceparent=context.header(b"traceparent"),
        )
        context.record = opened.record
        return opened

    @router.post("/chat", tags=["chat"], summary="One turn of a conversation")
    async def chat(body: schemas.ChatBody, request: Request) -> schemas.ChatAnswer:
        context = context_of(request.scope)
        turn = _request_of(body)
        if body.stream:
            return _TurnStream(  # type: ignore[return-value]  # FastAPI passes a Response on as it is
                dialogue, exchange(context, "/chat"), turn, keepalive_seconds
            )
        async with exchange(context, "/chat") as run:
            with CallerWatch(request.receive, service.sweep):
                opening = await dialogue.begin(context.principal, turn, stream=False)
                run.record.conversation_id = opening.conversation_id
                await run.open(opening.call)
                text = _text_of(run.whole)
        await dialogue.keep(opening, text, run.record)
        return _chat_answer(run.record, opening, text)

    @router.post(
        "/chat/stream",
        tags=["chat"],
        summary="One turn, its answer as Server-Sent Events",
        response_class=Response,
        responses={
            200: {
                "description": "Events of the form `StreamEvent`; the last has `finished: true`. "
                "An error after the beginning is a last event with `error`.",
                "headers": {"X-Conversation-ID": {"schema": {"type": "string", "format": "uuid"}}},
                "content": {
                    "text/event-stream": {
                        "schema": {"$ref": "#/components/schemas/StreamEvent"},
                        "example": 'data: {"delta":"Steps","conversation_id":"...","finished":false,'
                        '"tokens_used":null}\n\n',
                    }
                },
            }
        },
    )
    async def chat_stream(body: schemas.ChatBody, request: Request) -> Response:
        run = exchange(context_of(request.scope), "/chat/stream")
        return _TurnStream(dialogue, run, _request_of(body), keepalive_seconds)

    @router.get("/conversations", tags=["conversations"], summary="Your latest conversations")
    async def list_conversations(
        request: Request, limit: Annotated[int, Query(ge=1, le=1_000)] = 100
    ) -> schemas.ConversationList:
        found = await dialogue.list(context_of(request.scope).principal, limit)
        return schemas.ConversationList(
            conversations=[schemas.ConversationSummary(**_summary(c)) for c in found]
        )

    @router.get("/conversations/{conversation_id}", tags=["conversations"], summary="One conversation")
    async def show_conversation(conversation_id: UUID, request: Request) -> schemas.ConversationOut:
        found = await dialogue.show(context_of(request.scope).principal, str(conversation_id))
        messages = [
            schemas.MessageOut(role=m.role, content=m.content, timestamp=_time(m.at)) for m in found.messages
        ]
        return schemas.ConversationOut(
            **_summary(found), system_prompt=found.system_prompt, messages=messages
        )

    @router.delete(
        "/conversations/{conversation_id}",
        tags=["conversations"],
        summary="Forget a conversation",
        status_code=204,
    )
    async def delete_conversation(conversation_id: UUID, request: Request) -> None:
        await dialogue.delete(context_of(request.scope).principal, str(conversation_id))

    @router.post("/generate", tags=["generate"], summary="Text for a single prompt")
    async def generate(body: schemas.GenerateBody, request: Request) -> schemas.GenerateAnswer:
        call = dialogue.generation(body.prompt, body.max_tokens, body.temperature, body.model)
        async with exchange(context_of(request.scope), "/generate") as run:
            with CallerWatch(request.receive, service.sweep):
                await run.open(call)
                text = _text_of(run.whole)
        record = run.record
        return schemas.GenerateAnswer(
            text=text,
            tokens_used=_tokens(record),
            model=record.response_model or record.request_model,
            cost_estimate=record.cost.usd,
            request_id=record.request_id,
        )

    @router.post("/batch", tags=["generate"], summary="Up to 100 prompts in one call")
    async def batch(body: schemas.BatchBody, request: Request) -> schemas.BatchAnswer:
        context = context_of(request.scope)
        places = asyncio.Semaphore(batch_concurrency)
        records: list[RequestRecord] = []

        async def one(index: int, prompt: str) -> schemas.BatchResult:
            async with places:
                call = dialogue.generation(prompt, body.max_tokens, body.temperature, body.model)
                run = exchange(context, "/batch")
                records.append(run.record)
                try:
                    async with run:
                        with watch.of_child():
                            await run.open(call)
                            text = _text_of(run.whole)
                except WeirError as error:
                    detail = schemas.ErrorDetail(**error.body()["error"])
                    return schemas.BatchResult(index=index, error=detail)
                record = run.record
                return schemas.BatchResult(
                    index=index, text=text, tokens_used=_tokens(record), cost_estimate=record.cost.usd
                )

        try:
            with CallerWatch(request.receive, service.sweep) as watch:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(i, prompt)) for i, prompt in enumerate(body.prompts)]
        finally:
            context.record = _summed(records)
        return _batch_answer([task.result() for task in tasks], context.request_id)

    return router


class _TurnStream(Response):
    """A streamed turn as a response: asked, passed on and kept while it is sent."""

    def __init__(
        self, dialogue: Dialogue, run: Exchange, turn: ChatRequest, keepalive_seconds: float
    ) -> None:
        super().__init__()
        self._dialogue = dialogue
        self._run = run
        self._turn = turn
        self._keepalive = keepalive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._run
        async with run:
            with CallerWatch(receive, run.sweep):
                opening = await self._dialogue.begin(run.record.principal, self._turn, stream=True)
                run.record.conversation_id = opening.conversation_id
                await run.open(opening.call, keep_text=True)
                await send_stream(
                    send,
                    context_of(scope),
                    Dialect.NATIVE,
                    self._events(opening),
                    keepalive_seconds=self._keepalive,
                    headers=((b"x-conversation-id", opening.conversation_id.encode()),),
                )

    async def _events(self, opening: Opening) -> AsyncGenerator[bytes]:
        run, parts = self._run, []
        place: dict[str, Any] = {"conversation_id": opening.conversation_id}
        async with aclosing(run.events()) as events:
            async for _ in events:
                if text := run.take_text():
                    parts.append(text)
                    yield event({"delta": text, **place, "finished": False, "tokens_used": None})
        run.count()
        await self._dialogue.keep(opening, "".join(parts), run.record)
        yield event({"delta": "", **place, "finished": True, "tokens_used": _tokens(run.record)})


def _summed(records: list[RequestRecord]) -> RequestRecord | None:
    """A batch's records as one, for the canonical line; the ledger has each."""
    if not records:
        return None
    usages = [r.usage for r in records if r.usage is not None]
    costs = [r.cost.usd for r in records if r.usage is not None and r.cost.usd is not None]
    good = next((r for r in records if r.outcome is Outcome.SUCCESS), records[0])
    return msgspec.structs.replace(
        good,
        attempts=sum(r.attempts for r in records),
        usage=Usage(
            input_tokens=sum(u.input_tokens for u in usages),
            output_tokens=sum(u.output_tokens for u in usages),
            source=usages[0].source,
        )
        if usages
        else None,
        cost=Cost(usd=sum(costs), source=good.cost.source) if len(costs) == len(usages) else UNPRICED,
    )


def _request_of(body: schemas.ChatBody) -> ChatRequest:
    return ChatRequest(
        message=body.message,
        conversation_id=str(body.conversation_id) if body.conversation_id else None,
        system_prompt=body.system_prompt,
        temperature=body.temperature,
        max_tokens=body.max_tokens,
        model=body.model,
    )


class _Said(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Said


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def _text_of(answer: bytes | None) -> str:
    """The text of a whole chat completion. Raises UpstreamProtocolError if it has none."""
    try:
        said = msgspec.json.decode(answer or b"", type=_Completion).choices[0].message
    except (msgspec.DecodeError, IndexError):
        raise UpstreamProtocolError("The upstream's answer holds no message.") from None
    return said.content or said.refusal or ""


def _chat_answer(record: RequestRecord, opening: Opening, text: str) -> schemas.ChatAnswer:
    usage = msgspec.structs.asdict(record.usage) if record.usage else {}
    return schemas.ChatAnswer(
        message=text,
        conversation_id=UUID(opening.conversation_id),
        tokens_used=_tokens(record),
        model=record.response_model or record.request_model,
        timestamp=datetime.now(tz=UTC),
        cost_estimate=record.cost.usd,
        usage=schemas.UsageOut(**usage),
        request_id=record.request_id,
    )


def _batch_answer(results: list[schemas.BatchResult], request_id: str) -> schemas.BatchAnswer:
    good = [r for r in results if r.error is None]
    costs = [r.cost_estimate for r in good]
    priced = [cost for cost in costs if cost is not None]
    return schemas.BatchAnswer(
        results=results,
        succeeded=len(good),
        failed=len(results) - len(good),
        tokens_used=sum(r.tokens_used for r in good),
        cost_estimate=sum(priced) if len(priced) == len(costs) else None,
        request_id=request_id,
    )


def _summary(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "created_at": _time(conversation.created_at),
        "updated_at": _time(conversation.updated_at),
        "message_count": conversation.total_messages,
        "total_tokens": conversation.total_tokens,
        "total_cost": conversation.total_cost_usd,
        "unpriced_turns": conversation.unpriced_turns,
    }


def _tokens(record: RequestRecord) -> int:
    return record.usage.total_tokens if record.usage else 0


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)
