"""Limits and budgets of the whole service: what the official SDK's users are told, in memory and on Redis."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from service.auth import hash_key
from service.config import BudgetConfig, FileConfig, KeyConfig, LimitConfig, ModelConfig, UpstreamConfig
from service.domain import Outcome
from service.errors import BudgetExceeded
from tests.app.test_process import run
from tests.fakes.upstream import COMPLETION_TOKENS, PROMPT_TOKENS, FakeUpstream
from tests.performance.killed import Killing
from tests.redis_servers import Single
from tests.running import RunningWeir, configuration

HELLO: Any = [{"role": "user", "content": "Hello!"}]
HOUR = 3600.0
USED = PROMPT_TOKENS + COMPLETION_TOKENS
CENT_A_TOKEN = {"input": 10_000.0, "output": 10_000.0}
NAMES = ("anna", "bert", "elsa")
KEYS = tuple(
    KeyConfig(name=name, tenant="other" if name == "elsa" else "team", sha256=hash_key(f"weir-{name}"))
    for name in NAMES
)


@pytest.fixture(scope="module")
def single() -> Iterator[Single]:
    with Single() as servers:
        yield servers


@pytest.fixture(params=("memory", "redis"))
def store(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings that choose where it is counted."""
    if request.param == "memory":
        return {}
    single: Single = request.getfixturevalue("single")
    single.flush()
    return {"redis_url": single.url}


def weir_with(
    upstream: FakeUpstream,
    *limits: LimitConfig,
    budgets: tuple[BudgetConfig, ...] = (),
    models: tuple[str, ...] = ("gpt-4o-mini", "gate-stream"),
    **values: Any,
) -> RunningWeir:
    file = FileConfig.model_validate(
        {
            "upstreams": (UpstreamConfig(name="fake", base_url=upstream.base_url),),
            "models": tuple(
                ModelConfig.model_validate({"name": name, "upstream": "fake", "price": CENT_A_TOKEN})
                for name in models
            ),
            "limits": limits,
            "budgets": budgets,
        }
    )
    values = {"openai_max_retries": 0, "openai_timeout": 20.0, "redis_timeout": 2.0} | values
    return RunningWeir(configuration(file=file, keys=KEYS, **values))


def limit(**values: Any) -> LimitConfig:
    return LimitConfig.model_validate({"name": "a", "window": HOUR} | values)


def budget(**values: Any) -> BudgetConfig:
    return BudgetConfig.model_validate({"name": "b"} | values)


def ask(weir: RunningWeir, who: str = "anna", **more: Any) -> Any:
    """The raw answer, whose `.headers` are there and whose `.parse()` is the completion."""
    given: dict[str, Any] = {"model": "gpt-4o-mini", "messages": HELLO, "max_tokens": 10} | more
    return weir.sdk(api_key=f"weir-{who}").chat.completions.with_raw_response.create(**given)


def fill(weir: RunningWeir, who: str = "anna", **more: Any) -> int:
    """How many were let through until one was not."""
    for count in range(50):
        try:
            ask(weir, who, **more)
        except openai.RateLimitError:
            return count
    raise AssertionError("nobody was refused")


# -- requests and tokens -------------------------------------------------------------------------


def test_answers_streams_and_refusals_tell_of_the_limit(
    upstream: FakeUpstream, store: dict[str, Any]
) -> None:
    with weir_with(upstream, limit(requests=3, tokens=1_000), **store) as weir:
        first = ask(weir)
        assert first.headers["x-ratelimit-limit-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-reset-requests"].startswith(("20m0", "19m59"))
        assert first.headers["x-ratelimit-limit-tokens"] == "1000"
        reserved = 1_000 - int(first.headers["x-ratelimit-remaining-tokens"])
        assert 10 < reserved < 30, "the text and max_tokens"
        stream = ask(weir, stream=True)
        assert stream.headers["x-ratelimit-remaining-requests"] == "1"
        assert "".join(c.choices[0].delta.content or "" for c in stream.parse() if c.choices)
        remaining = 1_000 - USED - reserved
        assert int(stream.headers["x-ratelimit-remaining-tokens"]) == remaining, "what the first used"
        third = ask(weir)
        assert int(third.headers["x-ratelimit-remaining-tokens"]) == remaining - USED, "and the stream"
        with pytest.raises(openai.RateLimitError) as refused:
            ask(weir)
        headers = refused.value.response.headers
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < int(headers["retry-after"]) <= 1200
        assert headers["x-should-retry"] == "true"
        assert refused.value.code == "rate_limit_exceeded"
        records = weir.records(4)
        assert [r.outcome for r in records] == [Outcome.SUCCESS] * 3 + [Outcome.RATE_LIMITED]
        assert len(upstream.calls) == 3


def test_tokens_that_were_set_aside_and_not_used_are_free_again(
    upstream: FakeUpstream, store: dict[str, Any]
) -> None:
    with weir_with(upstream, limit(tokens=200), **store) as weir:
        for _ in range(4):  # 4 x 136 would not fit, 3 x 18 + 136 do
            ask(weir, max_tokens=130)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(weir, max_tokens=130)
        assert "tokens" in refused.value.message
        assert refused.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
        ask(weir, max_tokens=50)


def test_a_place_is_taken_while_a_stream_is_open(upstream: FakeUpstream, store: dict[str, Any]) -> None:
    with weir_with(upstream, limit(concurrent=1), **store) as weir:
        stream = ask(weir, model="gate-stream", stream=True).parse()
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            ask(weir)
        assert refused.value.response.headers["retry-after"] == "1"
        assert "same time" in refused.value.message
        ask(weir, "bert")
        upstream.release()
        list(stream)
        weir.records(3)
        ask(weir)
        left = ask(weir, model="gate-stream", stream=True).parse()
        next(iter(left))
        left.close()  # a caller who leaves
        weir.records(5)
        ask(weir)


def test_nothing_but_calls_of_models_is_limited(upstream: FakeUpstream, store: dict[str, Any]) -> None:
    with weir_with(upstream, limit(requests=1), budgets=(budget(usd=0.001),), **store) as weir:
        with pytest.raises(openai.APIStatusError):
            ask(weir)
        with httpx2.Client(base_url=weir.url, headers={"authorization": "Bearer weir-anna"}) as http:
            for _ in range(3):
                for path in (
                    "/",
                    "/health",
                    "/docs",
                    "/openapi.json",
                    "/v1/models",
                    "/v1/models/gpt-4o-mini",
                ):
                    answer = http.get(path)
                    assert answer.status_code == 200, path
                    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


# -- whose limit it is ---------------------------------------------------------------------------


def test_rules_count_by_key_tenant_and_model_and_for_all_together(
    upstream: FakeUpstream, store: dict[str, Any]
) -> None:
    other = "gpt-4o"
    rules = (
        limit(name="key", requests=2, models=["gpt-4o-mini"]),
        limit(name="tenant", per=["tenant"], tenants=["team"], requests=3, models=["gpt-4o-mini"]),
        limit(name="model", per=["model"], requests=4, models=["gpt-4o*"]),
    )
    with weir_with(upstream, *rules, models=("gpt-4o-mini", other), **store) as weir:
        assert fill(weir, "anna") == 2
        assert fill(weir, "bert") == 1, "the tenant's third"
        with pytest.raises(openai.RateLimitError, match="`tenant`"):
            ask(weir, "bert")
        assert fill(weir, "elsa") == 1, "the model's fourth"
        with pytest.raises(openai.RateLimitError, match="`model`"):
            ask(weir, "elsa")
        assert fill(weir, "anna", model=other) == 4


def test_the_default_is_each_keys_own_and_gives_way_to_a_rule(
    upstream: FakeUpstream, store: dict[str, Any]
) -> None:
    rules = (limit(requests=1, keys=["b*"]),)
    values = {"rate_limit_requests": 2, "rate_limit_window": HOUR} | store
    with weir_with(upstream, *rules, **values) as weir:
        assert [fill(weir, name) for name in NAMES] == [2, 1, 2]


def test_a_rule_by_address_counts_what_trusted_proxies_say(
    upstream: FakeUpstream, store: dict[str, Any]
) -> None:
    rule = limit(per=["address"], requests=1)
    for trusted, admitted in (("127.0.0.0/8", 2), ("192.0.2.0/24", 1)):
        with weir_with(upstream, rule, trusted_proxies=(trusted,), **store) as weir:
            count = 0
            for name, address in (("anna", "203.0.113.1"), ("bert", "203.0.113.1"), ("elsa", "203.0.113.2")):
                try:
                    ask(weir, name, extra_headers={"X-Forwarded-For": address})
                    count += 1
                except openai.RateLimitError:
                    pass
            assert count == admitted


# -- dollars -------------------------------------------------------------------------------------


def test_a_budget_warns_and_then_refuses(upstream: FakeUpstream, store: dict[str, Any]) -> None:
    labels = {"tenant": "team", "key": "", "budget": "b"}
    with weir_with(upstream, budgets=(budget(usd=1.0, warn_at=0.5),), **store) as weir:
        answers = [ask(weir) for _ in range(5)]  # 18 cents each, and at least 16 expected
        warnings = [answer.headers.get("x-weir-budget-warning") for answer in answers]
        assert warnings[:3] == [None] * 3
        assert warnings[3:] == [
            "b; used=0.540; remaining_usd=0.4600",
            "b; used=0.720; remaining_usd=0.2800",
        ]
        assert weir.metric("weir_budget_used_ratio", **labels) == pytest.approx(0.72)
        with pytest.raises(openai.APIStatusError) as refused:
            ask(weir, "bert")
        assert refused.value.status_code == 402
        assert (refused.value.code, refused.value.type) == ("budget_exceeded", BudgetExceeded.type)
        headers = refused.value.response.headers
        assert headers["x-should-retry"] == "false"
        assert int(headers["retry-after"]) > 0
        assert headers["x-weir-budget-warning"] == "b; used=0.900; remaining_usd=0.1000"
        assert weir.metric("weir_budget_used_ratio", **labels) == pytest.approx(0.9)
        assert weir.metric("weir_budget_remaining_usd", **labels) == pytest.approx(0.1)
        ask(weir, "elsa")
        ask(weir, max_tokens=2)  # what is left is enough for a shorter one
        with pytest.raises(openai.APIStatusError):
            ask(weir, max_tokens=1)
        assert weir.metric("weir_budget_used_ratio", **labels) == pytest.approx(1.08)
        assert weir.metric("weir_budget_remaining_usd", **labels) == 0.0
        outcomes = [record.outcome for record in weir.records(9)]
        assert outcomes.count(Outcome.BUDGET_REJECTED) == 2


def test_calls_that_run_set_a_budget_aside(upstream: FakeUpstream, store: dict[str, Any]) -> None:
    with weir_with(upstream, budgets=(budget(usd=1.0),), **store) as weir:
        running = ask(weir, model="gate-stream", stream=True, max_tokens=90).parse()
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as refused:
            ask(weir)
        assert refused.value.code == "budget_reserved"
        assert refused.value.response.headers["x-should-retry"] == "true"
        assert refused.value.response.headers["retry-after"] == "1"
        upstream.release()
        list(running)
        weir.records(2)
        ask(weir)


def test_a_soft_budget_of_a_key_only_warns(upstream: FakeUpstream, store: dict[str, Any]) -> None:
    soft = budget(usd=0.2, per="key", hard=False, period="day")
    with weir_with(upstream, budgets=(soft,), **store) as weir:
        answers = [ask(weir) for _ in range(3)]
        assert answers[2].headers["x-weir-budget-warning"] == "b; used=1.800; remaining_usd=0.0000"
        labels = {"tenant": "team", "budget": "b"}
        assert weir.metric("weir_budget_used_ratio", key="anna", **labels) == pytest.approx(1.8)
        assert "x-weir-budget-warning" not in ask(weir, "bert").headers


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 10**18},
        {"max_tokens": 10**18, "n": 10**9},
        {"max_completion_tokens": 10**30, "max_tokens": None},
    ],
)
def test_a_caller_may_ask_for_any_number(
    upstream: FakeUpstream, store: dict[str, Any], asked: dict[str, Any]
) -> None:
    """A soft budget lets it through, whatever it might cost; nothing is left of it afterwards."""
    rules = (limit(tokens=100, concurrent=1, name="c"),)
    with weir_with(upstream, *rules, budgets=(budget(usd=1.0, hard=False),), **store) as weir:
        http = httpx2.Client(base_url=weir.url, headers={"authorization": "Bearer weir-anna"}, timeout=20)
        body = {"model": "gpt-4o-mini", "messages": HELLO} | {k: v for k, v in asked.items() if v is not None}
        body |= {"n": 1} if "n" not in asked else {}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code in (200, 400), answer.text
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
        weir.records(1)
        assert weir.metric("weir_budget_used_ratio", tenant="team", key="", budget="b") == 0.0
        assert ask(weir, max_tokens=10).headers["x-ratelimit-limit-tokens"] == "100"
        http.close()


def test_many_at_once_spend_a_budget_and_no_more(upstream: FakeUpstream, store: dict[str, Any]) -> None:
    with weir_with(upstream, budgets=(budget(usd=2.0),), **store) as weir:
        began = threading.Barrier(12)
        statuses: set[int] = set()

        def several(_: int) -> int:
            began.wait()
            count = 0
            for _ in range(8):
                try:
                    ask(weir, max_tokens=6)
                    count += 1
                except openai.APIStatusError as refused:
                    statuses.add(refused.status_code)
            return count

        with ThreadPoolExecutor(12) as pool:
            admitted = sum(pool.map(several, range(12)))
        assert statuses <= {402, 429}
        spent = sum(record.cost.usd or 0.0 for record in weir.records(96))
        assert spent == pytest.approx(admitted * USED / 100)
        error_of_estimate = 0.18 - 0.08
        assert spent <= 2.0 + error_of_estimate


# -- rules that are wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limits: [{name: a, per: [nobody], requests: 1}]", ("limits.0.per.0", "nobody")),
        ("limits: [{name: a}]", ("limit 'a' needs one of requests, tokens, concurrent",)),
        ("limits: [{name: a, requests: 1}, {name: a, tokens: 1}]", ("the limit 'a' is there twice",)),
        ("budgets: [{name: b, usd: 1, period: year}]", ("budgets.0.period",)),
        ("budgets: [{name: b, usd: 1, soft: true}]", ("budgets.0.soft",)),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "weir.yaml"
    file.write_text(text)
    checked = run("check-config", WEIR_CONFIG=str(file))
    assert checked.returncode == 78
    assert "Traceback" not in checked.stderr
    line = checked.stderr.strip().splitlines()
    assert str(file) in line[0]
    for word in words:
        assert word in checked.stderr


# -- processes that are killed -------------------------------------------------------------------


def test_whoever_is_killed_each_answer_has_one_record_and_nothing_is_held() -> None:
    """`python -m tests.performance.killed` does it 50 times."""
    found = Killing(kills=8).run()
    assert found.faults() == []
    assert len(found.whole) >= 8
    assert found.cut, "nothing was cut short"
