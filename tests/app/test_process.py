"""`python -m service` as a process: start, probes, drain, workers, and what it says about bad settings."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import redis
import yaml

from service import __version__
from service.auth import hash_key
from tests.fakes.upstream import CONTENT, FakeUpstream
from tests.redis_servers import Single
from tests.running import ROOT, WeirProcess

HELLO: Any = [{"role": "user", "content": "Hello!"}]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with WeirProcess(*arguments, **environment) as weir:
        code = weir.wait()
    return subprocess.CompletedProcess(arguments, code, "\n".join(weir.lines), "\n".join(weir.error_lines))


def sdk(weir: WeirProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{weir.url}/v1", api_key="any", max_retries=0, timeout=30)


# -- a newcomer's start --------------------------------------------------------------------------


def test_it_starts_with_nothing_and_says_what_to_try() -> None:
    with WeirProcess("serve", "--welcome", SIMULATOR_TOKENS_PER_SECOND="10000") as weir:
        weir.wait_for_line("Stop with Ctrl-C")
        told = "\n".join(weir.lines)
        assert f"curl {weir.url}/v1/chat/completions" in told
        assert f"{weir.url}/docs" in told
        assert f"{weir.admin_url}/metrics" in told
        stream = sdk(weir).chat.completions.create(model="simulator", messages=HELLO, stream=True)
        assert "not a model" in "".join(c.choices[0].delta.content or "" for c in stream)
        assert weir.events("simulator"), "the log says that it is a simulator"


def test_the_environment_reaches_a_real_upstream(upstream: FakeUpstream) -> None:
    with WeirProcess(OPENAI_BASE_URL=upstream.base_url, OPENAI_API_KEY="any-key-for-other-hosts") as weir:
        weir.wait_until_ready()
        answer = sdk(weir).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        assert answer.choices[0].message.content == CONTENT
        assert upstream.requests[0].headers["authorization"] == "Bearer any-key-for-other-hosts"


def test_logs_are_one_json_object_a_line_and_hold_no_secret(upstream: FakeUpstream) -> None:
    with WeirProcess(OPENAI_BASE_URL=upstream.base_url, OPENAI_API_KEY="sk-very-secret-key") as weir:
        weir.wait_until_ready()
        sdk(weir).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        weir.wait_for_line('"event":"request"')
        weir.terminate()
        assert weir.wait() == 0
        for line in weir.lines:
            assert {"timestamp", "level", "event"} <= set(json.loads(line))
        assert "sk-very-secret-key" not in "\n".join(weir.lines + weir.error_lines)
        assert "Hello!" not in "\n".join(weir.lines)


# -- bad settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "parts", "absent"),
    [
        ({"PORT": "http"}, ("PORT=http", "integer"), ()),
        ({"WORKER_COUNT": "0"}, ("WORKER_COUNT=0", "greater than or equal to 1"), ()),
        ({"OPENAI_API_KEY": "my-wrong-key"}, ("OPENAI_API_KEY", "sk-"), ("my-wrong-key",)),
        ({"REDIS_URL": "http://u:hush@h"}, ("REDIS_URL", "redis://"), ("hush",)),
        ({"WEIR_CONFIG": "/nowhere.yaml"}, ("/nowhere.yaml", "cannot be read"), ()),
        ({"HOST": "0.0.0.0"}, ("HOST=0.0.0.0", "AUTH=none"), ()),
        ({"LOG_LEVEL": "loud"}, ("LOG_LEVEL=loud", "'debug'"), ()),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_wrong_setting_stops_the_start_with_one_line(
    command: str, environment: dict[str, str], parts: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    ended = run(command, **environment)
    assert ended.returncode == 78
    assert len(ended.stderr.splitlines()) == 1
    for part in parts:
        assert part in ended.stderr
    for part in absent:
        assert part not in ended.stderr + ended.stdout


def test_check_config_says_that_all_is_good() -> None:
    ended = run("check-config")
    assert ended.returncode == 0
    assert "simulator" in ended.stdout


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = run(PORT=str(taken.getsockname()[1]))
    assert ended.returncode == 78
    assert "PORT=" in ended.stderr
    assert "in use" in ended.stderr


def test_auth_none_opens_other_addresses_in_so_many_words() -> None:
    with WeirProcess(HOST="0.0.0.0", AUTH="none") as weir:
        weir.wait_until_ready()
        assert httpx2.get(weir.url).status_code == 200


def test_make_key_prints_a_key_that_opens_the_door(tmp_path: Path) -> None:
    ended = run("make-key", "--name", "checkout", "--tenant", "shop")
    key = next(line for line in ended.stdout.splitlines() if line.startswith("weir-"))
    entry = ended.stdout[ended.stdout.index("keys:") :]
    assert yaml.safe_load(entry)["keys"][0] == {"name": "checkout", "tenant": "shop", "sha256": hash_key(key)}
    file = tmp_path / "keys.yaml"
    file.write_text(entry)
    with WeirProcess(WEIR_KEYS_FILE=str(file), HOST="127.0.0.1") as weir:
        weir.wait_until_ready()
        assert httpx2.get(f"{weir.url}/v1/models").status_code == 401
        good = httpx2.get(f"{weir.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert good.status_code == 200


def test_version() -> None:
    assert run("--version").stdout == __version__


# -- admin port ----------------------------------------------------------------------------------


def test_probes_and_metrics_are_on_the_admin_port_alone() -> None:
    with WeirProcess() as weir:
        weir.wait_until_ready()
        for probe, status in (("startupz", "started"), ("livez", "alive"), ("readyz", "ready")):
            answer = httpx2.get(f"{weir.admin_url}/{probe}")
            assert (answer.status_code, answer.json()["status"]) == (200, status)
            assert httpx2.get(f"{weir.url}/{probe}").status_code == 404
        assert httpx2.get(f"{weir.url}/metrics").status_code == 404
        plain = httpx2.get(f"{weir.admin_url}/metrics")
        assert plain.headers["content-type"].startswith("text/plain")
        assert f'weir_build_info{{version="{__version__}"}} 1.0' in plain.text
        modern = httpx2.get(
            f"{weir.admin_url}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        assert modern.headers["content-type"].startswith("application/openmetrics-text")
        assert modern.text.endswith("# EOF\n")
        assert httpx2.get(f"{weir.admin_url}/other").status_code == 404
        assert httpx2.post(f"{weir.admin_url}/livez").status_code == 405


def test_the_admin_port_answers_while_the_main_loop_is_stuck(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import service.api.system as s, time\n"
        "make = s.make_router\n"
        "def stuck(**parts):\n"
        "    router = make(**parts)\n"
        "    @router.get('/stuck')\n"
        "    async def stuck(): time.sleep(60)\n"
        "    return router\n"
        "s.make_router = stuck\n"
    )
    with WeirProcess(LIVENESS_TIMEOUT="1", PYTHONPATH=f"{tmp_path}:{ROOT}") as weir:
        weir.wait_until_ready()
        threading.Thread(target=_ask, args=(f"{weir.url}/stuck",), daemon=True).start()
        for _ in range(1000):
            answer = httpx2.get(f"{weir.admin_url}/livez", timeout=5)
            if answer.status_code == 503:
                break
        assert answer.json()["status"] == "main loop is stuck"
        assert httpx2.get(f"{weir.admin_url}/readyz", timeout=5).status_code == 503
        assert "weir_build_info" in httpx2.get(f"{weir.admin_url}/metrics", timeout=5).text
        weir.process.kill()


# -- the end -------------------------------------------------------------------------------------


def test_on_sigterm_readiness_turns_false_and_a_running_stream_ends_well(upstream: FakeUpstream) -> None:
    with WeirProcess(OPENAI_BASE_URL=upstream.base_url) as weir:
        weir.wait_until_ready()
        stream = sdk(weir).chat.completions.create(model="gate-stream", messages=HELLO, stream=True)
        text = next(stream).choices[0].delta.content or ""
        weir.terminate()
        while (answer := httpx2.get(f"{weir.admin_url}/readyz")).status_code == 200:
            pass
        assert answer.json()["status"] == "draining"
        assert httpx2.get(f"{weir.admin_url}/livez").status_code == 200
        upstream.release()
        text += "".join(c.choices[0].delta.content or "" for c in stream)
        assert text == CONTENT
        assert weir.wait() == 0
        assert weir.events("request")[0]["outcome"] == "success"


def test_new_connections_are_served_during_the_drain_delay() -> None:
    with WeirProcess(DRAIN_DELAY="30") as weir:
        weir.wait_until_ready()
        weir.terminate()
        while httpx2.get(f"{weir.admin_url}/readyz").status_code == 200:
            pass
        assert httpx2.get(weir.url).status_code == 200
        weir.process.kill()


def test_during_the_drain_delay_each_answer_tells_its_caller_to_leave() -> None:
    """A connection that is kept open would carry a later request into the end of the process."""
    with WeirProcess(DRAIN_DELAY="30") as weir, httpx2.Client() as keeping_open:
        weir.wait_until_ready()
        assert "connection" not in keeping_open.get(weir.url).headers
        weir.terminate()
        while httpx2.get(f"{weir.admin_url}/readyz").status_code == 200:
            pass
        for path in ("/", "/v1/models", "/nothing"):
            assert keeping_open.get(weir.url + path).headers["connection"] == "close"
        weir.process.kill()


def test_what_outlasts_the_drain_gets_an_error_event_and_is_accounted(upstream: FakeUpstream) -> None:
    with WeirProcess(OPENAI_BASE_URL=upstream.base_url, DRAIN_TIMEOUT="1") as weir:
        weir.wait_until_ready()
        stream = sdk(weir).chat.completions.create(model="stall", messages=HELLO, stream=True)
        next(stream)
        weir.terminate()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert weir.wait() == 0
        assert weir.events("request")[0]["error_code"] == "server_shutting_down"


def test_whom_the_end_of_the_drain_cuts_off_is_told_to_come_again_whatever_was_tried(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    places = [{"upstream": "one", "model": "status-500"}, {"upstream": "two", "model": "hang"}]
    upstreams = [{"name": name, "base_url": upstream.base_url} for name in ("one", "two")]
    file = tmp_path / "weir.yaml"
    file.write_text(yaml.safe_dump({"upstreams": upstreams, "models": [{"name": "m", "upstreams": places}]}))
    with WeirProcess(WEIR_CONFIG=str(file), DRAIN_TIMEOUT="1") as weir, ThreadPoolExecutor(1) as pool:
        weir.wait_until_ready()
        asked = pool.submit(_post, weir, {"model": "m", "messages": HELLO})
        upstream.wait_for_call(2)
        weir.terminate()
        answer = asked.result(30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_shutting_down")
        assert answer.headers["x-should-retry"] == "true"
        assert weir.wait() == 0


def test_each_request_of_the_drain_is_in_the_ledger_when_the_process_has_ended(
    upstream: FakeUpstream,
) -> None:
    """Two streams and a whole answer that run at SIGTERM, and one that comes before the listener closes."""
    environment = {"OPENAI_BASE_URL": upstream.base_url, "OPENAI_MAX_RETRIES": "0", "REDIS_TIMEOUT": "2"}
    with (
        Single() as single,
        WeirProcess(REDIS_URL=single.url, DRAIN_DELAY="3", DRAIN_TIMEOUT="1", **environment) as weir,
        ThreadPoolExecutor(2) as pool,
    ):
        weir.wait_until_ready()
        ends_well = sdk(weir).chat.completions.create(model="gate-stream", messages=HELLO, stream=True)
        next(ends_well)
        whole, cut = (
            pool.submit(_post, weir, {"model": model, "messages": HELLO, "stream": stream})
            for model, stream in (("hang", False), ("stall", True))
        )
        upstream.wait_for_call(3)
        weir.terminate()
        while httpx2.get(f"{weir.admin_url}/readyz").status_code == 200:
            pass
        answer = sdk(weir).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        assert answer.choices[0].message.content == CONTENT
        upstream.release()
        assert list(ends_well)[-1].choices[0].finish_reason == "stop"
        # What outlasts the drain is told so: an error, or a whole event as the last of a whole answer.
        assert whole.result().status_code == 503
        assert whole.result().headers["x-should-retry"] == "true"
        assert whole.result().json()["error"]["code"] == "server_shutting_down"
        *begun, last, end = cut.result().text.split("\n\n")
        assert begun
        assert end == ""
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_shutting_down"
        assert weir.wait() == 0
        client: Any = redis.Redis.from_url(single.url)
        entries = client.xrange("weir:{default}:ledger")
        records = [json.loads(fields[b"record"]) for _, fields in entries]
        assert sorted((r["request_model"], r["outcome"], r["error_code"]) for r in records) == [
            ("gate-stream", "success", None),
            ("gpt-4o-mini", "success", None),
            ("hang", "internal_error", "server_shutting_down"),
            ("stall", "stream_truncated", "server_shutting_down"),
        ]
        assert len({record["id"] for record in records}) == len(weir.events("request"))
        assert not client.exists("weir:{default}:open", "weir:{default}:leases")


# -- several workers -----------------------------------------------------------------------------


def test_several_workers_serve_one_port_and_their_metrics_are_summed(upstream: FakeUpstream) -> None:
    with WeirProcess(WORKER_COUNT="2", OPENAI_BASE_URL=upstream.base_url) as weir:
        weir.wait_until_ready(workers=2)
        for _ in range(20):  # a new connection each, so that both workers get some
            answer = sdk(weir).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
            assert answer.choices[0].message.content == CONTENT
        metrics = httpx2.get(f"{weir.admin_url}/metrics").text
        wanted = (
            'weir_requests_total{gen_ai_request_model="gpt-4o-mini",outcome="success",'
            'route="/v1/chat/completions"} 20.0'
        )
        assert wanted in metrics
        until = time.monotonic() + 30
        while "weir_inflight_requests 0.0" not in metrics:  # as of the last heartbeat
            assert time.monotonic() < until, "requests run that have ended"
            metrics = httpx2.get(f"{weir.admin_url}/metrics").text
        for probe in ("startupz", "livez", "readyz"):
            assert httpx2.get(f"{weir.admin_url}/{probe}").status_code == 200
        weir.terminate()
        assert weir.wait() == 0


def test_a_worker_is_replaced_after_its_requests_and_none_is_lost(upstream: FakeUpstream) -> None:
    environment = {"WORKER_COUNT": "2", "MAX_REQUESTS_PER_WORKER": "10"}
    with WeirProcess(OPENAI_BASE_URL=upstream.base_url, **environment) as weir:
        weir.wait_until_ready(workers=2)
        for _ in range(60):
            answer = httpx2.post(
                f"{weir.url}/v1/chat/completions",
                json={"model": "gpt-4o-mini", "messages": HELLO},
                timeout=30,
            )
            assert answer.status_code == 200
        weir.wait_until_ready(workers=3)
        assert httpx2.get(f"{weir.admin_url}/readyz").status_code == 200


def test_workers_too_end_what_outlasts_the_drain_with_a_word(upstream: FakeUpstream) -> None:
    with WeirProcess(WORKER_COUNT="2", DRAIN_TIMEOUT="1", OPENAI_BASE_URL=upstream.base_url) as weir:
        weir.wait_until_ready(workers=2)
        stream = sdk(weir).chat.completions.create(model="stall", messages=HELLO, stream=True)
        next(stream)
        weir.terminate()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert weir.wait() == 0
        assert weir.events("request")[0]["error_code"] == "server_shutting_down"


def _post(weir: WeirProcess, body: dict[str, Any]) -> httpx2.Response:
    return httpx2.post(f"{weir.url}/v1/chat/completions", json=body, timeout=30)


def _ask(url: str) -> None:
    with contextlib.suppress(httpx2.HTTPError):  # the process is ended while it hangs
        httpx2.get(url, timeout=30)


def test_python_m_service_helps() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "service", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command in ("serve", "check-config", "make-key"):
        assert command in told
