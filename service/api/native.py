"""Weir's own API below /api/v1: conversations, single prompts, batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from service.api import schemas
from service.api.caller import CallerWatch
from service.api.context import Dialect, RequestContext, context_of
from service.api.sse import event, send_stream
from service.chat import Exchange
from service.dialogue import Dialogue, Opening
from service.domain import (
    ChatRequest,
    Conversation,
    Operation,
    Outcome,
    RequestRecord,
)
from service.errors import UpstreamProtocolError, WeirError

PREFIX = "/api/v1"


def make_router(*, batch_concurrency: int, keepalive_seconds: float) -> APIRouter:
    """The routes; each request is served by the snapshot in its context."""
    router = APIRouter(prefix=PREFIX)

    def exchange(context: RequestContext, route: str, part: str | None = None) -> Exchange:
        left = context.left_seconds  # a bad header ends it before there is a record
        opened = context.snapshot.service.exchange(
            request_id=context.request_id,
            route=PREFIX + route,
            operation=Operation.CHAT,
            principal=context.principal,
            trace=context.trace if part is None or context.trace is None else context.trace.part(part),
            address=context.client_address,
        )
        context.record, context.exchange = opened.record, opened
        opened.priority = context.priority
        opened.expire(left)
        return opened

    @router.post("/chat", tags=["chat"], summary="One turn of a conversation")
    async def chat(body: schemas.ChatBody, request: Request) -> schemas.ChatAnswer:
        context = context_of(request.scope)
        turn, dialogue = _request_of(body), context.snapshot.dialogue
        if body.stream:
            return _TurnStream(  # type: ignore[return-value]  # FastAPI passes a Response on as it is
                exchange(context, "/chat"), turn, keepalive_seconds
            )
        async with exchange(context, "/chat") as run:
            with CallerWatch(request.receive, run.sweep):
                opening = await dialogue.begin(context.principal, turn, stream=False)
                run.record.conversation_id = opening.conversation_id
                await run.open(opening.call, wish=context.wish)
                text = _text_of(run)
            run.beside = partial(dialogue.keep, opening, text, run.record)
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
        return _TurnStream(run, _request_of(body), keepalive_seconds)

    @router.get("/conversations", tags=["conversations"], summary="Your latest conversations")
    async def list_conversations(
        request: Request, limit: Annotated[int, Query(ge=1, le=1_000)] = 100
    ) -> schemas.ConversationList:
        context = context_of(request.scope)
        found = await context.snapshot.dialogue.list(context.principal, limit)
        return schemas.ConversationList(
            conversations=[schemas.ConversationSummary(**_summary(c)) for c in found]
        )

    @router.get("/conversations/{conversation_id}", tags=["conversations"], summary="One conversation")
    async def show_conversation(conversation_id: UUID, request: Request) -> schemas.ConversationOut:
        context = context_of(request.scope)
        found = await context.snapshot.dialogue.show(context.principal, str(conversation_id))
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
        context = context_of(request.scope)
        await context.snapshot.dialogue.delete(context.principal, str(conversation_id))

    @router.post("/generate", tags=["generate"], summary="Text for a single prompt")
    async def generate(body: schemas.GenerateBody, request: Request) -> schemas.GenerateAnswer:
        context = context_of(request.scope)
        dialogue = context.snapshot.dialogue
        call = dialogue.generation(body.prompt, body.max_tokens, body.temperature, body.model)
        async with exchange(context, "/generate") as run:
            with CallerWatch(request.receive, run.sweep):
                await run.open(call, wish=context.wish)
                text = _text_of(run)
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
        service, dialogue = context.snapshot.service, context.snapshot.dialogue
        _ = context.left_seconds  # one error for a bad header, not one for each prompt
        places = asyncio.Semaphore(batch_concurrency)
        records: list[RequestRecord] = []

        async def one(index: int, prompt: str) -> schemas.BatchResult:
            async with places:
                call = dialogue.generation(prompt, body.max_tokens, body.temperature, body.model)
                run = exchange(context, "/batch", "prompt")
                records.append(run.record)
                try:
                    async with run:
                        with watch.of_child():
                            await run.open(call, wish=context.wish)
                            text = _text_of(run)
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
            context.batch, context.record = records, _speaker(records)
        return _batch_answer([task.result() for task in tasks], context.request_id)

    return router


class _TurnStream(Response):
    """A streamed turn as a response: asked, passed on and kept while it is sent."""

    def __init__(self, run: Exchange, turn: ChatRequest, keepalive_seconds: float) -> None:
        super().__init__()
        self._run = run
        self._turn = turn
        self._keepalive = keepalive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run, context = self._run, context_of(scope)
        dialogue = context.snapshot.dialogue
        async with run:
            with CallerWatch(receive, run.sweep):
                opening = await dialogue.begin(run.record.principal, self._turn, stream=True)
                run.record.conversation_id = opening.conversation_id
                await run.open(opening.call, keep_text=True, wish=context.wish)
                await send_stream(
                    send,
                    context,
                    Dialect.NATIVE,
                    self._events(dialogue, opening),
                    keepalive_seconds=self._keepalive,
                    headers=((b"x-conversation-id", opening.conversation_id.encode()),),
                )

    async def _events(self, dialogue: Dialogue, opening: Opening) -> AsyncGenerator[bytes]:
        run, parts = self._run, []
        place: dict[str, Any] = {"conversation_id": opening.conversation_id}
        async with aclosing(run.events()) as events:
            async for _ in events:
                if text := run.take_text():
                    parts.append(text)
                    yield event({"delta": text, **place, "finished": False, "tokens_used": None})
        run.count()
        await dialogue.keep(opening, "".join(parts), run.record)
        yield event({"delta": "", **place, "finished": True, "tokens_used": _tokens(run.record)})


def _speaker(records: list[RequestRecord]) -> RequestRecord | None:
    """The record of a batch that its headers tell of: a good one, if there is one."""
    return next((r for r in records if r.outcome is Outcome.SUCCESS), records[0] if records else None)


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


def _text_of(run: Exchange) -> str:
    """The text of a whole chat completion. Raises UpstreamProtocolError if it has none."""
    try:
        said = msgspec.json.decode(run.whole or b"", type=_Completion).choices[0].message
    except (msgspec.DecodeError, IndexError):
        raise UpstreamProtocolError(
            "The upstream's answer holds no message.", upstream_request_id=run.record.upstream_request_id
        ) from None
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
