"""The official SDK holds conversations through Weir as it does with OpenAI."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from service.domain import Outcome, UsageSource
from tests.fakes.upstream import CONTENT, TOOL_ARGUMENTS, FakeUpstream
from tests.running import RunningWeir

HELLO: Any = [{"role": "user", "content": "Hello!"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]


def test_whole_chat_completion(weir: RunningWeir) -> None:
    answer = weir.sdk().chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert answer.choices[0].message.content == CONTENT
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 12
    record = weir.records()[0]
    assert record.outcome is Outcome.SUCCESS
    assert record.usage is not None
    assert (record.usage.input_tokens, record.usage.output_tokens) == (12, 6)
    assert (record.usage.cached_input_tokens, record.usage.reasoning_tokens) == (4, 2)
    assert record.usage.source is UsageSource.PROVIDER


def test_streamed_chat_completion(weir: RunningWeir) -> None:
    stream = weir.sdk().chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True)
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == CONTENT
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_async_conversation_over_several_turns(weir: RunningWeir, upstream: FakeUpstream) -> None:
    messages = list(HELLO)
    async with weir.async_sdk() as client:
        for turn in range(3):
            text = ""
            async for chunk in await client.chat.completions.create(
                model="gpt-4o-mini", messages=messages, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            assert text == CONTENT
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And {turn}?"}]
    assert [len(r.json["messages"]) for r in upstream.requests] == [1, 3, 5]


def test_usage_is_asked_of_the_upstream_and_hidden_from_who_did_not_ask(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    chunks = list(weir.sdk().chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True))
    assert upstream.requests[0].json["stream_options"] == {"include_usage": True}
    assert all(c.usage is None for c in chunks)
    assert all(c.choices for c in chunks)
    usage = weir.records()[0].usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.source) == (12, 6, UsageSource.PROVIDER)


def test_usage_is_shown_to_who_asked(weir: RunningWeir) -> None:
    chunks = list(
        weir.sdk().chat.completions.create(
            model="gpt-4o-mini", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 18


@pytest.mark.parametrize("model", ["usage-in-finish", "usage-every-chunk", "usage-twice"])
def test_usage_in_unusual_places_is_hidden_and_counted_once(weir: RunningWeir, model: str) -> None:
    chunks = list(weir.sdk().chat.completions.create(model=model, messages=HELLO, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == CONTENT
    assert all(c.usage is None for c in chunks)
    usage = weir.records()[0].usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (12, 6)


def test_other_stream_options_are_kept(weir: RunningWeir, upstream: FakeUpstream) -> None:
    options: Any = {"include_obfuscation": False}
    list(
        weir.sdk().chat.completions.create(
            model="gpt-4o-mini", messages=HELLO, stream=True, stream_options=options
        )
    )
    assert upstream.requests[0].json["stream_options"] == {**options, "include_usage": True}


def test_every_parameter_is_passed_on(weir: RunningWeir, upstream: FakeUpstream) -> None:
    weir.sdk().chat.completions.create(
        model="gpt-4o-mini",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                ],
            }
        ],
        tools=TOOLS,
        tool_choice="none",
        response_format={"type": "json_object"},
        n=2,
        logprobs=True,
        top_logprobs=3,
        seed=7,
        temperature=0.1,
        extra_body={"brand_new": {"deep": [1, 2.5, None]}},
    )
    sent = upstream.requests[0].json
    assert sent["n"] == 2
    assert sent["logprobs"] is True
    assert sent["seed"] == 7
    assert sent["tools"] == TOOLS
    assert sent["response_format"] == {"type": "json_object"}
    assert sent["brand_new"] == {"deep": [1, 2.5, None]}
    assert sent["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png")


def test_several_choices_come_back(weir: RunningWeir) -> None:
    answer = weir.sdk().chat.completions.create(model="gpt-4o-mini", messages=HELLO, n=3)
    assert [c.index for c in answer.choices] == [0, 1, 2]


def test_answer_bytes_are_passed_back_as_they_came(weir: RunningWeir, upstream: FakeUpstream) -> None:
    raw = weir.sdk().chat.completions.with_raw_response.create(model="echo", messages=HELLO)
    assert raw.content == upstream.calls[0].answer_body


def test_whole_request_bytes_are_passed_on_as_they_came(weir: RunningWeir, upstream: FakeUpstream) -> None:
    body = b'{ "model":"echo" ,\n "messages": [{"role":"user","content":"hi"}], "odd": 1e3 }'
    weir.sdk().post(
        "/chat/completions",
        content=body,
        cast_to=object,
        options={"headers": {"content-type": "application/json"}},
    )
    assert upstream.requests[0].body == body


def test_streamed_request_is_changed_by_nothing_but_the_option(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    body = b' {"model":"gpt-4o-mini","stream":true, "messages":[],"big":123456789012345678901234567890}'
    weir.sdk().with_options(max_retries=0)._client.post(
        f"{weir.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    ).read()
    assert upstream.requests[0].body == body.replace(b"{", b'{"stream_options":{"include_usage":true},', 1)


def test_tool_calls_whole_and_streamed(weir: RunningWeir) -> None:
    client = weir.sdk()
    whole = client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, tools=TOOLS)
    assert whole.choices[0].message.tool_calls is not None
    assert whole.choices[0].message.tool_calls[0].function.arguments == TOOL_ARGUMENTS  # type: ignore[union-attr]
    arguments = ""
    for chunk in client.chat.completions.create(
        model="gpt-4o-mini", messages=HELLO, tools=TOOLS, stream=True
    ):
        for call in chunk.choices[0].delta.tool_calls or []:
            arguments += (call.function.arguments if call.function else None) or ""
    assert arguments == TOOL_ARGUMENTS


def test_text_completions(weir: RunningWeir) -> None:
    client = weir.sdk()
    assert client.completions.create(model="gpt-4o-mini", prompt="Say").choices[0].text == CONTENT
    pieces = client.completions.create(model="gpt-4o-mini", prompt="Say", stream=True)
    assert "".join(p.choices[0].text for p in pieces) == CONTENT
    assert [r.operation.genai_name for r in weir.records(2)] == ["text_completion", "text_completion"]


def test_embeddings(weir: RunningWeir) -> None:
    answer = weir.sdk().embeddings.create(model="text-embedding-3-small", input="river")
    assert answer.data[0].embedding == [0.25, -0.5, 0.125]
    usage = weir.records()[0].usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (5, 0)


def test_responses_whole_and_streamed(weir: RunningWeir) -> None:
    client = weir.sdk()
    whole = client.responses.create(model="gpt-4o-mini", input="Hello!")
    assert whole.output_text == CONTENT
    events = list(client.responses.create(model="gpt-4o-mini", input="Hello!", stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == CONTENT
    assert events[-1].type == "response.completed"
    for record in weir.records(2):
        assert record.usage is not None
        assert (record.usage.input_tokens, record.usage.output_tokens) == (12, 6)
        assert record.finish_reason == "completed"


def test_models(weir: RunningWeir) -> None:
    client = weir.sdk()
    assert "gpt-4o-mini" in [m.id for m in client.models.list()]
    assert client.models.retrieve("gpt-4o").id == "gpt-4o"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("nonesuch")


EXPECTED: list[tuple[str, type[openai.APIStatusError], int, str]] = [
    ("status-400", openai.BadRequestError, 400, "fake_400"),
    ("status-401", openai.InternalServerError, 502, "upstream_authentication_error"),
    ("status-403", openai.InternalServerError, 502, "upstream_authentication_error"),
    ("status-404", openai.NotFoundError, 404, "fake_404"),
    ("status-408", openai.APIStatusError, 408, "fake_408"),
    ("status-409", openai.ConflictError, 409, "fake_409"),
    ("status-413", openai.APIStatusError, 413, "fake_413"),
    ("status-422", openai.UnprocessableEntityError, 422, "fake_422"),
    ("status-429", openai.RateLimitError, 429, "rate_limit_exceeded"),
    ("status-500", openai.InternalServerError, 502, "openai_service_error"),
    ("status-503", openai.InternalServerError, 503, "openai_service_error"),
    ("status-504", openai.InternalServerError, 504, "api_timeout"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("model", "kind", "status", "code"), EXPECTED)
def test_the_sdk_raises_its_own_class_for_each_error_of_an_upstream(
    weir: RunningWeir, model: str, kind: type[openai.APIStatusError], status: int, code: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        weir.sdk().chat.completions.create(model=model, messages=HELLO, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert set(json.loads(caught.value.response.content)["error"]) == {"message", "type", "param", "code"}
    assert "sk-upstream-secret" not in caught.value.response.text
    assert caught.value.response.headers["x-upstream-request-id"].startswith("req_fake_")
    assert weir.records()[0].error_code == caught.value.code or status in (400, 404, 408, 409, 413, 422)


def test_retry_after_is_kept(weir: RunningWeir) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        weir.sdk().chat.completions.create(model="status-429-after", messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.response.headers["x-should-retry"] == "true"
    assert weir.records()[0].outcome is Outcome.RATE_LIMITED


def test_a_fault_of_weir_itself_is_a_500_in_the_envelope(weir: RunningWeir) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret detail")

    weir.parts.service.accounts.reserve = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(openai.InternalServerError) as caught:
        weir.sdk().chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert caught.value.status_code == 500
    assert caught.value.code == "internal_error"
    assert "secret detail" not in caught.value.response.text
    assert caught.value.request_id
    assert weir.records()[0].outcome is Outcome.INTERNAL_ERROR
