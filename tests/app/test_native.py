"""Weir's own API: conversations, single prompts, batches."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx2
import pytest

from service.config import FileConfig
from service.domain import Outcome
from tests.fakes.upstream import CONTENT, Ask, Exchange, FakeUpstream
from tests.running import RunningWeir, configuration


@pytest.fixture
def api(weir: RunningWeir) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"{weir.url}/api/v1", timeout=20) as client:
        yield client


def chat(api: httpx2.Client, message: str = "Hello!", **fields: Any) -> dict[str, Any]:
    response = api.post("/chat", json={"message": message, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream_events(response: httpx2.Response) -> list[dict[str, Any]]:
    lines = [e for e in response.text.split("\n\n") if e and not e.startswith(":")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_turn_answers_with_all_that_a_caller_needs(api: httpx2.Client, weir: RunningWeir) -> None:
    answer = chat(api, model="gpt-4o-mini")
    assert set(answer) == {
        *("message", "conversation_id", "tokens_used", "model", "timestamp", "cost_estimate", "usage"),
        "request_id",
    }
    assert answer["message"] == CONTENT
    assert answer["tokens_used"] == 18
    assert answer["usage"]["cached_input_tokens"] == 4
    assert answer["cost_estimate"] is None, "the fake's host has no price"
    assert str(uuid.UUID(answer["conversation_id"])) == answer["conversation_id"]
    assert answer["request_id"] == weir.records()[0].request_id


def test_a_conversation_goes_along_with_its_next_turn(api: httpx2.Client, upstream: FakeUpstream) -> None:
    first = chat(api, "What is a weir?", system_prompt="Be short.")
    chat(api, "And a dam?", conversation_id=first["conversation_id"])
    assert upstream.requests[1].json["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is a weir?"},
        {"role": "assistant", "content": CONTENT},
        {"role": "user", "content": "And a dam?"},
    ]


def test_only_the_last_twenty_messages_go_along(api: httpx2.Client, upstream: FakeUpstream) -> None:
    conversation = chat(api, "0")["conversation_id"]
    for turn in range(1, 13):
        chat(api, str(turn), conversation_id=conversation)
    sent = upstream.requests[-1].json["messages"]
    assert len(sent) == 21
    assert [m["content"] for m in sent if m["role"] == "user"] == [str(n) for n in range(2, 13)]


def test_messages_are_trimmed_to_the_context_of_the_model(upstream: FakeUpstream) -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": "fake", "base_url": upstream.base_url}],
            "models": [{"name": "small", "upstream": "fake", "context_tokens": 300}],
        }
    )
    with RunningWeir(configuration(file=file)) as weir:
        client = httpx2.Client(base_url=f"{weir.url}/api/v1", timeout=20)
        long = "word " * 100
        conversation = chat(client, long, max_tokens=100)["conversation_id"]
        chat(client, long, max_tokens=100, conversation_id=conversation)
        chat(client, "short", max_tokens=100, conversation_id=conversation)
        sent = upstream.requests[-1].json["messages"]
        assert [m["content"] for m in sent if m["role"] == "user"] == [long, "short"]


def test_a_streamed_turn(api: httpx2.Client, upstream: FakeUpstream) -> None:
    response = api.post("/chat/stream", json={"message": "Hello!"})
    events = stream_events(response)
    assert "".join(e["delta"] for e in events) == CONTENT
    assert [e["finished"] for e in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["tokens_used"] == 18
    conversation = response.headers["x-conversation-id"]
    assert {e["conversation_id"] for e in events} == {conversation}
    chat(api, "And?", conversation_id=conversation)
    assert upstream.requests[1].json["messages"][1] == {"role": "assistant", "content": CONTENT}


def test_stream_true_of_a_turn_streams(api: httpx2.Client) -> None:
    response = api.post("/chat", json={"message": "Hello!", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert stream_events(response)[-1]["finished"] is True


def test_a_streamed_turn_that_fails_ends_with_an_error_and_keeps_nothing(api: httpx2.Client) -> None:
    response = api.post("/chat/stream", json={"message": "Hello!", "model": "drop"})
    last = stream_events(response)[-1]
    assert last["error"]["code"] == "stream_truncated"
    assert last["finished"] is True
    assert api.get(f"/conversations/{response.headers['x-conversation-id']}").status_code == 404


def test_a_streamed_turn_of_a_caller_who_left_is_accounted_and_not_kept(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    body = b'{"message": "Hello!", "model": "endless"}'
    with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
        caller.sendall(
            b"POST /api/v1/chat/stream HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert caller.recv(1000)
    assert upstream.wait_for_call().cancelled.wait(10)
    assert weir.records()[0].outcome is Outcome.CLIENT_DISCONNECTED
    assert httpx2.get(f"{weir.url}/api/v1/conversations").json() == {"conversations": []}


def test_conversations_are_listed_shown_and_deleted(api: httpx2.Client) -> None:
    older = chat(api, "older")["conversation_id"]
    newer = chat(api, "newer", system_prompt="Be kind.")["conversation_id"]
    listed = api.get("/conversations").json()["conversations"]
    assert [c["id"] for c in listed] == [newer, older]
    assert "messages" not in listed[0]
    shown = api.get(f"/conversations/{newer}").json()
    assert [(m["role"], m["content"]) for m in shown["messages"]] == [
        ("user", "newer"),
        ("assistant", CONTENT),
    ]
    assert shown["system_prompt"] == "Be kind."
    assert shown["total_tokens"] == 18
    assert shown["total_cost"] == 0
    assert shown["unpriced_turns"] == 1
    assert api.delete(f"/conversations/{newer}").status_code == 204
    assert api.get(f"/conversations/{newer}").json()["error"]["code"] == "conversation_not_found"
    assert api.delete(f"/conversations/{newer}").status_code == 404
    assert len(api.get("/conversations").json()["conversations"]) == 1


def test_costs_add_up_over_a_conversation(upstream: FakeUpstream) -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": "fake", "base_url": upstream.base_url, "provider": "openai"}],
            "models": [{"name": "gpt-4o-mini", "upstream": "fake"}],
        }
    )
    with RunningWeir(configuration(file=file)) as weir:
        client = httpx2.Client(base_url=f"{weir.url}/api/v1", timeout=20)
        first = chat(client)
        # 8 of 12 input tokens at 0.15, 4 cached at 0.075, 6 output tokens at 0.60 dollars a million
        cost = (8 * 0.15 + 4 * 0.075 + 6 * 0.60) / 1e6
        assert first["cost_estimate"] == pytest.approx(cost)
        chat(client, conversation_id=first["conversation_id"])
        shown = client.get(f"/conversations/{first['conversation_id']}").json()
        assert shown["total_cost"] == pytest.approx(2 * cost)
        assert shown["total_tokens"] == 36
        assert shown["message_count"] == 4


def test_an_unknown_conversation_is_404_and_asks_no_model(api: httpx2.Client, upstream: FakeUpstream) -> None:
    response = api.post("/chat", json={"message": "Hi", "conversation_id": str(uuid.uuid4())})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "conversation_id"
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"message": ""}, "message"),
        ({"message": " \n\t "}, "message"),
        ({"message": "x" * 5001}, "message"),
        ({}, "message"),
        ({"message": "x", "conversation_id": "17"}, "conversation_id"),
        ({"message": "x", "system_prompt": "x" * 1001}, "system_prompt"),
        ({"message": "x", "temperature": 2.1}, "temperature"),
        ({"message": "x", "temperature": -0.1}, "temperature"),
        ({"message": "x", "max_tokens": 0}, "max_tokens"),
        ({"message": "x", "max_tokens": 4001}, "max_tokens"),
        ({"message": "x", "mesage": "typo"}, "mesage"),
    ],
)
@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_a_wrong_field_is_named(api: httpx2.Client, path: str, body: dict[str, Any], param: str) -> None:
    response = api.post(path, json=body)
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("validation_error", param)
    assert param in error["message"]


@pytest.mark.parametrize("message", ["x", "x" * 5000])
def test_the_bounds_of_a_message_are_inside(api: httpx2.Client, message: str) -> None:
    assert chat(api, message, temperature=2, max_tokens=4000, system_prompt="y" * 1000)


def test_a_body_that_is_no_json(api: httpx2.Client) -> None:
    response = api.post("/chat", content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"


def test_generate(api: httpx2.Client, upstream: FakeUpstream) -> None:
    answer = api.post("/generate", json={"prompt": "A haiku"}).json()
    assert (answer["text"], answer["tokens_used"]) == (CONTENT, 18)
    sent = upstream.requests[0].json
    assert sent["messages"] == [{"role": "user", "content": "A haiku"}]
    assert (sent["max_tokens"], sent["temperature"]) == (200, 0.7)


def test_each_prompt_of_a_batch_has_its_own_end(upstream: FakeUpstream, weir: RunningWeir) -> None:
    answer = httpx2.post(
        f"{weir.url}/api/v1/batch", json={"prompts": ["a", "b", "c"], "model": "flaky-1"}, timeout=20
    ).json()
    assert (answer["succeeded"], answer["failed"]) == (2, 1)
    assert [r["index"] for r in answer["results"]] == [0, 1, 2]
    failed = [r for r in answer["results"] if r["error"]]
    assert failed[0]["error"]["code"] == "openai_service_error"
    assert failed[0]["text"] is None
    assert answer["tokens_used"] == 36
    assert len({r.id for r in weir.records(3)}) == 3
    counted = {
        sample.labels["outcome"]: sample.value
        for family in weir.registry.collect()
        for sample in family.samples
        if sample.name == "weir_requests_total" and sample.labels["route"] == "/api/v1/batch" and sample.value
    }
    assert counted == {"success": 2, "upstream_error": 1}


def test_a_batch_runs_concurrently_under_its_limit(upstream: FakeUpstream) -> None:
    config = configuration(openai_base_url=upstream.base_url, batch_concurrency=4)
    with RunningWeir(config) as weir, httpx2.Client(timeout=20) as client:
        import threading

        got: list[httpx2.Response] = []
        body = {"prompts": [str(n) for n in range(20)], "model": "gate"}
        thread = threading.Thread(
            target=lambda: got.append(client.post(f"{weir.url}/api/v1/batch", json=body))
        )
        thread.start()
        upstream.wait_for_call(4)
        # All four places are taken; a fifth call would have come with the health answer at the latest.
        for _ in range(5):
            assert client.get(f"{weir.url}/health").status_code == 200
        assert len(upstream.calls) == 4
        upstream.release()
        thread.join(20)
        assert got[0].json()["succeeded"] == 20


@pytest.mark.parametrize("prompts", [[], ["x"] * 101, [" "], ["x", ""]])
def test_a_batch_of_the_wrong_size_is_refused_whole(
    api: httpx2.Client, upstream: FakeUpstream, prompts: list[str]
) -> None:
    assert api.post("/batch", json={"prompts": prompts}).status_code == 422
    assert upstream.requests == []


def test_a_caller_who_leaves_a_batch_cancels_all_of_it(weir: RunningWeir, upstream: FakeUpstream) -> None:
    body = json.dumps({"prompts": ["a", "b", "c"], "model": "hang"}).encode()
    with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
        caller.sendall(
            b"POST /api/v1/batch HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        upstream.wait_for_call(3)
    assert all(call.cancelled.wait(10) for call in upstream.calls)
    assert {r.outcome for r in weir.records(3)} == {Outcome.CLIENT_DISCONNECTED}


class Wordless(FakeUpstream):
    """Its answers hold no message."""

    def behaviour_of(self, ask: Ask) -> Callable[[Exchange], Awaitable[None]]:
        return lambda exchange: exchange.whole(b'{"id": "chatcmpl-1", "choices": []}')


@pytest.mark.parametrize(
    ("path", "words"), [("chat", {"message": "Hello!"}), ("generate", {"prompt": "Hello!"})]
)
def test_an_answer_without_a_message_is_an_error_that_names_the_providers_call(
    path: str, words: dict[str, str]
) -> None:
    with Wordless() as upstream, RunningWeir(configuration(openai_base_url=upstream.base_url)) as weir:
        answer = httpx2.post(f"{weir.url}/api/v1/{path}", json=words, timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "openai_service_error")
        assert answer.headers["x-upstream-request-id"] == "req_fake_1"
