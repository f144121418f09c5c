"""Conversations: what goes along with a turn, and what of it is kept."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from service.domain import (
    Call,
    ChatRequest,
    Conversation,
    Message,
    Operation,
    Principal,
    RequestRecord,
    Turn,
)
from service.errors import ConversationNotFound
from service.ports import Conversations, PriceBook
from service.pricing import context_of
from service.routing.routes import Catalogue
from service.tokens import MESSAGE_TOKENS, estimate_message, estimate_text, trim

ANSWER_ROOM_TOKENS: Final = 1_024
"""Kept free in the model's context for the answer where the caller names no max_tokens."""
NEW_NAME_PROVIDERS: Final = ("openai", "azure")
"""They refuse `max_tokens` for their newer models; most other servers know nothing else."""


class Defaults(msgspec.Struct, frozen=True):
    """What a turn gets where its caller says nothing."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    history_messages: int = 20


class Opening(msgspec.Struct):
    """A turn that is about to be asked: its call, and what must be kept of it afterwards."""

    call: Call
    conversation_id: str
    question: Message
    system_prompt: str | None
    """The caller's, if this turn brought one."""
    begins: bool


class Dialogue:
    """Turns `ChatRequest`s into calls and keeps the turns that were answered."""

    def __init__(
        self,
        *,
        conversations: Conversations,
        catalogue: Catalogue,
        prices: PriceBook,
        defaults: Defaults,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._conversations = conversations
        self._catalogue = catalogue
        self._prices = prices
        self._defaults = defaults
        self._clock = clock

    async def begin(self, principal: Principal, request: ChatRequest, *, stream: bool) -> Opening:
        """Load the conversation and make the call. Raises ConversationNotFound, ModelNotFound."""
        known = await self._load(principal, request.conversation_id)
        system_prompt = request.system_prompt or (known.system_prompt if known else None)
        question = Message("user", request.message, self._clock())
        model = request.model or self._defaults.model
        history = self._history(known, model, system_prompt, question, request.max_tokens)
        conversation_id = known.id if known else str(uuid.uuid4())
        call = self._call(request, model, system_prompt, (*history, question), stream=stream)
        call.session = conversation_id
        return Opening(
            call=call,
            conversation_id=conversation_id,
            question=question,
            system_prompt=request.system_prompt,
            begins=known is None,
        )

    async def keep(self, opening: Opening, answer: str, record: RequestRecord) -> None:
        """Add the turn to its conversation: question and answer together, never one of them."""
        usage = record.usage
        turn = Turn(
            messages=(opening.question, Message("assistant", answer, self._clock())),
            tokens=usage.total_tokens if usage else 0,
            cost_usd=record.cost.usd,
        )
        await self._conversations.append(
            record.principal,
            opening.conversation_id,
            turn,
            opening.system_prompt,
            begin=opening.begins,
        )

    async def show(self, principal: Principal, conversation_id: str) -> Conversation:
        conversation = await self._load(principal, conversation_id)
        if conversation is None:
            raise _unknown(conversation_id)
        return conversation

    async def list(self, principal: Principal, limit: int) -> Sequence[Conversation]:
        return await self._conversations.list(principal, limit)

    async def delete(self, principal: Principal, conversation_id: str) -> None:
        if not await self._conversations.delete(principal, conversation_id):
            raise _unknown(conversation_id)

    def generation(self, prompt: str, max_tokens: int, temperature: float, model: str | None) -> Call:
        """The call of a single prompt without a conversation."""
        request = ChatRequest(prompt, max_tokens=max_tokens, temperature=temperature)
        model = model or self._defaults.model
        return self._call(request, model, None, (Message("user", prompt),), stream=False)

    async def _load(self, principal: Principal, conversation_id: str | None) -> Conversation | None:
        if conversation_id is None:
            return None
        conversation = await self._conversations.load(principal, conversation_id)
        if conversation is None:
            raise _unknown(conversation_id)
        return conversation

    def _history(
        self,
        known: Conversation | None,
        model: str,
        system_prompt: str | None,
        question: Message,
        max_tokens: int | None,
    ) -> tuple[Message, ...]:
        """The latest messages, so many as are wanted and as the model's context has room for."""
        wanted = self._defaults.history_messages
        if known is None or wanted == 0:
            return ()
        latest = known.messages[-wanted:]
        context = context_of(self._catalogue.resolve(model).first, self._prices)
        if context is None:
            return trim(latest, sum(map(estimate_message, latest)))
        taken = estimate_message(question) + (max_tokens or self._defaults.max_tokens or ANSWER_ROOM_TOKENS)
        if system_prompt:
            taken += MESSAGE_TOKENS + estimate_text(system_prompt)
        return trim(latest, context - taken)

    def _call(
        self,
        request: ChatRequest,
        model: str,
        system_prompt: str | None,
        messages: Sequence[Message],
        *,
        stream: bool,
    ) -> Call:
        spoken = [{"role": m.role, "content": m.content} for m in messages]
        if system_prompt:
            spoken.insert(0, {"role": "system", "content": system_prompt})
        parameters: dict[str, Any] = {"model": model, "messages": spoken}
        temperature = _first(request.temperature, self._defaults.temperature)
        if temperature is not None:
            parameters["temperature"] = temperature
        max_tokens = _first(request.max_tokens, self._defaults.max_tokens)
        if max_tokens is not None:
            new = self._catalogue.resolve(model).first.upstream.provider in NEW_NAME_PROVIDERS
            parameters["max_completion_tokens" if new else "max_tokens"] = max_tokens
        if stream:
            parameters["stream"] = True
        return Call(
            operation=Operation.CHAT,
            model=model,
            body=msgspec.json.encode(parameters),
            stream=stream,
            parameters=parameters,
        )


def _unknown(conversation_id: str) -> ConversationNotFound:
    return ConversationNotFound(
        f"There is no conversation {conversation_id}: it has expired, or it is not yours.",
        param="conversation_id",
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
