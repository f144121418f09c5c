"""What surrounds every request: ids, headers, limits, errors, the canonical line, keys."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import structlog

from service.auth import hash_key
from service.config import FileConfig, KeyConfig
from service.domain import Outcome
from tests.fakes.upstream import CONTENT, FakeUpstream
from tests.running import RunningWeir, configuration

HELLO: Any = [{"role": "user", "content": "a secret question"}]
KEY, OTHER_KEY = "weir-key-of-the-shop", "weir-key-of-the-bank"
KEYS = (
    KeyConfig(name="checkout", tenant="shop", sha256=hash_key(KEY)),
    KeyConfig(name="teller", tenant="bank", sha256=hash_key(OTHER_KEY)),
)


@pytest.fixture
def guarded(upstream: FakeUpstream) -> Iterator[RunningWeir]:
    """Weir with two keys."""
    config = configuration(
        keys=KEYS, openai_base_url=upstream.base_url, openai_api_key="sk-upstream", openai_max_retries=0
    )
    with RunningWeir(config) as running:
        yield running


def post(
    weir: RunningWeir, body: Any = None, path: str = "/v1/chat/completions", **more: Any
) -> httpx2.Response:
    body = {"model": "gpt-4o-mini", "messages": HELLO} if body is None else body
    return httpx2.post(weir.url + path, json=body, timeout=20, **more)


# -- ids and headers -----------------------------------------------------------------------------


def test_a_request_id_is_made_where_none_is_sent(weir: RunningWeir) -> None:
    ids = {post(weir).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_a_request_id_is_taken(weir: RunningWeir) -> None:
    response = post(weir, headers={"X-Request-ID": "order-17"})
    assert response.headers["x-request-id"] == "order-17"
    assert weir.records()[0].request_id == "order-17"


@pytest.mark.parametrize("bad", ["x" * 129, "a b", "<script>", "", "a\tb"])
def test_a_request_id_that_could_do_harm_is_not_taken(weir: RunningWeir, bad: str) -> None:
    assert post(weir, headers={"X-Request-ID": bad}).headers["x-request-id"] != bad


def test_two_requests_with_one_id_are_two_records(weir: RunningWeir) -> None:
    for _ in range(2):
        post(weir, headers={"X-Request-ID": "again"})
    assert len({r.id for r in weir.records(2)}) == 2


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nowhere", "/docs"])
def test_every_answer_has_the_common_headers(weir: RunningWeir, path: str) -> None:
    headers = httpx2.get(weir.url + path).headers
    assert float(headers["x-process-time"]) > 0
    assert headers["x-request-id"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "server" not in headers


def test_answers_with_content_are_stored_by_nobody(weir: RunningWeir) -> None:
    assert post(weir).headers["cache-control"] == "no-store"
    assert httpx2.get(f"{weir.url}/api/v1/conversations").headers["cache-control"] == "no-store"


def test_the_upstreams_request_id_comes_back_and_the_trace_goes_through(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = post(weir, headers={"traceparent": parent})
    assert response.headers["x-upstream-request-id"] == "req_fake_1"
    assert response.headers["x-trace-id"] == "0af7651916cd43dd8448eb211c80319c"
    assert upstream.requests[0].headers["traceparent"] == parent


def test_the_callers_own_credentials_never_reach_the_upstream(
    guarded: RunningWeir, upstream: FakeUpstream
) -> None:
    post(guarded, headers={"Authorization": f"Bearer {KEY}", "Cookie": "a=b", "X-Odd": "1"})
    sent = upstream.requests[0].headers
    assert sent["authorization"] == "Bearer sk-upstream"
    assert KEY not in json.dumps(sent)
    assert "cookie" not in sent
    assert "x-odd" not in sent


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/nowhere", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/api/v1/chat", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
    ],
)
def test_what_is_not_served_is_said_in_the_envelope(
    weir: RunningWeir, method: str, path: str, status: int, code: str
) -> None:
    response = httpx2.request(method, weir.url + path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        (b"", None, "not JSON"),
        (b"{", None, "not JSON"),
        (b"[]", None, "object"),
        (b'{"messages": []}', "model", "no model"),
        (b'{"model": 7}', "model", "str"),
        (b'{"model": "m", "stream": "yes"}', "stream", "bool"),
        (b'{"model": "m", "stream_options": 1}', "stream_options", "object"),
    ],
)
def test_a_bad_body_is_400_and_names_the_field(
    weir: RunningWeir, upstream: FakeUpstream, body: bytes, param: str | None, part: str
) -> None:
    response = httpx2.post(f"{weir.url}/v1/chat/completions", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert part in error["message"]
    assert upstream.requests == []
    assert weir.records()[0].outcome is Outcome.CLIENT_ERROR


def test_a_model_that_is_not_configured_is_404(upstream: FakeUpstream) -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": "fake", "base_url": upstream.base_url}],
            "models": [{"name": "big", "upstream": "fake", "upstream_model": "gpt-4o", "aliases": ["smart"]}],
        }
    )
    with RunningWeir(configuration(file=file)) as weir:
        with pytest.raises(openai.NotFoundError) as caught:
            weir.sdk().chat.completions.create(model="nonesuch", messages=HELLO)
        assert caught.value.code == "model_not_found"
        assert [m.id for m in weir.sdk().models.list()] == ["big", "smart"]
        answer = weir.sdk().chat.completions.create(model="smart", messages=HELLO)
        assert answer.choices[0].message.content == CONTENT
        assert upstream.requests[0].json["model"] == "gpt-4o"
        assert weir.records(2)[1].request_model == "smart"


def test_a_body_that_is_too_large_is_413(upstream: FakeUpstream) -> None:
    with RunningWeir(configuration(openai_base_url=upstream.base_url, max_body_bytes=2048)) as weir:
        with pytest.raises(openai.APIStatusError) as caught:
            weir.sdk().chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 4096}])
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")

        def chunks() -> Iterator[bytes]:
            for _ in range(8):
                yield b"x" * 1024

        chunked = httpx2.post(f"{weir.url}/v1/chat/completions", content=chunks())
        assert chunked.status_code == 413
        native = httpx2.post(f"{weir.url}/api/v1/chat", json={"message": "x" * 4096})
        assert native.status_code == 413
        assert upstream.requests == []


def test_a_body_that_does_not_arrive_in_time_is_408(upstream: FakeUpstream) -> None:
    config = configuration(openai_base_url=upstream.base_url, body_timeout=0.2)
    with RunningWeir(config) as weir, socket.create_connection(("127.0.0.1", weir.port), 20) as caller:
        caller.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: 100\r\n\r\n{")
        answer = caller.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")


def test_the_sdk_tells_weirs_own_408_by_its_status(upstream: FakeUpstream) -> None:
    import threading

    config = configuration(openai_base_url=upstream.base_url, body_timeout=0.2)
    slow = threading.Event()

    def half_a_body() -> Iterator[bytes]:
        yield b"{"
        slow.wait(20)
        yield b"}"

    with RunningWeir(config) as weir:
        weir_answered = threading.Timer(1.0, slow.set)
        weir_answered.start()
        response = httpx2.post(f"{weir.url}/v1/chat/completions", content=half_a_body(), timeout=20)
        assert response.json()["error"]["code"] == "request_timeout"


def test_a_caller_who_leaves_in_the_middle_of_its_body_harms_nobody(weir: RunningWeir) -> None:
    with socket.create_connection(("127.0.0.1", weir.port), 20) as caller:
        caller.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: 100\r\n\r\n{")
    assert post(weir).status_code == 200


def test_weir_tries_again_before_anything_was_sent(upstream: FakeUpstream) -> None:
    with RunningWeir(configuration(openai_base_url=upstream.base_url, openai_max_retries=2)) as weir:
        answer = weir.sdk().chat.completions.create(model="flaky-2", messages=HELLO)
        assert answer.choices[0].message.content == CONTENT
        assert weir.records()[0].attempts == 3
        assert weir.metric(
            "weir_upstream_attempts_total",
            upstream="openai",
            gen_ai_request_model="flaky-2",
            kind="retry",
            outcome="success",
        )


def test_what_weir_tried_again_its_callers_need_not(upstream: FakeUpstream) -> None:
    with RunningWeir(configuration(openai_base_url=upstream.base_url, openai_max_retries=1)) as weir:
        with pytest.raises(openai.InternalServerError) as caught:
            weir.sdk(max_retries=3).chat.completions.create(model="status-500", messages=HELLO)
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert len(upstream.requests) == 2


# -- CORS ----------------------------------------------------------------------------------------


def test_browsers_are_let_in_only_where_it_is_set(weir: RunningWeir, upstream: FakeUpstream) -> None:
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    closed = httpx2.options(f"{weir.url}/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in closed.headers
    config = configuration(openai_base_url=upstream.base_url, cors_origins="https://app.example", keys=KEYS)
    with RunningWeir(config) as open_to_browsers:
        url = f"{open_to_browsers.url}/v1/chat/completions"
        allowed = httpx2.options(url, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        refused = httpx2.post(url, headers={"Origin": "https://app.example"}, json={})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example", "errors are readable"
        readable = refused.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-should-retry", "retry-after", "x-request-id", "x-upstream-request-id"} <= {*readable}
        foreign = httpx2.options(url, headers={**preflight, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers


# -- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["wrong", KEY + "x", KEY[:-1]])
def test_a_wrong_key_is_401_for_the_sdk(guarded: RunningWeir, upstream: FakeUpstream, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.sdk(api_key=key).chat.completions.create(model="m", messages=HELLO)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert upstream.requests == []


@pytest.mark.parametrize("header", [None, "", "Basic abc", KEY, f"Token {KEY}"])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/api/v1/chat", "/v1/models", "/api/v1/conversations"]
)
def test_without_a_key_nothing_is_served(guarded: RunningWeir, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    method = "POST" if "chat" in path else "GET"
    assert httpx2.request(method, guarded.url + path, headers=headers).status_code == 401


def test_no_body_is_read_before_the_key_is_known(guarded: RunningWeir) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), 20) as caller:
        caller.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: 9999\r\n\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 401")


def test_pages_for_people_need_no_key(guarded: RunningWeir) -> None:
    for path in ("/", "/health", "/docs", "/redoc", "/openapi.json"):
        assert httpx2.get(guarded.url + path).status_code == 200


def test_name_and_tenant_of_the_key_are_in_record_metric_and_log(guarded: RunningWeir) -> None:
    with structlog.testing.capture_logs() as lines:
        guarded.sdk(api_key=KEY).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        record = guarded.records()[0]
        guarded.in_loop(lambda: None)
    assert (record.principal.name, record.principal.tenant) == ("checkout", "shop")
    line = next(entry for entry in lines if entry["event"] == "request")
    assert (line["key"], line["tenant"]) == ("checkout", "shop")
    assert guarded.metric("weir_key_requests_total", tenant="shop", key="checkout") == 1


def test_conversations_are_seen_by_their_owner_alone(guarded: RunningWeir) -> None:
    def call(method: str, path: str, key: str, **more: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.request(method, f"{guarded.url}/api/v1{path}", headers=headers, timeout=20, **more)

    mine = call("POST", "/chat", KEY, json={"message": "Hello!"}).json()["conversation_id"]
    assert call("GET", f"/conversations/{mine}", KEY).status_code == 200
    assert call("GET", f"/conversations/{mine}", OTHER_KEY).status_code == 404
    assert call("DELETE", f"/conversations/{mine}", OTHER_KEY).status_code == 404
    assert call("GET", "/conversations", OTHER_KEY).json() == {"conversations": []}
    other = call("POST", "/chat", OTHER_KEY, json={"message": "Hello!", "conversation_id": mine})
    assert other.status_code == 404


def test_a_changed_file_of_keys_is_read_again(upstream: FakeUpstream, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    entry = "keys:\n  - {{name: a, tenant: t, sha256: {}}}\n".format
    file.write_text(entry(hash_key("first")))
    from service.config import load
    from tests.running import settings

    config = load(settings(weir_keys_file=file, openai_base_url=upstream.base_url, drain_timeout=1))
    with RunningWeir(config) as weir:
        assert len(list(weir.sdk(api_key="first").models.list())) > 0
        file.write_text(entry(hash_key("second")))
        for _ in range(200):  # the file is looked at once a second
            response = httpx2.get(f"{weir.url}/v1/models", headers={"Authorization": "Bearer second"})
            if response.status_code == 200:
                break
        else:
            while response.status_code != 200:
                response = httpx2.get(f"{weir.url}/v1/models", headers={"Authorization": "Bearer second"})
        with pytest.raises(openai.AuthenticationError):
            weir.sdk(api_key="first").models.list()


# -- limits --------------------------------------------------------------------------------------


def test_the_rate_limit_is_each_principals_own(upstream: FakeUpstream) -> None:
    config = configuration(
        keys=KEYS, openai_base_url=upstream.base_url, rate_limit_requests=2, rate_limit_window=3600
    )
    with RunningWeir(config) as weir:
        mine, other = weir.sdk(api_key=KEY), weir.sdk(api_key=OTHER_KEY)
        for _ in range(2):
            mine.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as caught:
            mine.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 1800
        other.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        assert len(upstream.requests) == 3
        assert httpx2.get(f"{weir.url}/health").status_code == 200
        assert weir.records(4)[2].outcome is Outcome.RATE_LIMITED


# -- the canonical line --------------------------------------------------------------------------


def test_one_canonical_line_a_request(weir: RunningWeir) -> None:
    with structlog.testing.capture_logs() as lines:
        response = post(weir)
        (record,) = weir.records()
        httpx2.get(f"{weir.url}/nowhere")
        weir.in_loop(lambda: None)
    first, second = (entry for entry in lines if entry["event"] == "request")
    seconds, theirs, ours = (first.pop(f"{n}_seconds") for n in ("duration", "upstream", "overhead"))
    assert theirs > 0
    assert ours > 0
    assert seconds >= theirs + ours
    assert first == {
        "event": "request",
        "log_level": "info",
        "request_id": response.headers["x-request-id"],
        "id": record.id,
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "outcome": "success",
        "key": "anonymous",
        "tenant": "default",
        "priority": "normal",
        "operation": "chat",
        "model": "gpt-4o-mini",
        "response_model": "gpt-4o-mini",
        "upstream": "openai",
        "provider": "127.0.0.1",
        "stream": False,
        "cache": "bypass",
        "attempts": 1,
        "input_tokens": 12,
        "output_tokens": 6,
        "cached_input_tokens": 4,
        "reasoning_tokens": 2,
        "usage_source": "provider",
        "cost_source": "unpriced",
        "finish_reason": "stop",
        "response_id": response.json()["id"],
        "upstream_request_id": response.headers["x-upstream-request-id"],
    }
    assert (second["route"], second["status"], second["outcome"]) == ("none", 404, "client_error")


@pytest.mark.parametrize("model", ["gpt-4o-mini", "status-400", "status-401", "drop", "html"])
def test_no_prompt_answer_or_key_is_in_any_log(guarded: RunningWeir, model: str) -> None:
    with structlog.testing.capture_logs() as lines:
        for stream in (False, True):
            post(
                guarded,
                {"model": model, "messages": HELLO, "stream": stream},
                headers={"Authorization": f"Bearer {KEY}"},
            )
        guarded.records(2)
        guarded.in_loop(lambda: None)
    told = repr(lines)
    assert told.count("'event': 'request'") == 2
    for secret in ("a secret question", CONTENT, KEY, "sk-upstream", hash_key(KEY)):
        assert secret not in told


# -- pages ---------------------------------------------------------------------------------------


def test_the_root_says_that_it_is_ready(weir: RunningWeir) -> None:
    told = httpx2.get(weir.url).json()
    assert (told["name"], told["status"]) == ("weir", "ready")
    for link in ("docs", "redoc", "openapi", "health"):
        assert httpx2.get(weir.url + told["links"][link]).status_code == 200


def test_health_tells_the_state_of_each_part_and_no_address(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    def state() -> str:
        return str(httpx2.get(f"{weir.url}/health").json()["parts"]["upstream:openai"]["status"])

    assert state() == "unused"
    post(weir)
    assert state() == "ok"
    post(weir, {"model": "status-500", "messages": HELLO})
    assert state() == "failing"
    told = httpx2.get(f"{weir.url}/health")
    assert told.status_code == 200, "a probe of a load balancer must not follow an upstream"
    assert told.json()["status"] == "degraded"
    assert str(upstream.port) not in told.text
    post(weir, {"model": "status-400", "messages": HELLO})
    assert state() == "ok", "an upstream that refuses a bad request works"


def test_pages_load_nothing_from_elsewhere(weir: RunningWeir) -> None:
    for path in ("/docs", "/redoc"):
        page = httpx2.get(weir.url + path).text
        assert "https://" not in page
        for asset in ("swagger-ui-bundle.js", "redoc.standalone.js"):
            if asset in page:
                assert httpx2.get(f"{weir.url}/docs-assets/{asset}").status_code == 200


def test_the_openapi_page_documents_all_routes_with_examples_and_every_error(weir: RunningWeir) -> None:
    page = httpx2.get(f"{weir.url}/openapi.json").json()
    assert set(page["paths"]) == {
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
        *("/v1/models", "/v1/models/{model}", "/api/v1/chat", "/api/v1/chat/stream"),
        *("/api/v1/conversations", "/api/v1/conversations/{conversation_id}"),
        *("/api/v1/generate", "/api/v1/batch", "/api/v1/usage", "/", "/health"),
        *(f"/api/v1/tenants/{{tenant}}/conversations{rest}" for rest in ("", "/export")),
    }
    for path, operations in page["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            if path.startswith(("/v1/", "/api/")):
                told = set(operation["responses"])
                assert {"400", "401", "404", "422", "429", "500", "503", "504"} <= told
                assert ({"408", "409", "413"} <= told) is ("requestBody" in operation)
                for status, response in operation["responses"].items():
                    if int(status) >= 400:
                        assert response["description"].startswith("- `")
                        assert response["content"]["application/json"]["examples"]
    text = json.dumps(page)
    for reference in set(json.loads(f"[{','.join(_references(page))}]")):
        assert f'"{reference.rpartition("/")[2]}": ' in text
    chat = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert post(weir, chat["example"]).status_code == 200


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield json.dumps(value["$ref"])
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)
