"""What goes along with a turn of a conversation, and what of it is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import FileConfig
from service.dialogue import ANSWER_ROOM_TOKENS, Defaults, Dialogue
from service.domain import (
    ChatRequest,
    Conversation,
    Cost,
    Message,
    Operation,
    Principal,
    RequestRecord,
    Turn,
    Usage,
)
from service.errors import ConversationNotFound
from service.ports import PriceBook
from service.pricing import PriceTable
from service.routing.catalogue import ModelCatalogue
from service.routing.routes import Catalogue
from service.stores.memory import MemoryConversations
from service.tokens import MESSAGE_TOKENS, estimate_message
from service.upstreams.making import make_upstreams
from tests.running import configuration
from tests.unit.ports import USER, Clock, FlatPrices, OneUpstream, ScriptedUpstream

OTHER = Principal("other", "team")


class Talk:
    """A dialogue with its store."""

    def __init__(
        self,
        *,
        provider: str = "scripted",
        context: int | None = None,
        catalogue: Catalogue | None = None,
        prices: PriceBook | None = None,
        **defaults: Any,
    ) -> None:
        self.clock = Clock(500.0)
        self.store = MemoryConversations(ttl_seconds=1e9, most=100, clock=self.clock)
        upstream = ScriptedUpstream()
        upstream.provider = provider
        self.dialogue = Dialogue(
            conversations=self.store,
            catalogue=catalogue or OneUpstream(upstream),
            prices=prices or FlatPrices(context),
            defaults=Defaults(**{"model": "default-model"} | defaults),
            clock=self.clock,
        )

    async def begun(self, *turns: tuple[str, str], system_prompt: str | None = None) -> str:
        """A conversation with these turns."""
        for question, answer in turns:
            said = (Message("user", question), Message("assistant", answer))
            await self.store.append(USER, "c-1", Turn(said, 1, 0.0), system_prompt, begin=True)
        return "c-1"

    async def sent(self, request: ChatRequest, *, stream: bool = False) -> dict[str, Any]:
        """The body that goes to the upstream."""
        opening = await self.dialogue.begin(USER, request, stream=stream)
        body: dict[str, Any] = json.loads(opening.call.body)
        assert body == opening.call.parameters
        assert (opening.call.model, opening.call.stream) == (body["model"], stream)
        return body

    async def contents(self, request: ChatRequest) -> list[str]:
        return [m["content"] for m in (await self.sent(request))["messages"]]


def record(usage: Usage | None = None, cost: float | None = 0.5) -> RequestRecord:
    return RequestRecord("1", "r", "/x", Operation.CHAT, principal=USER, usage=usage, cost=Cost(cost, "flat"))


# -- the call ------------------------------------------------------------------------------------


async def test_a_first_message_goes_alone_with_nothing_that_nobody_said() -> None:
    assert await Talk().sent(ChatRequest("Hello")) == {
        "model": "default-model",
        "messages": [{"role": "user", "content": "Hello"}],
    }


async def test_what_the_caller_says_goes_before_the_defaults() -> None:
    talk = Talk(max_tokens=10, temperature=0.5)
    body = await talk.sent(ChatRequest("Hello", model="m", max_tokens=3, temperature=0.0), stream=True)
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 3, 0.0, True)
    body = await talk.sent(ChatRequest("Hello"))
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("default-model", 10, 0.5)
    assert "stream" not in body


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        ("openai", "max_completion_tokens"),
        ("azure", "max_completion_tokens"),
        ("groq", "max_tokens"),
        ("simulator", "max_tokens"),
        ("llm.internal", "max_tokens"),
    ],
)
async def test_the_token_limit_has_the_name_that_the_provider_knows(provider: str, name: str) -> None:
    body = await Talk(provider=provider).sent(ChatRequest("Hello", max_tokens=7))
    assert body[name] == 7
    assert len({"max_tokens", "max_completion_tokens"} & set(body)) == 1


async def test_the_system_prompt_comes_first_and_stays_with_the_conversation() -> None:
    talk = Talk()
    opening = await talk.dialogue.begin(USER, ChatRequest("Hello", system_prompt="Be brief."), stream=False)
    await talk.dialogue.keep(opening, "Hi.", record())
    again = ChatRequest("And?", conversation_id=opening.conversation_id)
    messages = (await talk.sent(again))["messages"]
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ]


async def test_a_new_system_prompt_takes_the_place_of_the_old_one() -> None:
    talk = Talk()
    conversation = await talk.begun(("Q", "A"), system_prompt="Old.")
    request = ChatRequest("Hello", conversation_id=conversation, system_prompt="New.")
    opening = await talk.dialogue.begin(USER, request, stream=False)
    await talk.dialogue.keep(opening, "Hi.", record())
    kept = await talk.store.load(USER, conversation)
    assert kept is not None
    assert kept.system_prompt == "New."
    assert await talk.contents(ChatRequest("And?", conversation_id=conversation)) == [
        *("New.", "Q", "A", "Hello", "Hi.", "And?")
    ]


def test_a_generation_is_one_prompt_with_its_limits() -> None:
    call = Talk(provider="openai").dialogue.generation("Write.", 5, 0.1, None)
    assert json.loads(call.body) == {
        "model": "default-model",
        "messages": [{"role": "user", "content": "Write."}],
        "temperature": 0.1,
        "max_completion_tokens": 5,
    }
    assert call.operation is Operation.CHAT


# -- the history ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0, ["now"]),
        (1, ["now"]),
        (2, ["q3", "a3", "now"]),
        (3, ["q3", "a3", "now"]),
        (4, ["q2", "a2", "q3", "a3", "now"]),
        (100, ["q1", "a1", "q2", "a2", "q3", "a3", "now"]),
    ],
)
async def test_as_many_messages_go_along_as_wanted_and_never_an_answer_without_its_question(
    wanted: int, expected: list[str]
) -> None:
    talk = Talk(history_messages=wanted)
    conversation = await talk.begun(("q1", "a1"), ("q2", "a2"), ("q3", "a3"))
    assert await talk.contents(ChatRequest("now", conversation_id=conversation)) == expected


@given(
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), max_size=6),
    context=st.integers(1, 400),
    max_tokens=st.none() | st.integers(1, 200),
    default=st.none() | st.integers(1, 200),
    prompt=st.none() | st.text("p", min_size=1, max_size=100),
)
async def test_what_goes_along_fits_into_the_models_context(
    sizes: list[tuple[int, int]],
    context: int,
    max_tokens: int | None,
    default: int | None,
    prompt: str | None,
) -> None:
    talk = Talk(context=context, max_tokens=default)
    turns = [("q" * q, "a" * a) for q, a in sizes]
    conversation = await talk.begun(("first", "answer"), *turns)
    request = ChatRequest("now", conversation_id=conversation, max_tokens=max_tokens, system_prompt=prompt)
    messages = [Message(m["role"], m["content"]) for m in (await talk.sent(request))["messages"]]
    assert messages[-1].content == "now"
    history = messages[1 if prompt else 0 : -1]
    room = max_tokens or default or ANSWER_ROOM_TOKENS
    if history:
        assert sum(map(estimate_message, messages)) + room <= context
        assert history[0].role == "user"


async def test_room_is_kept_for_the_answer() -> None:
    turn = ("q" * 396, "a" * 396)  # 103 tokens each, with their marks
    both = 2 * (99 + MESSAGE_TOKENS)
    question = estimate_message(Message("user", "now"))
    fits = Talk(context=both + question + 50)
    conversation = await fits.begun(turn)
    for max_tokens, messages in ((50, 3), (51, 1), (None, 1)):
        request = ChatRequest("now", conversation_id=conversation, max_tokens=max_tokens)
        assert len(await fits.contents(request)) == messages


async def test_without_a_known_context_all_that_is_wanted_goes_along() -> None:
    talk = Talk(context=None)
    conversation = await talk.begun(*[("q" * 10_000, "a" * 10_000)] * 5)
    assert len(await talk.contents(ChatRequest("now", conversation_id=conversation))) == 11


@pytest.mark.parametrize("name", ["gpt-4", "alias", "renamed", "renamed-alias"])
async def test_the_context_is_that_of_the_model_in_use_whatever_its_caller_calls_it(name: str) -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": "openai", "base_url": "https://api.openai.com/v1"}],
            "models": [
                {"name": "gpt-4", "upstream": "openai", "aliases": ["alias"]},
                {
                    "name": "renamed",
                    "upstream": "openai",
                    "upstream_model": "gpt-4",
                    "aliases": ["renamed-alias"],
                },
            ],
        }
    )
    known = configuration(file=file)
    talk = Talk(catalogue=ModelCatalogue(known, make_upstreams(known)), prices=PriceTable())
    long = ("q1" * 6_000, "a1" * 6_000)  # 6,000 tokens of the 8,192
    conversation = await talk.begun(long, ("q2", "a2"))
    for max_tokens, history in ((100, [*long, "q2", "a2"]), (4_000, ["q2", "a2"])):
        request = ChatRequest("now", conversation_id=conversation, model=name, max_tokens=max_tokens)
        assert await talk.contents(request) == [*history, "now"]


# -- what is kept --------------------------------------------------------------------------------


async def test_question_and_answer_are_kept_together() -> None:
    talk = Talk()
    opening = await talk.dialogue.begin(USER, ChatRequest("Hello"), stream=False)
    assert len(talk.store) == 0, "nothing is kept of a question without an answer"
    talk.clock.now = 510.0
    await talk.dialogue.keep(opening, "Hi.", record(Usage(10, 5)))
    kept = await talk.dialogue.show(USER, opening.conversation_id)
    assert kept.messages == (Message("user", "Hello", 500.0), Message("assistant", "Hi.", 510.0))
    assert (kept.total_messages, kept.total_tokens, kept.total_cost_usd) == (2, 15, 0.5)


@pytest.mark.parametrize(
    ("usage", "cost", "tokens", "unpriced"),
    [(Usage(1, 2), None, 3, 1), (None, None, 0, 1), (Usage(1, 2), 0.0, 3, 0)],
)
async def test_an_unpriced_turn_is_counted_as_such(
    usage: Usage | None, cost: float | None, tokens: int, unpriced: int
) -> None:
    talk = Talk()
    opening = await talk.dialogue.begin(USER, ChatRequest("Hello"), stream=False)
    await talk.dialogue.keep(opening, "Hi.", record(usage, cost))
    kept = await talk.dialogue.show(USER, opening.conversation_id)
    assert (kept.total_tokens, kept.unpriced_turns, kept.total_cost_usd) == (tokens, unpriced, 0.0)


async def test_new_conversations_have_ids_of_their_own() -> None:
    talk = Talk()
    ids = {
        (await talk.dialogue.begin(USER, ChatRequest("Hello"), stream=False)).conversation_id
        for _ in range(50)
    }
    assert len(ids) == 50


async def test_a_conversation_that_is_not_ones_own_is_not_there() -> None:
    talk = Talk()
    conversation = await talk.begun(("Q", "A"))
    request = ChatRequest("Hello", conversation_id=conversation)
    for who, asked in ((OTHER, request), (USER, ChatRequest("Hello", conversation_id="unknown"))):
        with pytest.raises(ConversationNotFound) as caught:
            await talk.dialogue.begin(who, asked, stream=False)
        assert caught.value.param == "conversation_id"
    with pytest.raises(ConversationNotFound):
        await talk.dialogue.show(OTHER, conversation)
    with pytest.raises(ConversationNotFound):
        await talk.dialogue.delete(OTHER, conversation)
    assert await talk.dialogue.list(OTHER, 10) == []
    assert isinstance(await talk.dialogue.show(USER, conversation), Conversation)


async def test_a_deleted_conversation_is_gone() -> None:
    talk = Talk()
    conversation = await talk.begun(("Q", "A"))
    assert [c.id for c in await talk.dialogue.list(USER, 10)] == [conversation]
    await talk.dialogue.delete(USER, conversation)
    with pytest.raises(ConversationNotFound):
        await talk.dialogue.show(USER, conversation)
