"""Idempotency keys in the whole service: one call however often a request is sent, over pods, by the SDK."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx2
import openai
import pytest

from service.domain import Outcome
from tests.fakes.upstream import CONTENT, FakeUpstream
from tests.redis_servers import Single
from tests.running import RunningWeir, WeirProcess, configuration

HELLO: Any = [{"role": "user", "content": "Hello!"}]
CHAT = "/v1/chat/completions"
KEY = {"Idempotency-Key": "order-1"}


@pytest.fixture
def single() -> Iterator[Single]:
    with Single() as servers:
        yield servers


def before(upstream: FakeUpstream, **values: Any) -> RunningWeir:
    """A Weir before the fake upstream that tries nothing twice by itself."""
    return RunningWeir(
        configuration(
            openai_base_url=upstream.base_url, openai_api_key="sk-secret", openai_max_retries=0, **values
        )
    )


def post(
    weir: RunningWeir, model: str = "good", path: str = CHAT, key: dict[str, str] = KEY, **more: Any
) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, "input": "Hello!", "prompt": "Hello!"} | more
    return httpx2.post(weir.url + path, json=body, headers=key, timeout=20)


def is_replay(answer: httpx2.Response) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


def code_of(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def once_free(ask: Callable[[], httpx2.Response]) -> httpx2.Response:
    """The answer, once the first request is over."""
    until = time.monotonic() + 20
    while (answer := ask()).status_code == 409:
        assert code_of(answer) == (409, "idempotency_in_progress")
        assert time.monotonic() < until
        time.sleep(0.02)
    return answer


# -- one Weir ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_same_again_is_the_same_byte_for_byte(
    weir: RunningWeir, upstream: FakeUpstream, path: str, stream: bool
) -> None:
    first = post(weir, path=path, stream=stream)
    again = post(weir, path=path, stream=stream)
    assert first.status_code == again.status_code == 200
    assert (is_replay(first), is_replay(again)) == (False, True)
    assert first.content == again.content
    for name in ("content-type", "cache-control", "x-upstream-request-id"):
        assert first.headers.get(name) == again.headers.get(name), name
    assert again.headers["x-weir-original-request-id"] == first.headers["x-request-id"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(upstream.calls) == len(weir.records()) == 1


def test_another_body_is_422_and_another_route_another_request(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    post(weir)
    assert code_of(post(weir, "other")) == (422, "idempotency_key_reused")
    assert not is_replay(post(weir, path="/v1/completions"))
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("key", ["a b", "", "x" * 256])
def test_what_is_no_key_is_400(weir: RunningWeir, upstream: FakeUpstream, key: str) -> None:
    refused = post(weir, key={"Idempotency-Key": key})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert upstream.calls == []


@pytest.mark.parametrize(
    ("model", "path", "status"),
    [("flaky-1", CHAT, 503), ("status-400", CHAT, 400), ("failed", "/v1/responses", 200)],
)
def test_what_was_no_good_answer_is_asked_for_again(
    weir: RunningWeir, upstream: FakeUpstream, model: str, path: str, status: int
) -> None:
    assert post(weir, model, path).status_code == status
    assert not is_replay(post(weir, model, path))
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("model", ["drop", "close-no-done", "error-event"])
def test_a_stream_that_went_wrong_is_asked_for_again(
    weir: RunningWeir, upstream: FakeUpstream, model: str
) -> None:
    for _ in range(2):
        answer = post(weir, model, stream=True)
        assert not is_replay(answer)
        assert b'"error"' in answer.content
    assert len(upstream.calls) == 2


def test_comments_of_a_silent_stream_are_not_replayed(weir: RunningWeir, upstream: FakeUpstream) -> None:
    first = post(weir, "ticks-3-250", stream=True)
    assert b": keep-alive" in first.content
    assert post(weir, "ticks-3-250", stream=True).content == first.content.replace(b": keep-alive\n\n", b"")


def test_a_turn_of_a_conversation_is_taken_once(weir: RunningWeir, upstream: FakeUpstream) -> None:
    def chat(path: str, key: str) -> httpx2.Response:
        return httpx2.post(
            weir.url + path, json={"message": "Hi"}, headers={"Idempotency-Key": key}, timeout=20
        )

    first, again = (chat("/api/v1/chat", "a") for _ in range(2))
    assert is_replay(again)
    assert first.json() == again.json()
    shown = httpx2.get(f"{weir.url}/api/v1/conversations/{first.json()['conversation_id']}").json()
    assert len(shown["messages"]) == 2
    first, again = (chat("/api/v1/chat/stream", "b") for _ in range(2))
    assert is_replay(again)
    assert (first.content, first.headers["x-conversation-id"]) == (
        again.content,
        again.headers["x-conversation-id"],
    )
    assert len(upstream.calls) == 2


def test_an_answer_that_is_too_large_is_not_asked_for_twice(upstream: FakeUpstream) -> None:
    with before(upstream, idempotency_max_bytes=1024) as weir:
        assert post(weir, "echo", user="x" * 2000).status_code == 200
        refused = post(weir, "echo", user="x" * 2000)
        assert code_of(refused) == (409, "idempotency_answer_not_kept")
        assert refused.headers["x-should-retry"] == "false"
        assert len(upstream.calls) == 1


def test_an_answer_is_replayed_until_its_time_is_over(upstream: FakeUpstream) -> None:
    with before(upstream, idempotency_ttl=0.5) as weir:
        post(weir)
        until = time.monotonic() + 20
        while is_replay(post(weir)):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert len(upstream.calls) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_after_a_caller_who_left_the_request_runs_again(
    weir: RunningWeir, upstream: FakeUpstream, stream: bool
) -> None:
    model = "gate-stream" if stream else "gate"
    body = {"model": model, "messages": HELLO, "stream": stream}
    with httpx2.Client(base_url=weir.url, headers=KEY) as client:
        if stream:
            with client.stream("POST", CHAT, json=body) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post(CHAT, json=body, timeout=0.3)
        assert upstream.wait_for_call().cancelled.wait(10)
        upstream.release()
        again = once_free(lambda: client.post(CHAT, json=body, timeout=20))
    assert (again.status_code, is_replay(again)) == (200, False)
    assert [record.outcome for record in weir.records(2)] == [Outcome.CLIENT_DISCONNECTED, Outcome.SUCCESS]


# -- the official SDK ----------------------------------------------------------------------------


class Lossy(httpx2.HTTPTransport):
    """A network that loses the first answer, after the server has sent it."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        self.requests.append(request)
        if len(self.requests) == 1:
            response.read()
            raise httpx2.ReadError("the answer was lost", request=request)
        return response


@pytest.mark.parametrize(("key", "calls"), [(KEY, 1), ({}, 2)], ids=["with a key", "without"])
def test_a_retry_of_the_sdk_gets_the_answer_that_was_lost(
    weir: RunningWeir, upstream: FakeUpstream, key: dict[str, str], calls: int
) -> None:
    network = Lossy()
    client = weir.sdk(max_retries=2, http_client=httpx2.Client(transport=network))
    answer = client.chat.completions.create(model="good", messages=HELLO, extra_headers=key)
    assert answer.choices[0].message.content == CONTENT
    sent = [request.headers.get("idempotency-key") for request in network.requests]
    assert sent == [key.get("Idempotency-Key")] * 2
    assert len(upstream.calls) == calls


def test_a_stream_through_the_sdk_is_replayed_event_by_event(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    # It closes the connection at the end mark; until Weir has noticed, a repeat waits for its Retry-After.
    client = weir.sdk(max_retries=5)
    asked: Any = {"model": "good", "messages": HELLO, "extra_headers": KEY}
    asked["stream_options"] = {"include_usage": True}  # else Weir leaves out a chunk of the upstream's
    first, again = (
        [chunk.model_dump() for chunk in client.chat.completions.create(stream=True, **asked)]
        for _ in range(2)
    )
    assert first == again
    assert len(first) > 3
    with client.chat.completions.with_streaming_response.create(stream=True, **asked) as response:
        assert response.headers["idempotent-replayed"] == "true"
        assert b"".join(response.iter_bytes()) == upstream.calls[0].answer_body
    assert len(upstream.calls) == len(weir.records()) == 1
    assert weir.records()[0].outcome is Outcome.SUCCESS


def test_the_sdk_waits_for_one_that_runs_and_raises_its_own_errors(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    def ask(model: str = "gate", retries: int = 0) -> openai.types.chat.ChatCompletion:
        client = weir.sdk(max_retries=retries)
        return client.chat.completions.create(model=model, messages=HELLO, extra_headers=KEY)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask)
        upstream.wait_for_call()
        with pytest.raises(openai.ConflictError) as running:
            ask()
        assert running.value.code == "idempotency_in_progress"
        assert int(running.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.UnprocessableEntityError) as reused:
            ask("other", retries=2)
        assert reused.value.code == "idempotency_key_reused"
        waiting = pool.submit(ask, "gate", 5)
        upstream.release()
        assert first.result(20) == waiting.result(20)
    assert len(upstream.calls) == 1


# -- several pods --------------------------------------------------------------------------------


def test_fifty_at_once_through_two_weirs_are_one_call(single: Single, upstream: FakeUpstream) -> None:
    url = single.url
    with before(upstream, redis_url=url) as a, before(upstream, redis_url=url) as b:
        start = threading.Barrier(50)

        def one(number: int) -> httpx2.Response:
            start.wait(20)
            return post((a, b)[number % 2], "gate")

        with ThreadPoolExecutor(50) as pool:
            running: set[Future[httpx2.Response]] = {pool.submit(one, number) for number in range(50)}
            refused: list[httpx2.Response] = []
            while len(refused) < 49:
                done, running = wait(running, 30, FIRST_COMPLETED)
                assert done
                refused += [future.result() for future in done]
            assert {code_of(answer) for answer in refused} == {(409, "idempotency_in_progress")}
            assert {answer.headers["x-should-retry"] for answer in refused} == {"true"}
            assert len(upstream.calls) == 1
            upstream.release()
            first = running.pop().result(20)
            assert (first.status_code, is_replay(first)) == (200, False)
            again = list(pool.map(one, range(50)))
        assert [answer.status_code for answer in again if not is_replay(answer)] == []
        assert {answer.content for answer in again} == {first.content}
        assert len(upstream.calls) == 1
        assert len(a._entered._records) + len(b._entered._records) == 1


def test_what_a_killed_pod_left_behind_runs_again(single: Single, upstream: FakeUpstream) -> None:
    values = {
        "OPENAI_BASE_URL": upstream.base_url,
        "OPENAI_API_KEY": "sk-secret",
        "REDIS_URL": single.url,
        "LEASE_SECONDS": "3",
    }
    with before(upstream, redis_url=single.url) as here, WeirProcess(**values) as pod:
        pod.wait_until_ready()
        body = {"model": "gate", "messages": HELLO}

        def ask(url: str) -> httpx2.Response:
            return httpx2.post(url + CHAT, json=body, headers=KEY, timeout=20)

        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(ask, pod.url)
            upstream.wait_for_call()
            assert code_of(ask(here.url)) == (409, "idempotency_in_progress")
            pod.process.kill()
            with pytest.raises(httpx2.TransportError):
                lost.result(20)
        upstream.release()
        again = once_free(lambda: ask(here.url))
        assert (again.status_code, is_replay(again)) == (200, False)
        assert is_replay(ask(here.url))
        assert len(upstream.calls) == 2  # what the killed pod asked for may have been charged


def test_while_redis_is_away_each_pod_knows_its_own(single: Single, upstream: FakeUpstream) -> None:
    with before(upstream, redis_url=single.url) as a, before(upstream, redis_url=single.url) as b:
        post(a, key={"Idempotency-Key": "before"})
        single.kill()
        first = post(a)
        assert first.status_code == 200
        assert (is_replay(post(a)), is_replay(post(b))) == (True, False)
        assert len(upstream.calls) == 3
        single.restart()
        until = time.monotonic() + 20
        while not is_replay(post(b, key={"Idempotency-Key": "before"})):
            # Asked before Redis was back, b has an answer of its own from then on.
            assert time.monotonic() < until
            time.sleep(0.02)
        assert is_replay(post(a))
