"""The response cache from outside: the official SDK, real sockets, a real Redis."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import openai
import pytest

from service.config import FileConfig
from service.domain import CacheUse
from tests.fakes.upstream import FakeUpstream
from tests.redis_servers import Single
from tests.running import RunningWeir, configuration

ASK: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
}


@pytest.fixture
def fleet(upstream: FakeUpstream) -> Iterator[list[RunningWeir]]:
    """Two Weirs on one Redis."""
    with ExitStack() as stack:
        redis = stack.enter_context(Single())
        config = configuration(
            openai_base_url=upstream.base_url,
            openai_api_key="sk-x",
            openai_max_retries=0,
            redis_url=redis.url,
        )
        yield [stack.enter_context(RunningWeir(config)) for _ in range(2)]


def asked(weir: RunningWeir, how: str, **values: Any) -> tuple[str, Any]:
    """X-Weir-Cache of the answer, and the completion, asked for in one of three ways."""
    sdk, body = weir.sdk(), ASK | values
    if how == "whole":
        raw = sdk.chat.completions.with_raw_response.create(**body)
        return raw.headers["x-weir-cache"], raw.parse().model_dump()
    if how == "stream with usage":
        body["stream_options"] = {"include_usage": True}
    with sdk.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion().model_dump()
        used: str = stream._response.headers["x-weir-cache"]
    for choice in final["choices"]:
        choice["message"].pop("parsed")
    return used, final


WAYS = ("whole", "stream", "stream with usage")


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_whoever_asks_second_gets_the_first_ones_answer(
    weir: RunningWeir, upstream: FakeUpstream, first: str, second: str
) -> None:
    uses, answers = zip(*(asked(weir, how) for how in (first, second)), strict=True)
    assert uses == ("miss", "hit")
    assert len(upstream.requests) == 1
    for how, answer in zip((first, second), answers, strict=True):
        usage = answer.pop("usage")
        assert (usage is None) is (how == "stream")
        answer["choices"][0]["message"].pop("annotations")
    assert answers[0] == answers[1]
    records = weir.records(2)
    assert [r.cache for r in records] == [CacheUse.MISS, CacheUse.HIT]
    assert records[1].usage is None
    assert (records[1].cost.usd, records[1].cost.source) == (0.0, "cache")
    assert records[1].response_model == records[0].response_model
    assert records[1].attempts == 0


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_replayed_too(weir: RunningWeir, upstream: FakeUpstream, stream: bool) -> None:
    for _ in range(2):
        for streamed in (stream, not stream):
            if streamed:
                with weir.sdk().responses.stream(model="m", input="x", temperature=0) as events:
                    text = events.get_final_response().output_text
            else:
                text = weir.sdk().responses.create(model="m", input="x", temperature=0).output_text
            assert text == "Hello from the fake upstream."
    assert len(upstream.requests) == 1


def test_headers_are_the_callers_word(weir: RunningWeir, upstream: FakeUpstream) -> None:
    def use(header: dict[str, str], **values: Any) -> str:
        return asked(weir, "whole", extra_headers=header, **values)[0]

    assert use({}, temperature=1) == "bypass"
    assert use({"X-Weir-Cache": "on"}, temperature=1) == "miss"
    assert use({"X-Weir-Cache": "on"}, temperature=1) == "hit"
    assert use({"Cache-Control": "max-age=600"}, temperature=1) == "hit"
    assert use({"X-Weir-Cache": "refresh"}, temperature=1) == "miss"
    assert use({"X-Weir-Cache": "off"}) == "bypass"
    assert use({"Cache-Control": "no-store"}) == "bypass"
    with pytest.raises(openai.BadRequestError, match="X-Weir-Cache"):
        use({"X-Weir-Cache": "maybe"})
    assert len(upstream.requests) == 5


@pytest.mark.parametrize("model", ["close-no-done", "drop", "error-event", "drop-mid-event", "no-usage"])
def test_a_stream_that_did_not_end_well_is_not_kept(
    weir: RunningWeir, upstream: FakeUpstream, model: str
) -> None:
    for _ in range(2):
        try:
            for _ in weir.sdk().chat.completions.create(**ASK | {"model": model}, stream=True):
                pass
        except (openai.APIError, Exception):
            pass
    weir.records(2)
    assert len(upstream.requests) == 2


async def test_a_hundred_equal_calls_make_one_call(fleet: list[RunningWeir], upstream: FakeUpstream) -> None:
    sdks = [weir.async_sdk(timeout=60) for weir in fleet]
    body = ASK | {"model": "slow-head-500"}

    async def one(number: int) -> str:
        sdk = sdks[number % 2]
        if number % 3:
            raw = await sdk.chat.completions.with_raw_response.create(**body)
            found: str = raw.headers["x-weir-cache"]
            return found
        async with sdk.chat.completions.stream(**body) as stream:
            await stream.get_final_completion()
            used: str = stream._response.headers["x-weir-cache"]
            return used

    uses = await asyncio.gather(*(one(n) for n in range(100)))
    for sdk in sdks:
        await sdk.close()
    assert Counter(uses) == {"miss": 1, "hit": 99}
    assert len(upstream.requests) == 1


async def test_a_leader_whose_caller_leaves_is_followed_by_another(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    body = ASK | {"model": "gate-stream"}
    async with weir.async_sdk() as sdk:
        first = await sdk.chat.completions.create(**body, stream=True)
        second = asyncio.create_task(sdk.chat.completions.create(**body, stream=True))
        await first.close()
        stream = await second
        assert len(upstream.requests) == 2
        upstream.release()
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == "Hello from the fake upstream."


def test_the_other_pod_answers_from_the_cache(fleet: list[RunningWeir], upstream: FakeUpstream) -> None:
    assert asked(fleet[0], "stream")[0] == "miss"
    fleet[0].records(1)
    assert asked(fleet[1], "whole")[0] == "hit"


def test_a_turn_is_answered_from_the_cache_and_kept(weir: RunningWeir, upstream: FakeUpstream) -> None:
    import httpx2 as http

    body = {"message": "Hello", "temperature": 0}
    with http.Client(base_url=weir.url) as client:
        one = client.post("/api/v1/chat", json=body)
        with client.stream("POST", "/api/v1/chat/stream", json=body) as response:
            assert response.headers["x-weir-cache"] == "hit", response.headers
            lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
        text = "".join(line["delta"] for line in lines)
        assert text == one.json()["message"], one.json()
        kept = client.get("/api/v1/conversations").json()["conversations"]
    assert len(kept) == 2
    assert len(upstream.requests) == 1


def test_who_waits_for_an_answer_that_is_not_kept_waits_no_longer(upstream: FakeUpstream) -> None:
    """Of a model that stands in, and of a response that failed: both end the wait of equal calls."""
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": "fake", "base_url": upstream.base_url}],
            "models": [
                {"name": "status-500", "upstream": "fake", "fallbacks": {"unavailable": ["good"]}},
                {"name": "good", "upstream": "fake"},
                {"name": "failed", "upstream": "fake"},
            ],
        }
    )
    with RunningWeir(configuration(file=file, openai_max_retries=0)) as weir:
        sdk = weir.sdk(timeout=10)
        for _ in range(2):
            answer = sdk.chat.completions.create(**ASK | {"model": "status-500"})
            assert answer.choices[0].message.content
            assert sdk.responses.create(model="failed", input="Hello", temperature=0).status == "failed"
        assert len(weir.parts.service.cache.flights) == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("tools", [5, True, "x", {"a": 1}])
def test_tools_that_are_no_list_are_the_upstreams_to_judge(weir: RunningWeir, tools: Any) -> None:
    body = ASK | {"tools": tools}
    assert httpx2.post(f"{weir.url}/v1/chat/completions", json=body, timeout=20).status_code != 500
