"""Weir takes what the chart gives it: no release starts pods that refuse their own configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from service.config import Configuration, UpstreamKind, load, load_settings, revealed
from tests.chart.kubelet import mounted, of_the_container, of_the_image, of_the_pod, secret
from tests.chart.rendering import CASES, render
from tests.chart.rendering import container as container_of
from tests.chart.test_combinations import LIMITED

SENTINELS = ("sentinel-0.redis:26379", "sentinel-1.redis:26379", "sentinel-2.redis:26380")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str) -> Configuration:
    """What Weir makes of a case, read as it is in the pod."""
    rendered = render(case=case)
    files = mounted(rendered)
    for name, value in of_the_pod(rendered).items():
        if value in files:
            place = tmp_path / Path(value).name
            place.write_text(files[value])
            value = str(place)
        if name not in ("PATH", "HOME"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return load()


@pytest.mark.parametrize("case", CASES)
def test_weir_starts_with_what_the_chart_gives_it(loaded: Configuration, case: str) -> None:
    assert loaded.host == "0.0.0.0"
    assert loaded.settings.port == 8000
    assert loaded.settings.admin_port == 9000
    assert loaded.settings.worker_count == 1
    assert loaded.open_to_all is (case == "no-auth")


@pytest.mark.parametrize("case", CASES)
def test_the_grace_period_leaves_weir_time_to_drain(loaded: Configuration, case: str) -> None:
    spec = render(case=case).deployment["spec"]["template"]["spec"]
    sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    own = loaded.settings.drain_delay + loaded.settings.drain_timeout
    assert sleep + own < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("case", ["full"])
def test_all_that_the_values_say_arrives(loaded: Configuration) -> None:
    assert [u.name for u in loaded.upstreams] == ["openai", "azure-eu", "local", "pool"]
    assert loaded.upstreams[1].kind is UpstreamKind.AZURE
    assert loaded.upstreams[1].api_version == "2024-10-21"
    assert [m.name for m in loaded.file.models] == ["gpt-4o-mini", "big", "llama", "anywhere"]
    assert [p.upstream for p in loaded.file.models[3].places] == ["openai", "pool"]
    assert loaded.settings.replicas == 3
    assert loaded.settings.rate_limit_requests == 100
    assert loaded.settings.rate_limit_window == 30.5
    assert loaded.settings.max_body_bytes == 33554432
    assert loaded.settings.cors_origins == ("https://app.example.com", "https://admin.example.com")
    assert loaded.settings.log_level == "warning"
    assert loaded.settings.debug is False
    assert loaded.settings.otel_exporter_otlp_endpoint == "http://collector.observability:4318"
    assert [k.name for k in loaded.keys] == ["app"]


@pytest.mark.parametrize("case", ["default"])
def test_without_values_a_simulator_answers_whoever_has_the_generated_key(loaded: Configuration) -> None:
    assert loaded.settings.uses_simulator
    assert [key.name for key in loaded.keys] == ["default"]


@pytest.mark.parametrize(
    ("case", "address", "word"),
    [
        ("default", "redis://rel-weir-redis:6379/0", "GENERATED"),
        ("redis-persistent", "redis://rel-weir-redis:6379/0", "KnownRedisPassword2"),
        ("redis-claim", "redis://rel-weir-redis:6379/0", "SecretWord1"),
        ("redis-external", "redis://redis.example.com:6379/2", "KnownRedisPassword1"),
        ("full", "rediss://weir@redis.example.com:6380/3", "SecretWord1"),
        ("redis-sentinel", f"rediss+sentinel://weir@{','.join(SENTINELS)}/1?master=weir", "SecretWord1"),
        ("redis-cluster", "redis+cluster://node-0.redis:7000,node-1.redis:7001", None),
        ("url-secret", "rediss://:word@redis.example.com:6379/0", None),
        ("redis-none", None, None),
    ],
)
def test_the_address_of_redis_and_apart_from_it_the_password(
    case: str, loaded: Configuration, address: str | None, word: str | None
) -> None:
    url, password = loaded.settings.redis_url, loaded.settings.redis_password
    assert (url and url.get_secret_value()) == address
    if word == "GENERATED":
        word = render(case=case).secret("rel-weir-redis")["redis-password"]
    assert (password and password.get_secret_value()) == word
    watchers = revealed(loaded.settings.redis_sentinel_password)
    assert watchers == ("SecretWord2" if case == "redis-sentinel" else None)


@pytest.mark.parametrize(("mode", "there"), [("sentinel", True), ("cluster", False)])
def test_the_password_of_sentinels_stands_beside_a_whole_address(mode: str, there: bool) -> None:
    redis = {"mode": mode, "urlSecret": {"name": "redis-url", "key": "url"}}
    redis |= {"sentinel": {"existingSecret": "redis", "existingSecretKey": "word"}}
    variables = of_the_pod(render({"redis": redis}))
    assert variables["REDIS_URL"].startswith("rediss://")
    assert variables.get("REDIS_SENTINEL_PASSWORD") == ("SecretWord1" if there else None)


def test_a_password_of_any_letters_arrives_as_it_is() -> None:
    word = "p@ss/w:rd %41 $(HOME) $$ \"'\\ #é"
    for redis in ({}, {"mode": "external", "external": {"host": "h"}}):
        variables = of_the_pod(render({"redis": redis | {"auth": {"password": word}}}))
        assert variables["REDIS_PASSWORD"] == word
        assert word not in variables["REDIS_URL"]


@pytest.mark.parametrize(
    ("values", "replicas"),
    [
        ({}, "2"),
        ({"replicaCount": 5}, "5"),
        ({"replicaCount": 0}, "1"),
        ({"autoscaling": {"enabled": True, "minReplicas": 3}}, "3"),
        ({"keda": {"enabled": True, "minReplicaCount": 4}}, "4"),
        ({"redis": {"mode": "external", "urlSecret": {"name": "redis-url", "key": "url"}}}, "2"),
        ({"redis": {"mode": "none"}}, None),
    ],
)
def test_weir_knows_how_many_share_a_limit(values: dict[str, Any], replicas: str | None) -> None:
    if replicas is not None:  # without Redis several pods may have no limit at all
        values = values | {"settings": {"RATE_LIMIT_REQUESTS": 100}}
    assert of_the_pod(render(values)).get("REPLICAS") == replicas


@pytest.mark.parametrize("values", LIMITED.values(), ids=LIMITED)
def test_whatever_limits_is_shared(values: dict[str, Any]) -> None:
    assert of_the_pod(render(values | {"replicaCount": 3}))["REPLICAS"] == "3"


def test_without_a_limit_another_number_of_pods_replaces_none() -> None:
    two, five = (render({"replicaCount": n}).one("Deployment")["spec"] for n in (2, 5))
    assert (two["replicas"], five["replicas"]) == (2, 5)
    assert two["template"] == five["template"]


def test_down_to_no_pod_a_limit_is_shared_by_one() -> None:
    assert of_the_pod(render({"settings": {"RATE_LIMIT_REQUESTS": 100}}, case="keda"))["REPLICAS"] == "1"


def test_redis_asks_for_the_password_that_weir_gives() -> None:
    rendered = render()
    word = of_the_pod(rendered)["REDIS_PASSWORD"]
    assert re.fullmatch("[A-Za-z0-9]{32}", word)
    redis = container_of(rendered.one("StatefulSet"), "redis")
    for variable in redis["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert secret(rendered, reference["name"], reference["key"]) == word
    assert redis["command"][-2:] == ["--requirepass", "$(REDIS_PASSWORD)"]


@pytest.mark.parametrize(
    ("case", "redis", "url", "password", "schema", "batch"),
    [
        (
            "worker",
            "redis://rel-weir-redis:6379/0",
            "postgresql://app:word@ledger-rw.databases:5432/app",
            None,
            "billing",
            500,
        ),
        (
            "worker-password",
            "redis+sentinel://sentinel-0.redis:26379,sentinel-1.redis:26380/0?master=weir",
            "postgresql://weir@ledger.databases:6432/ledger",
            "p@ss/w:rd",
            "weir",
            1000,
        ),
    ],
)
def test_the_worker_knows_both_sides_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    case: str,
    redis: str,
    url: str,
    password: str | None,
    schema: str,
    batch: int,
) -> None:
    rendered = render(case=case)
    worker = container_of(rendered.one("Deployment", "rel-weir-worker"), "worker")
    assert worker["command"] == ["python3", "-m", "service", "worker"]
    variables = of_the_container(rendered, worker)
    for name, value in (of_the_image() | variables).items():
        if name not in ("PATH", "HOME"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == redis
    assert settings.ledger_postgres_url is not None
    assert settings.ledger_postgres_url.get_secret_value() == url
    word = settings.ledger_postgres_password
    assert (word and word.get_secret_value()) == password
    assert (settings.ledger_postgres_schema, settings.ledger_batch_records) == (schema, batch)
    assert (settings.host, settings.admin_port) == ("0.0.0.0", 9000)
    assert not {"RATE_LIMIT_REQUESTS", "OPENAI_API_KEY", "WEIR_KEYS_FILE"} & set(variables)
    tls = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": "/etc/weir/postgres/ca.crt"}
    assert {n: v for n, v in variables.items() if n.startswith("PG")} == (tls if case == "worker" else {})


def test_the_worker_is_replaced_for_its_own_settings_alone() -> None:
    def template(**settings: object) -> object:
        return render({"settings": settings}, case="worker").one("Deployment", "rel-weir-worker")["spec"]

    assert template(RATE_LIMIT_REQUESTS=5) == template(RATE_LIMIT_REQUESTS=6)
    assert template(LEDGER_POLL_SECONDS=5) != template(LEDGER_POLL_SECONDS=6)
    for name in ("REDIS_PREFIX", "LOG_LEVEL", "HOST"):
        assert template(**{name: "debug"}) != template(**{name: "error"})


def test_numbers_keep_their_form() -> None:
    values = {"settings": {"MAX_BODY_BYTES": 1073741824, "CONVERSATION_TTL": 0.5, "OTEL_SDK_DISABLED": True}}
    environment = of_the_pod(render(values))
    assert environment["MAX_BODY_BYTES"] == "1073741824"
    assert environment["CONVERSATION_TTL"] == "0.5"
    assert environment["OTEL_SDK_DISABLED"] == "true"
