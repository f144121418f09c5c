"""The configuration changes while the service runs: what callers see of it, and that nobody is cut off."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
import structlog
import yaml

from service.auth import hash_key
from service.config import load
from service.routing.breaker import Circuit
from tests.fakes.upstream import COMPLETION_TOKENS, CONTENT, PROMPT_TOKENS, FakeUpstream
from tests.mounts import Mount
from tests.redis_servers import Single
from tests.running import RunningWeir, WeirProcess
from tests.running import settings as settings_of

HELLO: Any = [{"role": "user", "content": "Hello!"}]
SECRET = "sk-secret-0123456789"


def place(upstream: FakeUpstream, name: str = "one", **more: Any) -> dict[str, Any]:
    return {"name": name, "base_url": upstream.base_url, **more}


def model(name: str = "m", upstream: str = "one", **more: Any) -> dict[str, Any]:
    return {"name": name, "upstream": upstream, **more}


def key(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hash_key(name), **more}


class Reloading:
    """A Weir on mounted files; `write` returns once it has tried them."""

    def __init__(self, root: Path, *, keys: list[Any] | None = None, more: Any = None, **file: Any) -> None:
        self.config = Mount(root / "config", weir_yaml=yaml.safe_dump(file))
        values: dict[str, Any] = {"weir_config": self.config.path("weir_yaml"), "openai_max_retries": 0}
        if keys is not None:
            self.keys = Mount(root / "keys", keys_yaml=yaml.safe_dump({"keys": keys}))
            values["weir_keys_file"] = self.keys.path("keys_yaml")
        self.weir = RunningWeir(load(settings_of(**{"drain_timeout": 1.0} | values | (more or {}))))
        self._sdks: dict[str, openai.OpenAI] = {}
        self._changed = threading.Condition()
        self._tries: list[bool] = []
        self._tell = self.weir.parts.metrics.config_read
        self.weir.parts.metrics.config_read = self._tried  # type: ignore[method-assign]

    def _tried(self, good: bool) -> None:
        self._tell(good)
        with self._changed:
            self._tries.append(good)
            self._changed.notify_all()

    def after(self, change: Callable[[], None]) -> bool:
        """Whether what `change` wrote was taken."""
        with self._changed:
            before = len(self._tries)
            change()
            assert self._changed.wait_for(lambda: len(self._tries) > before, 20), "nobody looked"
            return self._tries[-1]

    def write(self, **file: Any) -> None:
        assert self.after(lambda: self.config.write(weir_yaml=yaml.safe_dump(file))), "it was refused"

    def write_bad(self, **files: str) -> None:
        assert not self.after(lambda: self.config.write(**files)), "it was taken"

    def ask(self, name: str = "m", api_key: str = "any", **more: Any) -> Any:
        sdk = self._sdks.get(api_key)
        if sdk is None:  # open until the end, for the sake of its streams
            sdk = self._sdks[api_key] = self.weir.sdk(api_key=api_key)
        return sdk.chat.completions.create(model=name, messages=HELLO, **more)

    def close(self) -> None:
        for sdk in self._sdks.values():
            sdk.close()
        self.weir.stop()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Reloading]]:
    made: list[Reloading] = []

    def start(**values: Any) -> Reloading:
        found = Reloading(tmp_path, **values)
        found.weir.__enter__()
        made.append(found)
        return found

    yield start
    for one in made:
        one.close()


@pytest.fixture
def other() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake
        assert fake.errors == []


Make = Callable[..., Reloading]


def test_models_aliases_and_the_default_change(upstream: FakeUpstream, make: Make) -> None:
    one = make(upstreams=[place(upstream)], models=[model("old", aliases=["fast"])])
    one.ask("old")
    one.write(upstreams=[place(upstream)], models=[model("new", aliases=["fast"], upstream_model="there")])
    with pytest.raises(openai.NotFoundError):
        one.ask("old")
    one.ask("new")
    one.ask("fast")
    assert [r.json["model"] for r in upstream.requests] == ["old", "there", "there"]
    with one.weir.sdk() as sdk:
        assert [m.id for m in sdk.models.list()] == ["new", "fast"]
    answer = httpx2.post(f"{one.weir.url}/api/v1/chat", json={"message": "Hello!"}, timeout=20)
    assert (answer.status_code, upstream.requests[-1].json["model"]) == (200, "there")


def test_prices_change(upstream: FakeUpstream, make: Make) -> None:
    one = make(upstreams=[place(upstream)], models=[model(price={"input": 1e6, "output": 0})])
    one.ask()
    one.write(upstreams=[place(upstream)], models=[model(price={"input": 0, "output": 2e6})])
    one.ask()
    costs = [r.cost.usd for r in one.weir.records(2)]
    assert costs == [PROMPT_TOKENS, 2 * COMPLETION_TOKENS]


def test_limits_change_and_what_was_counted_stays(upstream: FakeUpstream, make: Make) -> None:
    parts: dict[str, Any] = {"upstreams": [place(upstream)], "models": [model()]}
    hour = {"name": "few", "window": 3600}
    one = make(**parts, limits=[hour | {"requests": 2}])
    one.ask()  # half of what may be used
    one.write(**parts, limits=[hour | {"requests": 4}])
    one.ask()
    one.ask()
    with pytest.raises(openai.RateLimitError):
        one.ask()
    one.write(**parts)
    one.ask()


def test_what_runs_under_an_old_limit_is_settled_under_the_new(upstream: FakeUpstream, make: Make) -> None:
    parts: dict[str, Any] = {"upstreams": [place(upstream)], "models": [model("gate-stream")]}
    one = make(**parts, limits=[{"name": "one", "concurrent": 1}])
    stream = one.ask("gate-stream", stream=True)
    next(stream)
    one.write(**parts, limits=[{"name": "one", "concurrent": 2}])
    second = one.ask("gate-stream", stream=True)
    next(second)
    with pytest.raises(openai.RateLimitError):
        one.ask("gate-stream")
    upstream.release()
    assert [c.choices[0].finish_reason for s in (stream, second) for c in s if c.choices].count("stop") == 2
    one.weir.records(3)
    one.write(**parts, limits=[{"name": "one", "concurrent": 1}])
    one.ask("gate-stream")


def test_budgets_keep_what_was_spent_and_settle_over_a_change(upstream: FakeUpstream, make: Make) -> None:
    dear = model("gate-stream", price={"input": 0, "output": 1e6}, max_output_tokens=COMPLETION_TOKENS)
    parts: dict[str, Any] = {"upstreams": [place(upstream)], "models": [dear]}
    one = make(**parts, budgets=[{"name": "b", "usd": 10 * COMPLETION_TOKENS}])
    stream = one.ask("gate-stream", stream=True)
    next(stream)
    one.write(**parts, budgets=[{"name": "b", "usd": COMPLETION_TOKENS}])
    upstream.release()
    list(stream)
    one.weir.records(1)
    with pytest.raises(openai.APIStatusError) as refused:  # spent by what ran meanwhile
        one.ask("gate-stream")
    assert refused.value.status_code == 402
    one.write(**parts, budgets=[{"name": "b", "usd": 3 * COMPLETION_TOKENS}])
    one.ask("gate-stream")


def test_keys_of_both_files_change(upstream: FakeUpstream, make: Make) -> None:
    parts: dict[str, Any] = {"upstreams": [place(upstream)], "models": [model(), model("n")]}
    one = make(**parts, keys=[key("anna")])
    one.ask(api_key="anna")
    one.write(**parts, keys=[key("root", models=["n"])])
    one.ask("n", api_key="root")
    with pytest.raises(openai.NotFoundError):
        one.ask("m", api_key="root")
    assert one.after(lambda: one.keys.write(keys_yaml=yaml.safe_dump({"keys": [key("bert")]})))
    with pytest.raises(openai.AuthenticationError):
        one.ask(api_key="anna")
    one.ask(api_key="bert")
    one.ask("n", api_key="root")


def test_the_first_key_closes_the_door(upstream: FakeUpstream, make: Make) -> None:
    parts: dict[str, Any] = {"upstreams": [place(upstream)], "models": [model()]}
    one = make(**parts)
    one.ask()
    one.write(**parts, keys=[key("anna")])
    with pytest.raises(openai.AuthenticationError):
        one.ask()
    one.ask(api_key="anna")


def test_a_key_is_revoked_beside_a_bad_yaml(upstream: FakeUpstream, make: Make) -> None:
    one = make(upstreams=[place(upstream)], models=[model()], keys=[key("anna")])
    one.write_bad(weir_yaml="models: [")
    assert not one.after(lambda: one.keys.write(keys_yaml=yaml.safe_dump({"keys": [key("bert")]})))
    with pytest.raises(openai.AuthenticationError):
        one.ask(api_key="anna")
    one.ask(api_key="bert")


def test_a_model_begins_to_keep_its_answers(upstream: FakeUpstream, make: Make) -> None:
    parts = {"upstreams": [place(upstream)]}
    one = make(**parts, models=[model()], more={"cache_ttl": 0})
    one.ask(temperature=0)
    one.write(**parts, models=[model(cache_ttl=60)])
    one.ask(temperature=0)
    one.ask(temperature=0)
    assert len(upstream.requests) == 2
    one.write(**parts, models=[model()])
    one.ask(temperature=0)
    assert len(upstream.requests) == 3


def test_a_stream_ends_at_the_upstream_that_is_gone(
    upstream: FakeUpstream, other: FakeUpstream, make: Make
) -> None:
    one = make(upstreams=[place(upstream)], models=[model("gate-stream")])
    old = one.weir.parts.serving.now.clients["one"].upstream
    stream = one.ask("gate-stream", stream=True)
    text = next(stream).choices[0].delta.content or ""
    one.write(upstreams=[place(other)], models=[model("gate-stream"), model("n")])
    one.ask("n")
    assert [len(upstream.requests), len(other.requests)] == [1, 1]
    assert old._session is not None, "it was closed while a stream ran"  # type: ignore[attr-defined]
    upstream.release()
    text += "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text == CONTENT
    assert not upstream.calls[0].cancelled.is_set()
    one.weir.records(2)
    one.write(upstreams=[place(other)], models=[model("n")])  # by now it has had a turn of the loop
    assert old._session is None, "nobody closed it"  # type: ignore[attr-defined]


def test_an_upstream_that_stays_keeps_its_connections(
    upstream: FakeUpstream, other: FakeUpstream, make: Make
) -> None:
    one = make(upstreams=[place(upstream), place(other, "two")], models=[model()])
    one.ask()
    client = one.weir.parts.serving.now.clients["one"]
    changed = place(upstream, region="eu", max_concurrent=5, idle_timeout=7, stream_usage=False)
    one.write(upstreams=[changed], models=[model("m"), model("n")])
    assert list(one.weir.parts.health.states) == ["one"]
    assert one.weir.parts.health.states["one"].status == "ok"
    one.ask("n")
    assert one.weir.parts.serving.now.clients["one"] is client
    assert upstream.connections == 1


def test_a_rotated_key_of_an_upstream_is_used(upstream: FakeUpstream, make: Make, tmp_path: Path) -> None:
    secret = Mount(tmp_path / "secret", key_txt="first-key")
    one = make(
        upstreams=[place(upstream, api_key_file=str(secret.path("key_txt")))],
        models=[model(), model("gate-stream")],
    )
    stream = one.ask("gate-stream", stream=True)
    next(stream)
    assert one.after(lambda: secret.write(key_txt="second-key"))
    one.ask()
    upstream.release()
    list(stream)
    sent = [r.headers["authorization"] for r in upstream.requests]
    assert sent == ["Bearer first-key", "Bearer second-key"]


def test_open_circuits_are_kept_but_not_for_another_address(
    upstream: FakeUpstream, other: FakeUpstream, make: Make
) -> None:
    one = make(upstreams=[place(upstream)], models=[model()])
    parts = one.weir.parts

    def breaker() -> Any:
        return parts.serving.now.service.catalogue.resolve("m").places[0].condition.breaker

    one.ask()
    one.weir.in_loop(lambda: breaker().open_for(600))
    one.write(upstreams=[place(upstream)], models=[model(), model("n")])
    with pytest.raises(openai.APIStatusError):
        one.ask()
    one.write(upstreams=[place(other)], models=[model(), model("n")])
    one.ask()
    assert breaker().state is Circuit.CLOSED
    assert one.weir.metric("weir_circuit_state", upstream="one", model="m", state="open") == 0


def test_the_circuit_of_a_model_that_left_the_configuration_is_shown_no_more(
    upstream: FakeUpstream, make: Make
) -> None:
    one = make(upstreams=[place(upstream)], models=[model(), model("n")])
    breaker = one.weir.parts.serving.now.service.catalogue.resolve("n").places[0].condition.breaker

    def state(of: str) -> float | None:
        labels = {"upstream": "one", "model": of, "state": "open"}
        return one.weir.registry.get_sample_value("weir_circuit_state", labels)

    one.weir.in_loop(lambda: breaker.open_for(600))
    assert state("n") == 1
    one.write(upstreams=[place(upstream)], models=[model()])
    assert state("n") is None, "gone, and not closed"


def test_a_request_is_served_by_the_configuration_that_let_it_in(
    upstream: FakeUpstream, other: FakeUpstream, make: Make
) -> None:
    """Its key, its model and its upstream are gone by the time that its body is there."""
    only = {"models": ["m"]}
    one = make(upstreams=[place(upstream)], models=[model()], keys=[key("anna", **only)])
    body = json.dumps({"model": "m", "messages": HELLO}).encode()
    with socket.create_connection(("127.0.0.1", one.weir.port), 20) as caller:
        caller.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: weir\r\nauthorization: Bearer anna\r\n"
            b"content-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body[:10])
        )
        running = one.weir.parts.serving
        while not one.weir.in_loop(lambda: running.now._running):
            pass
        one.write(upstreams=[place(other, "two")], models=[model("n", "two")])
        assert one.after(lambda: one.keys.write(keys_yaml=yaml.safe_dump({"keys": [key("bert")]})))
        caller.sendall(body[10:])
        answer = b"".join(iter(lambda: caller.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [len(upstream.requests), len(other.requests)] == [1, 0]
    with pytest.raises(openai.AuthenticationError):
        one.ask(api_key="anna")
    one.ask("n", api_key="bert")


BAD: dict[str, Any] = {
    "no YAML": "models: [",
    "unknown field": {"models": [model()], "modells": []},
    "twice": {"models": [model(), model()]},
    "no key file": {"upstreams": [{"name": "one", "base_url": "http://h/v1", "api_key_file": "/not/there"}]},
    "a key in it": {"upstreams": [{"name": "one", "base_url": "http://h/v1", "api_key": SECRET}]},
    "gone": None,
}


def test_bad_files_are_refused_counted_and_told(upstream: FakeUpstream, make: Make) -> None:
    good = {"upstreams": [place(upstream)], "models": [model()]}
    one = make(**good)
    weir = one.weir
    started = weir.metric("weir_config_last_reload_success_timestamp_seconds")
    assert started > 1e9
    assert weir.metric("weir_config_stale") == 0
    for number, bad in enumerate(BAD.values(), 1):
        with structlog.testing.capture_logs() as logged:
            if bad is None:
                one.write_bad()
            else:
                one.write_bad(weir_yaml=bad if isinstance(bad, str) else yaml.safe_dump({**good, **bad}))
        assert [e["event"] for e in logged if e["event"].startswith("config")] == ["config_refused"]
        assert SECRET not in str(logged)
        assert weir.metric("weir_config_reloads_total", result="refused") == number
        assert weir.metric("weir_config_stale") == 1
        assert weir.metric("weir_config_last_reload_success_timestamp_seconds") == started
        one.ask()
    one.write(**good, limits=[{"name": "l", "requests": 1}])
    assert weir.metric("weir_config_reloads_total", result="loaded") == 1
    assert weir.metric("weir_config_stale") == 0
    assert weir.metric("weir_config_last_reload_success_timestamp_seconds") > started


def test_a_burst_of_changes_ends_with_the_last_and_fails_no_request(
    upstream: FakeUpstream, other: FakeUpstream, make: Make
) -> None:
    one = make(upstreams=[place(upstream)], models=[model()])
    stop = threading.Event()

    def ask_on() -> int:
        asked = 0
        with one.weir.sdk() as sdk:
            while not stop.is_set():
                stream = sdk.chat.completions.create(model="m", messages=HELLO, stream=True)
                assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == CONTENT
                asked += 1
        return asked

    with ThreadPoolExecutor() as pool:
        askers = [pool.submit(ask_on) for _ in range(4)]
        try:
            for number in range(60):
                fake = (upstream, other)[number % 2]
                file = {"upstreams": [place(fake)], "models": [model(), model(f"n{number}")]}
                one.config.write(weir_yaml="models: [" if number % 7 == 3 else yaml.safe_dump(file))
                if number % 20 == 0:
                    assert isinstance(one.after(lambda: None), bool)
            one.write(upstreams=[place(other)], models=[model(), model("last")])
            one.ask("last")
        finally:
            stop.set()
        assert all(asker.result(30) > 0 for asker in askers)
    one.write(upstreams=[place(other)], models=[model()])
    serving = one.weir.parts.serving
    assert one.weir.in_loop(lambda: (len(serving._open), len(serving._closing))) == (1, 0)
    outcomes = {r.outcome.value for r in one.weir.records()}
    assert outcomes == {"success"}


@pytest.fixture
def redis() -> Iterator[Single]:
    with Single() as server:
        yield server


def test_limits_on_redis_change_and_settle(upstream: FakeUpstream, redis: Single, make: Make) -> None:
    parts: dict[str, Any] = {"upstreams": [place(upstream)], "models": [model("gate-stream"), model()]}
    one = make(**parts, limits=[{"name": "one", "concurrent": 1}], more={"redis_url": redis.url})
    stream = one.ask("gate-stream", stream=True)
    next(stream)
    one.write(**parts, limits=[{"name": "one", "concurrent": 2}])
    second = one.ask("gate-stream", stream=True)
    next(second)
    with pytest.raises(openai.RateLimitError):
        one.ask()
    one.write(**parts, limits=[{"name": "one", "concurrent": 1}])
    upstream.release()
    assert len([*stream, *second]) > 4
    one.weir.records(3)
    one.ask()
    one.weir.records(4)
    leases = one.weir.parts.adapters.fleet.leases  # type: ignore[union-attr]
    assert one.weir.in_loop(lambda: len(leases)) == 0


def test_limits_change_while_redis_is_away(upstream: FakeUpstream, redis: Single, make: Make) -> None:
    parts: dict[str, Any] = {"upstreams": [place(upstream)], "models": [model("gate-stream"), model()]}
    one = make(**parts, limits=[{"name": "one", "concurrent": 1}], more={"redis_url": redis.url})
    redis.stop()
    stream = one.ask("gate-stream", stream=True)
    next(stream)
    with pytest.raises(openai.RateLimitError):
        one.ask()
    one.write(**parts, limits=[{"name": "one", "concurrent": 2}])
    one.ask()
    one.write(**parts, limits=[{"name": "one", "concurrent": 1}])
    with pytest.raises(openai.RateLimitError):
        one.ask()
    upstream.release()
    list(stream)
    one.ask()


def test_each_of_several_processes_reloads_and_a_new_one_begins_with_the_last_good(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    def file(*names: str) -> str:
        return yaml.safe_dump({"upstreams": [place(upstream)], "models": [model(n) for n in names]})

    mount = Mount(tmp_path, weir_yaml=file("a"))
    with WeirProcess(WORKER_COUNT="2", WEIR_CONFIG=str(mount.path("weir_yaml"))) as weir:
        weir.wait_until_ready(2)
        first = httpx2.get(f"{weir.admin_url}/config").json()
        assert first["status"] == "current"
        mount.write(weir_yaml=file("b"))
        weir.wait_for_events("config_loaded", 2)
        for _ in range(10):  # each on a connection of its own, so that both answer
            assert _models(weir) == ["b"]
        mount.write(weir_yaml="models: [")
        weir.wait_for_events("config_refused", 2)
        told = httpx2.get(f"{weir.admin_url}/config").json()
        assert told["version"] != first["version"]
        assert (
            "# TYPE weir_config_stale gauge\nweir_config_stale 1.0"
            in httpx2.get(f"{weir.admin_url}/metrics").text
        )
        assert (
            'weir_config_reloads_total{result="refused"} 2.0' in httpx2.get(f"{weir.admin_url}/metrics").text
        )
        workers = psutil.Process(weir.process.pid).children()
        assert len(workers) == 2
        for worker in workers:
            worker.kill()
        weir.wait_until_ready(4)
        assert _models(weir) == ["b"]
        weir.terminate()
        assert weir.wait() == 0


def _models(weir: WeirProcess) -> list[str]:
    return [m["id"] for m in httpx2.get(f"{weir.url}/v1/models", timeout=20).json()["data"]]


def test_the_admin_port_tells_the_version_and_no_secret(upstream: FakeUpstream, tmp_path: Path) -> None:
    secret = Mount(tmp_path / "secret", key_txt=SECRET)
    good = yaml.safe_dump(
        {"upstreams": [place(upstream, api_key_file=str(secret.path("key_txt")))], "models": [model()]}
    )
    mount = Mount(tmp_path / "config", weir_yaml=good)
    with WeirProcess(WEIR_CONFIG=str(mount.path("weir_yaml"))) as weir:
        weir.wait_until_ready()
        answer = httpx2.get(f"{weir.admin_url}/config")
        assert answer.json() == {
            "status": "current",
            "version": sha256(good.encode()).hexdigest(),
            "loaded_at": answer.json()["loaded_at"],
            "tried_at": answer.json()["tried_at"],
            "last_try": "good",
        }
        mount.write(weir_yaml="models: [")
        weir.wait_for_events("config_refused", 1)
        told = httpx2.get(f"{weir.admin_url}/config").json()
        assert (told["status"], told["last_try"], told["version"]) == (
            "stale",
            "refused",
            sha256(good.encode()).hexdigest(),
        )
        assert httpx2.post(f"{weir.admin_url}/config").status_code == 405
        assert "/config" in httpx2.get(f"{weir.admin_url}/").json()["links"]
        assert SECRET not in "\n".join(weir.lines)
