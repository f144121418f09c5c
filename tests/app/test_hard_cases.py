"""What a careful reader found once; each stays found."""

from __future__ import annotations

import gc
import json
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.api.context import RequestContext
from service.config import load
from service.domain import Outcome
from service.errors import ConfigurationError
from tests.fakes.upstream import CONTENT, FakeUpstream
from tests.running import RunningWeir, WeirProcess, configuration, settings

HELLO: Any = [{"role": "user", "content": "Hello!"}]


def post(weir: RunningWeir, model: str, **more: Any) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, **more}
    return httpx2.post(f"{weir.url}/v1/chat/completions", json=body, timeout=20)


def leave(weir: RunningWeir, upstream: FakeUpstream, call: int, body: bytes) -> None:
    """Ask, and close the connection once the upstream has the question."""
    with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
        caller.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        upstream.wait_for_call(call)


# -- the log -------------------------------------------------------------------------------------


def test_no_key_and_no_prompt_is_in_the_log_after_a_drain_or_a_fault(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import service.stores.memory_accounts as m\n"
        "reserve = m.MemoryAccounts.reserve\n"
        "async def broken(self, record, demand):\n"
        "    if os.environ.get('DEBUG') == 'true': raise ZeroDivisionError('made for the test')\n"
        "    return await reserve(self, record, demand)\n"
        "m.MemoryAccounts.reserve = broken\n"
    )
    from tests.running import ROOT

    for fault in ("true", "false"):
        with WeirProcess(
            OPENAI_BASE_URL=upstream.base_url,
            DRAIN_TIMEOUT="1",
            DEBUG=fault,
            PYTHONPATH=f"{tmp_path}:{ROOT}",
        ) as weir:
            weir.wait_until_ready()
            client = openai.OpenAI(base_url=f"{weir.url}/v1", api_key="weir-secret-key", max_retries=0)
            with pytest.raises(openai.APIError):
                for _ in client.chat.completions.create(
                    model="stall",
                    messages=[{"role": "user", "content": "a secret question"}],
                    stream=True,
                ):
                    weir.terminate()
            weir.terminate()
            assert weir.wait() == 0
            told = "\n".join(weir.lines + weir.error_lines)
            assert '"event":"request"' in told
            assert ("ZeroDivisionError" in told) is (fault == "true")
            assert "secret" not in told


# -- the books -----------------------------------------------------------------------------------


def test_a_deeply_nested_body_is_estimated_and_accounted(weir: RunningWeir) -> None:
    body = b'{"model":"no-usage","messages":[{"role":"user","content":%s"x"%s}]}' % (b"[" * 600, b"]" * 600)
    response = httpx2.post(f"{weir.url}/v1/chat/completions", content=body, timeout=20)
    assert response.status_code == 200
    assert weir.records()[0].outcome is Outcome.SUCCESS


def test_a_failing_price_keeps_no_record_out_of_the_books(weir: RunningWeir) -> None:
    def fail(*_: object) -> None:
        raise OverflowError("a price too far")

    weir.parts.service.prices.cost = fail  # type: ignore[method-assign,assignment]
    assert post(weir, "gpt-4o-mini").status_code == 200
    assert len(weir.records()) == 1
    weir.in_loop(lambda: weir.parts.metrics.beat(0.0))
    assert weir.metric("weir_inflight_requests") == 0


def test_a_call_that_no_model_saw_costs_nothing(upstream: FakeUpstream) -> None:
    config = configuration(openai_base_url=upstream.base_url, openai_max_retries=1)
    with RunningWeir(config) as weir:
        assert post(weir, "status-503").status_code == 503
        assert weir.records()[0].usage is None


def test_a_failed_response_is_no_success(weir: RunningWeir) -> None:
    client = weir.sdk()
    list(client.responses.create(model="failed", input="Hello!", stream=True))
    client.responses.create(model="failed", input="Hello!")
    for record in weir.records(2):
        assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, "response_failed")


def test_each_prompt_of_a_batch_is_a_request_to_a_model_and_has_its_line(weir: RunningWeir) -> None:
    import structlog

    with structlog.testing.capture_logs() as lines:
        body = {"prompts": ["a", "b", "c"], "model": "flaky-1"}
        response = httpx2.post(f"{weir.url}/api/v1/batch", json=body, timeout=20)
        assert response.json()["tokens_used"] == 36
        weir.in_loop(lambda: None)
    records = {record.id: record for record in weir.records(3)}
    told = [entry for entry in lines if entry["event"] == "request"]
    assert {line["id"] for line in told} == set(records)
    assert {line["request_id"] for line in told} == {response.headers["x-request-id"]}
    assert sorted(line["outcome"] for line in told) == ["success", "success", "upstream_error"]
    for line in told:
        record, good = records[line["id"]], line["outcome"] == Outcome.SUCCESS
        assert (line["outcome"], line["route"], line["status"]) == (record.outcome, "/api/v1/batch", 200)
        assert (line["input_tokens"], line["output_tokens"]) == ((12, 6) if good else (0, 0))
        assert line["log_level"] == ("info" if good else "warning")


# -- bounds --------------------------------------------------------------------------------------


def test_a_body_of_which_nothing_comes_is_408(upstream: FakeUpstream) -> None:
    config = configuration(openai_base_url=upstream.base_url, body_timeout=0.2)
    with RunningWeir(config) as weir, socket.create_connection(("127.0.0.1", weir.port), 20) as caller:
        caller.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: 100\r\n\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_head_without_an_end_is_refused(weir: RunningWeir) -> None:
    with socket.create_connection(("127.0.0.1", weir.port), 20) as caller:
        caller.sendall(b"GET / HTTP/1.1\r\nHost: w\r\nX-Long: ")
        answer = b""
        try:
            for _ in range(1000):
                caller.sendall(b"x" * 64 * 1024)
        except (BrokenPipeError, ConnectionResetError):
            answer = b"refused"
        assert answer == b"refused", "64 MB of one header were taken"
    assert post(weir, "gpt-4o-mini").status_code == 200


def test_a_large_body_is_no_long_head(weir: RunningWeir) -> None:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "x" * 3_000_000}]}
    with httpx2.Client(timeout=20) as client:
        for _ in range(3):  # on one connection: the count begins anew with each request
            assert client.post(f"{weir.url}/v1/chat/completions", json=body).status_code == 200


def test_a_long_name_of_a_model_is_kept_short(weir: RunningWeir) -> None:
    assert post(weir, "x" * 100_000).status_code == 404
    assert len(weir.records()[0].request_model) == 200


def test_what_nobody_guards_reads_no_body(weir: RunningWeir) -> None:
    with socket.create_connection(("127.0.0.1", weir.port), 20) as caller:
        caller.sendall(b"POST /nowhere HTTP/1.1\r\nHost: w\r\nContent-Length: 1000000\r\n\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 404")


def test_the_list_of_models_has_a_deadline(upstream: FakeUpstream) -> None:
    with RunningWeir(configuration(openai_base_url=upstream.base_url, openai_timeout=0.3)) as weir:

        async def hang() -> list[Any]:
            import asyncio

            return await asyncio.Event().wait()  # type: ignore[return-value]

        weir.parts.adapters.upstreams["openai"].models = hang  # type: ignore[method-assign]
        response = httpx2.get(f"{weir.url}/v1/models", timeout=20)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "api_timeout")


def test_nothing_of_an_ended_request_is_kept_alive(weir: RunningWeir, upstream: FakeUpstream) -> None:
    """By counts of references alone: a body must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        leave(weir, upstream, 1, b'{"model":"hang","messages":[]}')
        weir.records(1)
        post(weir, "error-event", stream=True)
        post(weir, "drop", stream=True)
        post(weir, "stall", stream=True)
        weir.records(4)
        for _ in range(1000):  # the last task may be on its last steps
            weir.in_loop(lambda: None)
            left = [o for o in gc.get_objects() if isinstance(o, RequestContext)]
            if not left:
                break
            left.clear()
        assert not [o for o in gc.get_objects() if isinstance(o, RequestContext)]
        assert len(weir.parts.service.sweep) == 0
    finally:
        gc.enable()


def test_an_answered_request_is_not_kept_while_its_connection_is(weir: RunningWeir) -> None:
    """A body of many megabytes must not wait for the next request of its caller."""
    with httpx2.Client(timeout=20) as client:
        body = {"model": "gpt-4o-mini", "messages": HELLO}
        assert client.post(f"{weir.url}/v1/chat/completions", json=body).status_code == 200
        assert no_more_of(weir, RequestContext)


def test_a_reset_after_the_answer_leaves_nothing(weir: RunningWeir) -> None:
    body = b'{"model":"gpt-4o-mini","messages":[]}'
    with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
        caller.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        weir.records(1)
        assert caller.recv(100_000).endswith(b"}")
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert no_more_of(weir, RequestResponseCycle)


def no_more_of(weir: RunningWeir, kind: type[object]) -> bool:
    """Whether the last object of this kind goes away."""
    for _ in range(1000):  # the last task may be on its last steps
        weir.in_loop(lambda: None)
        gc.collect()
        if not any(type(o) is kind for o in gc.get_objects()):
            return True
    return False


# -- upstreams with odd manners ------------------------------------------------------------------


def test_a_number_as_error_code_harms_no_batch() -> None:
    from tests.unit.test_rejection import of

    body = of(400, b'{"error":{"message":"No.","code":400,"param":["x"]}}').body()["error"]
    assert (body["code"], body["param"]) == ("400", None)


# -- conversations -------------------------------------------------------------------------------


def test_a_conversation_deleted_during_a_turn_stays_deleted(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    with httpx2.Client(base_url=f"{weir.url}/api/v1", timeout=20) as api:
        conversation = api.post("/chat", json={"message": "Hello!"}).json()["conversation_id"]
        answers: list[httpx2.Response] = []
        body = {"message": "More", "conversation_id": conversation, "model": "gate"}
        turn = threading.Thread(target=lambda: answers.append(api.post("/chat", json=body)))
        turn.start()
        upstream.wait_for_call(2)
        assert httpx2.delete(f"{weir.url}/api/v1/conversations/{conversation}").status_code == 204
        upstream.release()
        turn.join(20)
        assert answers[0].json()["message"] == CONTENT
        assert api.get(f"/conversations/{conversation}").status_code == 404


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "key", "good"),
    [
        ("http://localhost:8000/v1", "abc", True),
        ("https://api.openai.com/v1", "abc", False),
        ("https://api.openai.com/v1", "sk-abcdefgh", True),
    ],
)
def test_the_form_of_a_key_goes_by_the_host_of_its_upstream(
    tmp_path: Path, base_url: str, key: str, good: bool
) -> None:
    file = tmp_path / "weir.yaml"
    upstream = {"name": "a", "base_url": base_url, "api_key_env": "OPENAI_API_KEY"}
    file.write_text(json.dumps({"upstreams": [upstream]}))
    given = settings(weir_config=file, openai_api_key=key)
    if good:
        assert load(given).upstreams[0].name == "a"
    else:
        with pytest.raises(ConfigurationError, match="sk-"):
            load(given)


def test_an_impossible_port_in_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a URL"):
        settings(openai_base_url="http://localhost:99999/v1")
