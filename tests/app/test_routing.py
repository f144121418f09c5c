"""Several upstreams behind the whole service: which one is asked, and which model answers in the end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.auth import hash_key
from service.config import FileConfig, KeyConfig
from service.domain import Outcome, RequestRecord
from service.routing.breaker import Cause, Circuit
from service.routing.places import Condition
from tests.fakes.upstream import (
    COMPLETION_TOKENS,
    CONTENT,
    PROMPT_TOKENS,
    FakeUpstream,
)
from tests.redis_servers import Single
from tests.running import RunningWeir, configuration, free_port

HELLO: Any = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def one() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake
        assert fake.errors == []


@pytest.fixture
def two() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake
        assert fake.errors == []


def weir_with(
    one: FakeUpstream | str,
    two: FakeUpstream | str,
    *models: dict[str, Any],
    upstream: dict[str, Any] | None = None,
    keys: tuple[KeyConfig, ...] = (),
    **values: Any,
) -> RunningWeir:
    """Upstreams `one` and `two`; `upstream` is what else the file says of `one`."""
    urls = [u if isinstance(u, str) else u.base_url for u in (one, two)]
    file = FileConfig.model_validate(
        {
            "upstreams": [
                {"name": "one", "base_url": urls[0], **(upstream or {})},
                {"name": "two", "base_url": urls[1]},
            ],
            "models": list(models),
        }
    )
    values = {"openai_timeout": 10.0, "openai_max_retries": 0, "cache_ttl": 0} | values
    return RunningWeir(configuration(file=file, keys=keys, **values))


def places(first: str, second: str = "good", **more: Any) -> dict[str, Any]:
    """The model `m` at both upstreams, under these names there."""
    both = [{"upstream": "one", "model": first}, {"upstream": "two", "model": second}]
    return {"name": "m", "upstreams": both, **more}


def ask(weir: RunningWeir, model: str = "m", /, headers: Any = None, **more: Any) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, **more}
    return httpx2.post(f"{weir.url}/v1/chat/completions", json=body, headers=headers, timeout=20)


def content(answer: httpx2.Response) -> str:
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def streamed(answer: httpx2.Response) -> tuple[str, dict[str, Any] | None, bool]:
    """The text of a stream, its error and whether it ended with its mark."""
    text, error, done = "", None, False
    for line in answer.text.splitlines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error", error)
            text += "".join(c["delta"].get("content") or "" for c in event.get("choices", ()))
    return text, error, done


def code(answer: httpx2.Response) -> str:
    found: str = answer.json()["error"]["code"]
    return found


def condition(weir: RunningWeir, upstream: str, model: str) -> Condition:
    found = weir.parts.conditions.find(upstream, model)
    assert found is not None
    return found


def until(holds: Callable[[], bool], complaint: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, complaint
        time.sleep(0.01)


def attempts(
    weir: RunningWeir, kind: str, upstream: str, outcome: str = "success", model: str = "m"
) -> float:
    labels = {"kind": kind, "upstream": upstream, "outcome": outcome, "gen_ai_request_model": model}
    return weir.metric("weir_upstream_attempts_total", **labels)


def nothing_runs(weir: RunningWeir) -> None:
    for _, each in weir.parts.conditions.items():
        assert (each.running, each.peer.running) == (0, 0)


# -- failover ------------------------------------------------------------------------------------

FAULTS = {
    "status-500": "upstream_error",
    "status-503-after": "upstream_error",
    "status-429": "rate_limited",
    "status-429-after": "rate_limited",
    "status-401": "upstream_error",
    "flaky-reset-1000": "upstream_error",
    "hang": "timeout",
    "html": "upstream_error",
    "truncated-json": "upstream_error",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stream", [False, True])
def test_the_second_upstream_answers_when_the_first_cannot(
    one: FakeUpstream, two: FakeUpstream, fault: str, stream: bool
) -> None:
    if stream and fault == "truncated-json":
        fault = "empty-stream"
    with weir_with(one, two, places(fault), upstream={"first_byte_timeout": 0.3}) as weir:
        answer = ask(weir, stream=stream)
        assert answer.status_code == 200
        assert (streamed(answer)[0] if stream else content(answer)) == CONTENT
        (record,) = weir.records()
        assert (record.upstream, record.attempts, record.outcome) == ("two", 2, Outcome.SUCCESS)
        assert (record.answered_by, "x-weir-model" in answer.headers) == (None, False)
        assert (len(one.calls), len(two.calls)) == (1, 1)
        assert attempts(weir, "first", "one", FAULTS.get(fault, "upstream_error")) == 1
        assert attempts(weir, "failover", "two") == 1
        weir.in_loop(lambda: nothing_runs(weir))


@pytest.mark.parametrize("stream", [False, True])
def test_the_second_upstream_answers_when_the_first_is_not_there(two: FakeUpstream, stream: bool) -> None:
    with weir_with(f"http://127.0.0.1:{free_port()}/v1", two, places("any")) as weir:
        answer = ask(weir, stream=stream)
        assert (streamed(answer)[0] if stream else content(answer)) == CONTENT
        assert weir.records()[0].attempts == 2


def test_an_upstream_that_is_late_is_left_as_soon_as_its_own_time_is_over(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    with weir_with(one, two, places("hang"), upstream={"first_byte_timeout": 0.2}) as weir:
        assert ask(weir).status_code == 200
        assert one.calls[0].cancelled.wait(10), "its connection is closed"


def test_a_request_that_is_wrong_is_asked_nowhere_else(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("status-400")) as weir:
        assert ask(weir).status_code == 400
        assert two.calls == []
        assert condition(weir, "one", "status-400").breaker.state is Circuit.CLOSED


def test_when_all_fail_the_caller_gets_the_last_ones_error(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("status-500", "status-429-after")) as weir:
        answer = ask(weir)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert (len(one.calls), len(two.calls)) == (1, 1)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("drop", "stream_truncated"), ("error-event", "openai_service_error"), ("stall", "api_timeout")],
)
def test_nothing_is_asked_again_after_the_first_event(
    one: FakeUpstream, two: FakeUpstream, fault: str, error: str
) -> None:
    model = places(fault, fallbacks={"unavailable": ["other"]})
    other = {"name": "other", "upstream": "two"}
    with weir_with(one, two, model, other, upstream={"idle_timeout": 0.3}, openai_max_retries=3) as weir:
        text, told, done = streamed(ask(weir, stream=True))
        assert told is not None
        assert (told["code"], done) == (error, False)
        assert 0 < len(text) < len(CONTENT)
        assert (len(one.calls), two.calls) == (1, [])


# -- the choice ----------------------------------------------------------------------------------


def test_ordered_asks_the_first(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("good")) as weir:
        for _ in range(5):
            ask(weir)
        assert (len(one.calls), len(two.calls)) == (5, 0)


def test_weighted_asks_each_by_its_weight(one: FakeUpstream, two: FakeUpstream) -> None:
    model = places("good", strategy="weighted")
    model["upstreams"][0]["weight"] = 100
    with weir_with(one, two, model) as weir:
        for _ in range(60):
            ask(weir)
        assert len(one.calls) > 45
        assert len(one.calls) + len(two.calls) == 60


def test_least_busy_asks_the_one_that_has_less_to_do(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("gate", "gate", strategy="least_busy")) as weir:
        callers = [threading.Thread(target=ask, args=(weir,)) for _ in range(6)]
        for number, caller in enumerate(callers, 1):
            caller.start()
            until(lambda n=number: len(one.calls) + len(two.calls) == n, "not asked")  # type: ignore[misc]
        assert (len(one.calls), len(two.calls)) == (3, 3)
        one.release()
        two.release()
        for caller in callers:
            caller.join()
        weir.in_loop(lambda: nothing_runs(weir))


def test_an_upstream_with_as_many_calls_as_it_may_have_is_passed_by(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    with weir_with(one, two, places("gate"), upstream={"max_concurrent": 1}) as weir:
        caller = threading.Thread(target=ask, args=(weir,))
        caller.start()
        one.wait_for_call()
        assert ask(weir).status_code == 200
        assert (len(one.calls), len(two.calls)) == (1, 1)
        one.release()
        caller.join()


@pytest.mark.parametrize("field", ["prompt_cache_key", "user"])
def test_calls_of_one_session_go_to_one_upstream(one: FakeUpstream, two: FakeUpstream, field: str) -> None:
    with weir_with(one, two, places("good", sticky=True, strategy="weighted")) as weir:
        for session in range(12):
            for _ in range(3):
                assert ask(weir, **{field: f"session-{session}"}).status_code == 200

        def sessions(upstream: FakeUpstream) -> Counter[str]:
            return Counter(request.json[field] for request in upstream.requests)

        here, there = sessions(one), sessions(two)
        assert set((here | there).values()) == {3}
        assert not here.keys() & there.keys()
        assert here
        assert there


def test_calls_of_one_conversation_go_to_one_upstream(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("good", sticky=True, strategy="weighted")) as weir:
        for _ in range(4):
            before = len(one.calls), len(two.calls)
            begun = httpx2.post(f"{weir.url}/api/v1/chat", json={"message": "Hello!"}, timeout=20).json()
            for _ in range(4):
                body = {"message": "Again!", "conversation_id": begun["conversation_id"]}
                assert httpx2.post(f"{weir.url}/api/v1/chat", json=body, timeout=20).status_code == 200
            grown = sorted((len(one.calls) - before[0], len(two.calls) - before[1]))
            assert grown in ([0, 5], [1, 4]), "the first turn may have gone before it had a name"


# -- circuits ------------------------------------------------------------------------------------


def test_a_circuit_that_opens_is_left_alone_and_closes_again(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("flaky-5")) as weir:
        tested = condition(weir, "one", "flaky-5").breaker
        tested._first_pause = 0.5
        for _ in range(5):
            assert ask(weir).status_code == 200
        assert tested.state is Circuit.OPEN
        labels = {"upstream": "one", "model": "flaky-5"}
        assert weir.metric("weir_circuit_state", **labels, state="open") == 1
        assert ask(weir).status_code == 200
        assert (len(one.calls), weir.records(6)[-1].attempts) == (5, 1)
        until(lambda: tested.admits, "the pause does not end")
        shown = partial(weir.metric, "weir_circuit_state", **labels)
        until(lambda: shown(state="half_open") == 1 and shown(state="open") == 0, "still shown as open")
        assert tested.state is Circuit.OPEN, "nobody has called"
        assert ask(weir).status_code == 200
        assert (len(one.calls), len(two.calls)) == (6, 6)
        assert weir.metric("weir_circuit_state", **labels, state="open") == 0
        assert weir.metric("weir_circuit_state", **labels, state="closed") == 1


def test_with_all_circuits_open_callers_are_refused_at_once_and_told_when_to_come(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    with weir_with(one, two, places("status-500", "status-500")) as weir:
        for _ in range(5):
            assert ask(weir).status_code == 502
        answer = ask(weir)
        assert (answer.status_code, code(answer)) == (503, "openai_service_error")
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert (len(one.calls), len(two.calls)) == (5, 5)
        assert weir.records(6)[-1].attempts == 0


def test_an_upstream_that_asks_for_time_gets_it(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("status-429-after")) as weir:
        for _ in range(3):
            assert ask(weir).status_code == 200
        assert (len(one.calls), len(two.calls)) == (1, 3)
        assert 5 < condition(weir, "one", "status-429-after").breaker.open_seconds <= 7


def test_when_all_ask_for_a_moment_it_is_waited_for(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("flaky-after-1", "flaky-after-1"), openai_max_retries=1) as weir:
        assert ask(weir).status_code == 200
        (record,) = weir.records()
        assert (record.attempts, record.upstream) == (3, "one")
        assert attempts(weir, "retry", "one") == 1


def test_when_all_ask_for_longer_the_caller_is_told(one: FakeUpstream, two: FakeUpstream) -> None:
    models = places("status-429-after", "status-429-after")
    with weir_with(one, two, models, openai_max_retries=2, openai_timeout=5.0) as weir:
        answer = ask(weir)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert (answer.headers["x-should-retry"], weir.records()[0].attempts) == ("true", 2)


def test_callers_with_no_patience_open_no_circuit(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("hang")) as weir:
        for _ in range(6):
            assert ask(weir, headers={"X-Request-Timeout": "0.05"}).status_code == 504
        assert condition(weir, "one", "hang").breaker.state is Circuit.CLOSED


def test_an_open_circuit_is_closed_early_by_a_health_path_that_is_well(
    one: FakeUpstream, two: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routing.probing.PROBE_SECONDS", 0.05)
    with weir_with(one, two, places("flaky-5"), upstream={"health_path": "/models"}) as weir:
        tested = condition(weir, "one", "flaky-5").breaker
        tested._first_pause = 600.0
        for _ in range(5):
            assert ask(weir).status_code == 200
        until(lambda: tested.state is Circuit.CLOSED, "not closed")
        assert any(r.path == "/v1/models" for r in one.requests)
        assert ask(weir).status_code == 200
        assert len([r for r in one.requests if r.method == "POST"]) == 6


def test_a_health_path_that_is_not_well_closes_nothing_nor_does_one_of_an_upstream_that_asks_for_time(
    one: FakeUpstream, two: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routing.probing.PROBE_SECONDS", 0.05)
    bad = {"health_path": "/nothing"}
    with weir_with(one, two, places("status-500"), upstream=bad) as weir:
        for _ in range(5):
            ask(weir)
        until(lambda: len([r for r in one.requests if r.method == "GET"]) >= 3, "not asked")
        assert condition(weir, "one", "status-500").breaker.state is Circuit.OPEN
    one.clear()
    with weir_with(one, two, places("status-429-after"), upstream={"health_path": "/models"}) as weir:
        ask(weir)
        time.sleep(0.2)
        assert condition(weir, "one", "status-429-after").breaker.state is Circuit.OPEN
        assert [r.method for r in one.requests] == ["POST"]


def test_a_circuit_that_one_pod_opens_is_open_in_all_and_closed_in_all(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    with (
        Single() as redis,
        weir_with(one, two, places("flaky-5"), redis_url=redis.url) as here,
        weir_with(one, two, places("flaky-5"), redis_url=redis.url) as there,
    ):
        mine, theirs = (condition(weir, "one", "flaky-5").breaker for weir in (here, there))
        mine._first_pause = 60.0
        for _ in range(5):
            assert ask(here).status_code == 200
        until(lambda: theirs.state is Circuit.OPEN, "not told")
        assert theirs.cause is Cause.FLEET
        assert ask(there).status_code == 200
        assert len(one.calls) == 5, "left alone by both"
        here.in_loop(mine.close)
        until(lambda: theirs.state is Circuit.CLOSED, "not told")
        assert ask(there).status_code == 200
        assert len(one.calls) == 6


# -- models that stand in ------------------------------------------------------------------------

PRICES: tuple[dict[str, Any], ...] = (
    {"price": {"input": 1.0, "output": 1.0}},
    {"price": {"input": 1000.0, "output": 500.0}},
)
STAND_IN_USD = (PROMPT_TOKENS * 1000 + COMPLETION_TOKENS * 500) / 1_000_000


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("too-long", "context_length"),
        ("too-long-200", "context_length"),
        ("error-200-429", "rate_limit"),
        ("status-402", "unavailable"),
        ("filtered", "content_filter"),
        ("status-429-after", "rate_limit"),
        ("status-500", "unavailable"),
        ("status-408", "unavailable"),
        ("status-409", "unavailable"),
        ("flaky-reset-1000", "unavailable"),
        ("hang", "unavailable"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cache_ttl", [0.0, 300.0])
def test_another_model_answers_by_what_went_wrong(
    one: FakeUpstream, two: FakeUpstream, fault: str, kind: str, stream: bool, cache_ttl: float
) -> None:
    models = (
        {
            **({"name": "m", "upstream": "one", "upstream_model": fault} | PRICES[0]),
            "fallbacks": {kind: ["broken", "big"]},
        },
        {"name": "broken", "upstream": "one", "upstream_model": "status-500"},
        {"name": "big", "upstream": "two", "upstream_model": "gpt-4o"} | PRICES[1],
    )
    timeout = {"first_byte_timeout": 0.3}
    with weir_with(one, two, *models, upstream=timeout, cache_ttl=cache_ttl) as weir:
        answer = ask(weir, stream=stream, temperature=0)
        assert answer.status_code == 200
        assert (streamed(answer)[0] if stream else content(answer)) == CONTENT
        assert answer.headers["x-weir-model"] == "big"
        (record,) = weir.records()
        assert (record.request_model, record.answered_by, record.upstream) == ("m", "big", "two")
        assert (record.outcome, record.attempts) == (Outcome.SUCCESS, 3)
        assert record.cost.usd == pytest.approx(STAND_IN_USD)
        assert attempts(weir, "fallback", "two") == 1
        again = ask(weir, stream=stream, temperature=0)
        assert again.headers["x-weir-model"] == "big"
        assert again.headers.get("x-weir-cache") != "hit", "what another model said is not kept as this one's"
        weir.in_loop(lambda: nothing_runs(weir))
        if cache_ttl:
            assert weir.in_loop(lambda: len(weir.parts.service.cache.flights)) == 0  # type: ignore[union-attr]


def test_no_other_model_answers_for_what_it_is_not_named_for(one: FakeUpstream, two: FakeUpstream) -> None:
    models = (
        {**places("too-long"), "fallbacks": {"unavailable": ["big"], "content_filter": ["big"]}},
        {"name": "big", "upstream": "two"},
    )
    with weir_with(one, two, *models) as weir:
        answer = ask(weir)
        assert (answer.status_code, code(answer)) == (400, "context_length_exceeded")
        assert "x-weir-model" not in answer.headers


def test_when_nobody_can_stand_in_the_first_error_is_told(one: FakeUpstream, two: FakeUpstream) -> None:
    models = (
        {
            "name": "m",
            "upstream": "one",
            "upstream_model": "too-long",
            "fallbacks": {"context_length": ["n"]},
        },
        {"name": "n", "upstream": "two", "upstream_model": "status-500"},
    )
    with weir_with(one, two, *models) as weir:
        answer = ask(weir)
        assert (answer.status_code, code(answer)) == (400, "context_length_exceeded")
        (record,) = weir.records()
        assert (record.answered_by, record.attempts) == (None, 2)


def test_the_price_of_the_place_that_answered_is_taken(one: FakeUpstream, two: FakeUpstream) -> None:
    model = places("status-500") | PRICES[0]
    model["upstreams"][1] |= PRICES[1]
    with weir_with(one, two, model) as weir:
        ask(weir)
        assert weir.records()[0].cost.usd == pytest.approx(STAND_IN_USD)


# -- keys ----------------------------------------------------------------------------------------


def key_files(folder: Path, *keys: str) -> dict[str, Any]:
    sources = []
    for number, key in enumerate(keys):
        file = folder / f"key-{number}"
        file.write_text(key)
        sources.append({"file": str(file)})
    return {"api_keys": sources}


@pytest.mark.parametrize(
    ("model", "bad", "stream"),
    [
        ("by-key", "sk-a-429", False),
        ("by-key", "sk-a-401", False),
        ("by-key-200", "sk-a-429", True),
        ("by-key-200", "sk-a-401", False),
    ],
)
def test_a_key_that_is_limited_or_refused_rests_and_another_is_used_at_once(
    one: FakeUpstream, two: FakeUpstream, tmp_path: Path, model: str, bad: str, stream: bool
) -> None:
    pool = key_files(tmp_path, bad, "sk-b", "sk-c")
    with weir_with(one, two, places(model), upstream=pool) as weir:
        for _ in range(6):
            answer = ask(weir, stream=stream)
            assert answer.status_code == 200
        used = Counter(request.headers["authorization"] for request in one.requests)
        assert used[f"Bearer {bad}"] == 1
        assert used["Bearer sk-b"] + used["Bearer sk-c"] == 6
        assert two.calls == []
        assert [record.attempts for record in weir.records(6)] == [2, 1, 1, 1, 1, 1]
        assert attempts(weir, "retry", "one") == 1
        assert condition(weir, "one", model).breaker.state is Circuit.CLOSED


def test_when_all_keys_rest_the_next_upstream_is_asked(
    one: FakeUpstream, two: FakeUpstream, tmp_path: Path
) -> None:
    pool = key_files(tmp_path, "sk-a-429", "sk-b-429")
    with weir_with(one, two, places("by-key"), upstream=pool) as weir:
        assert ask(weir).status_code == 200
        assert (len(one.calls), len(two.calls)) == (2, 1)
        assert ask(weir).status_code == 200
        assert (len(one.calls), len(two.calls)) == (2, 2), "it asked for time"


def test_a_key_may_use_its_models_alone(one: FakeUpstream, two: FakeUpstream) -> None:
    def key(name: str, *models: str) -> KeyConfig:
        return KeyConfig(name=name, sha256=hash_key(f"secret-{name}"), models=models)

    models = (
        {"name": "m", "upstream": "one", "upstream_model": "status-500", "fallbacks": {"unavailable": ["n"]}},
        {"name": "n", "upstream": "two"},
        {"name": "gpt-4o", "upstream": "two"},
    )
    keys = (key("all"), key("some", "gpt-*"), key("narrow", "m"))
    with weir_with(one, two, *models, keys=keys) as weir:

        def bearer(name: str) -> dict[str, str]:
            return {"Authorization": f"Bearer secret-{name}"}

        def listed(name: str) -> list[str]:
            answer = httpx2.get(f"{weir.url}/v1/models", headers=bearer(name))
            return [m["id"] for m in answer.json()["data"]]

        assert listed("all") == ["m", "n", "gpt-4o"]
        assert listed("some") == ["gpt-4o"]
        assert ask(weir, "gpt-4o", headers=bearer("some")).status_code == 200
        refused = ask(weir, "n", headers=bearer("some"))
        assert (refused.status_code, code(refused)) == (404, "model_not_found")
        assert httpx2.get(f"{weir.url}/v1/models/n", headers=bearer("some")).status_code == 404
        assert ask(weir, headers=bearer("all")).headers["x-weir-model"] == "n"
        calls = len(two.calls)
        assert ask(weir, headers=bearer("narrow")).status_code == 502, "no stand-in that it may not use"
        assert len(two.calls) == calls


# -- time ----------------------------------------------------------------------------------------


def timed_out(weir: RunningWeir, answer: httpx2.Response) -> RequestRecord:
    assert (answer.status_code, code(answer)) == (504, "request_deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    record = weir.records()[-1]
    assert (record.outcome, record.error_code) == (Outcome.TIMEOUT, "request_deadline_exceeded")
    return record


@pytest.mark.parametrize("stream", [False, True])
def test_the_callers_own_deadline_ends_a_request_and_is_named(
    one: FakeUpstream, two: FakeUpstream, stream: bool
) -> None:
    model = places("hang", fallbacks={"unavailable": ["n"]})
    with weir_with(one, two, model, {"name": "n", "upstream": "two"}, openai_max_retries=2) as weir:
        record = timed_out(weir, ask(weir, stream=stream, headers={"X-Request-Timeout": "0.2"}))
        assert one.calls[0].cancelled.wait(10)
        assert (record.attempts, two.calls) == (1, [])
        assert record.usage is not None, "the upstream counts the question"
        weir.in_loop(lambda: nothing_runs(weir))


def test_the_operators_deadline_for_requests_is_named_the_same(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("hang"), request_timeout=0.2) as weir:
        timed_out(weir, ask(weir, headers={"X-Request-Timeout": "15"}))


@pytest.mark.parametrize(("stream", "by"), [(False, "operator"), (True, "operator"), (False, "caller")])
def test_an_upstream_that_hangs_longer_than_the_operators_let_it_is_left_alone(
    one: FakeUpstream, two: FakeUpstream, stream: bool, by: str
) -> None:
    own = by == "caller"
    with weir_with(one, two, places("hang"), request_timeout=15 if own else 0.1) as weir:
        for _ in range(5):
            timed_out(weir, ask(weir, stream=stream, headers={"X-Request-Timeout": "0.1"} if own else None))
        state = condition(weir, "one", "hang").breaker.state
        assert state is (Circuit.CLOSED if own else Circuit.OPEN)
        if not own:
            assert content(ask(weir)) == CONTENT
            assert weir.records()[-1].upstream == "two"


def test_the_upstreams_time_has_its_own_code(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("hang", "hang"), openai_timeout=0.2) as weir:
        answer = ask(weir, headers={"X-Request-Timeout": "15"})
        assert (answer.status_code, code(answer)) == (504, "api_timeout")


@pytest.mark.parametrize("fault", ["stall", "ticks-1000-10"])
def test_a_stream_past_its_deadline_ends_with_an_error(
    one: FakeUpstream, two: FakeUpstream, fault: str
) -> None:
    with weir_with(one, two, places(fault)) as weir:
        text, error, done = streamed(ask(weir, stream=True, headers={"X-Request-Timeout": "0.4"}))
        assert error is not None
        assert (error["code"], done) == ("request_deadline_exceeded", False)
        assert text
        assert one.calls[0].cancelled.wait(10)
        assert weir.records()[0].outcome is Outcome.TIMEOUT
        assert condition(weir, "one", fault).breaker.state is Circuit.CLOSED


def test_streams_that_end_for_their_own_deadlines_open_no_circuit(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    with weir_with(one, two, places("stall")) as weir:
        for _ in range(6):
            _, error, _ = streamed(ask(weir, stream=True, headers={"X-Request-Timeout": "0.15"}))
            assert error is not None
        assert condition(weir, "one", "stall").breaker.state is Circuit.CLOSED
        assert two.calls == []


def test_streams_that_stall_open_the_circuit(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("stall"), upstream={"idle_timeout": 0.1}) as weir:
        for _ in range(5):
            _, error, _ = streamed(ask(weir, stream=True))
            assert error is not None
            assert error["code"] == "api_timeout"
        assert condition(weir, "one", "stall").breaker.state is Circuit.OPEN


def test_a_stream_that_nobody_reads_ends_at_its_deadline_too(one: FakeUpstream, two: FakeUpstream) -> None:
    body = json.dumps({"model": "m", "messages": HELLO, "stream": True}).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nX-Request-Timeout: 0.5\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    with weir_with(one, two, places("endless")) as weir:
        with socket.socket() as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect(("127.0.0.1", weir.port))
            caller.sendall(head % len(body) + body)
            assert one.wait_for_call().cancelled.wait(10)
            caller.settimeout(10)
            seen = b""
            while b"request_deadline_exceeded" not in seen:
                more = caller.recv(65536)
                assert more, "no error at the end of the stream"
                seen = seen[-1000:] + more
        record = weir.records()[0]
        assert (record.outcome, record.error_code) == (Outcome.TIMEOUT, "request_deadline_exceeded")


def test_the_pause_that_an_only_upstream_asks_for_is_the_callers_where_it_is_long(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    only = {"name": "m", "upstream": "one", "upstream_model": "status-429-after"}
    with weir_with(one, two, only, openai_max_retries=2, openai_timeout=3.0) as weir:
        answer = ask(weir)
        assert (answer.status_code, answer.headers["retry-after"], len(one.calls)) == (429, "7", 1)


# -- hedging -------------------------------------------------------------------------------------


def seen(weir: RunningWeir, model: str) -> None:
    """So many quick answers that a late one is known as such."""
    for _ in range(20):
        weir.in_loop(lambda: condition(weir, "one", model).answered(0.001))


@pytest.mark.parametrize("stream", [False, True])
def test_a_late_call_is_made_elsewhere_too_and_the_quicker_answer_taken(
    one: FakeUpstream, two: FakeUpstream, stream: bool
) -> None:
    with weir_with(one, two, places("hang", hedge=True) | PRICES[0]) as weir:
        seen(weir, "hang")
        answer = ask(weir, stream=stream)
        assert (streamed(answer)[0] if stream else content(answer)) == CONTENT
        assert one.calls[0].cancelled.wait(10), "the other one is given up"
        (record,) = weir.records()
        assert (record.upstream, record.attempts, record.answered_by) == ("two", 2, None)
        assert attempts(weir, "hedge", "two") == 1
        assert attempts(weir, "first", "one", "client_disconnected") == 1
        assert weir.metric("weir_hedges_total", result="won") == 1
        assert weir.metric("weir_wasted_cost_usd_total", reason="hedge") > 0
        weir.in_loop(lambda: nothing_runs(weir))


def wasted(weir: RunningWeir) -> dict[str, float]:
    """US dollars by reason, in prices of a question."""
    question = weir.records()[0].cost.usd
    assert question
    found = {r: weir.metric("weir_wasted_cost_usd_total", reason=r) for r in ("hedge", "timeout")}
    return {reason: round(usd / question, 6) for reason, usd in found.items()}


def test_the_question_of_an_attempt_that_was_too_late_is_told_as_wasted(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    model = places("hang", "hang") | PRICES[0]
    limits: Any = {"openai_timeout": 0.4, "openai_max_retries": 0, "upstream": {"first_byte_timeout": 0.1}}
    with weir_with(one, two, model, **limits) as weir:
        assert code(ask(weir)) == "api_timeout"
        (record,) = weir.records()
        assert (record.attempts, record.upstream) == (2, "two"), "whose question is in the record"
        assert wasted(weir) == {"hedge": 0, "timeout": 1}


def test_of_two_calls_that_are_both_late_one_is_told_as_wasted(one: FakeUpstream, two: FakeUpstream) -> None:
    model = places("hang", "hang", hedge=True) | PRICES[0]
    with weir_with(one, two, model, openai_timeout=0.4, openai_max_retries=0) as weir:
        seen(weir, "hang")
        assert code(ask(weir)) == "api_timeout"
        assert weir.records()[0].attempts == 2
        assert wasted(weir) == {"hedge": 0, "timeout": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_takes_both_calls_along(
    one: FakeUpstream, two: FakeUpstream, stream: bool
) -> None:
    body = json.dumps({"model": "m", "messages": HELLO, "stream": stream}).encode()
    with weir_with(one, two, places("hang", "stall-comments", hedge=True)) as weir:
        seen(weir, "hang")
        with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
            caller.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            two.wait_for_call()
        for upstream in (one, two):
            assert upstream.calls[0].cancelled.wait(10)
        (record,) = weir.records()
        assert (record.outcome, record.attempts) == (Outcome.CLIENT_DISCONNECTED, 2)
        assert weir.metric("weir_hedges_total", result="lost") == 1
        for name, kind in (("one", "first"), ("two", "hedge")):
            assert attempts(weir, kind, name, "client_disconnected") == 1
        weir.in_loop(lambda: nothing_runs(weir))


# -- after a hostile reading ---------------------------------------------------------------------


def test_a_model_stands_in_for_as_long_as_all_upstreams_limit(one: FakeUpstream, two: FakeUpstream) -> None:
    limited = places("status-429-after", "status-429-after", fallbacks={"rate_limit": ["s"]})
    stand_in = {"name": "s", "upstream": "one", "upstream_model": "good"}
    with weir_with(one, two, limited, stand_in) as weir:
        answers = [ask(weir) for _ in range(3)]
        assert [(a.status_code, a.headers.get("x-weir-model")) for a in answers] == [(200, "s")] * 3


def test_who_waits_for_a_place_has_no_more_time_than_it_asked_for(
    one: FakeUpstream, two: FakeUpstream
) -> None:
    with (
        weir_with(one, two, places("gate"), max_concurrent_requests=1, max_queue_seconds=30) as weir,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(ask, weir)
        while not one.calls:
            time.sleep(0.01)
        late = ask(weir, headers={"X-Request-Timeout": "0.2"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "request_deadline_exceeded")
        assert weir.parts.gate.waiting == 0
        one.release()
        assert first.result(20).status_code == 200


@pytest.mark.parametrize("path", ["/api/v1/batch", "/api/v1/chat", "/api/v1/generate"])
def test_a_time_that_is_none_is_the_callers_mistake(one: FakeUpstream, two: FakeUpstream, path: str) -> None:
    with weir_with(one, two, places("good"), openai_model="m") as weir:
        field, value = {
            "/api/v1/batch": ("prompts", ["a", "b"]),
            "/api/v1/chat": ("message", "a"),
            "/api/v1/generate": ("prompt", "a"),
        }[path]
        said = {field: value}
        answer = httpx2.post(weir.url + path, json=said, headers={"X-Request-Timeout": "abc"}, timeout=20)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Timeout")
        labels = {"route": path, "gen_ai_request_model": "", "outcome": "client_error"}
        assert weir.metric("weir_requests_total", **labels) == 1


def test_a_batch_has_one_end_for_all_of_its_prompts(one: FakeUpstream, two: FakeUpstream) -> None:
    with weir_with(one, two, places("slow-head-800"), openai_model="m", batch_concurrency=1) as weir:
        answer = httpx2.post(
            f"{weir.url}/api/v1/batch",
            json={"prompts": ["a"] * 4},
            headers={"X-Request-Timeout": "1.2"},
            timeout=20,
        )
        assert answer.json()["succeeded"] <= 1
        codes = {r["error"]["code"] for r in answer.json()["results"] if r["error"]}
        assert codes == {"request_deadline_exceeded"}


def test_a_silent_upstream_lists_no_models_and_hides_no_others(one: FakeUpstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        patterns = [{"name": "d*", "upstream": "two"}, {"name": "good*", "upstream": "one"}]
        with weir_with(one, nobody, {"name": "m", "upstream": "one"}, *patterns) as weir:
            listed = httpx2.get(f"{weir.url}/v1/models", timeout=20)
            assert listed.status_code == 200
            assert "m" in [model["id"] for model in listed.json()["data"]]


def test_a_list_of_models_has_no_more_time_than_its_caller_gives_it(one: FakeUpstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with weir_with(nobody, one) as weir:
            url, limit = f"{weir.url}/v1/models", {"X-Request-Timeout": "0.2"}
            late = httpx2.get(url, headers=limit, timeout=20)
            assert (late.status_code, code(late)) == (504, "request_deadline_exceeded")
            assert late.headers["x-should-retry"] == "false"
            bad = httpx2.get(url, headers={"X-Request-Timeout": "soon"}, timeout=20)
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "X-Request-Timeout")
