"""`deploy/compose`: each file by its own program where there is one, else by structure; and all together."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from jsonschema import Draft202012Validator

from service.config import Settings, read_keys
from service.domain import Outcome
from tests.deploy.stack import COMPOSE, defaults, document, init, prepare
from tests.deploy.stack_schemas import SCHEMAS
from tests.programs import need
from tests.running import ROOT, WeirProcess

STACK: dict[str, Any] = document("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
WEIR: dict[str, Any] = SERVICES["weir"]["environment"]
DATASOURCES = {
    d["uid"]: d for d in document("grafana/provisioning/datasources/datasources.yaml")["datasources"]
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("stack"))


def mounts(service: str) -> list[tuple[str, str]]:
    """What it mounts, as source and target."""
    found = []
    for volume in SERVICES[service].get("volumes", []):
        if isinstance(volume, dict):
            found.append((defaults(volume["source"]), volume["target"]))
        else:
            source, target, *_ = volume.split(":")
            found.append((source, target))
    return found


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration[:-1])


# the whole, by compose itself


def compose(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(
        [need("docker-compose"), *arguments],
        cwd=folder,
        env=keep | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("profiles", "services"),
    [("", {"weir", "redis", "nginx"}), ("observability", set(SERVICES))],
    ids=["default", "observability"],
)
def test_compose_accepts_it(prepared: Path, profiles: str, services: set[str]) -> None:
    given = compose(prepared, "config", "--format", "json", COMPOSE_PROFILES=profiles)
    assert given.returncode == 0, given.stderr
    assert given.stderr == ""
    model = json.loads(given.stdout)
    assert set(model["services"]) == services
    traces = model["services"]["weir"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert bool(traces) is ("tempo" in services)
    if "alloy" in services:
        assert model["services"]["alloy"]["environment"]["COMPOSE_PROJECT"] == model["name"] == "weir"


@pytest.mark.parametrize("name", ["REDIS_PASSWORD", "GRAFANA_ADMIN_PASSWORD"])
@pytest.mark.parametrize("value", [None, ""])
def test_it_does_not_start_without_a_password(prepared: Path, name: str, value: str | None) -> None:
    given = {"REDIS_PASSWORD": "a", "GRAFANA_ADMIN_PASSWORD": "b"}
    assert compose(prepared, "--env-file", os.devnull, "config", "-q", **given).returncode == 0
    del given[name]
    if value is not None:
        given[name] = value
    refused = compose(prepared, "--env-file", os.devnull, "config", "-q", **given)
    assert refused.returncode != 0
    assert f"{name} is missing a value: is not set; run ./init.sh" in refused.stderr


def test_a_setting_of_weir_env_reaches_weir(prepared: Path) -> None:
    own = prepared / "weir.env"
    own.write_text("RATE_LIMIT_REQUESTS=7\n")
    try:
        model = json.loads(compose(prepared, "config", "--format", "json").stdout)
    finally:
        own.unlink()
    assert model["services"]["weir"]["environment"]["RATE_LIMIT_REQUESTS"] == "7"


# the whole, by structure


def test_without_a_profile_there_are_weir_redis_and_nginx() -> None:
    assert {n for n, s in SERVICES.items() if "profiles" not in s} == {"weir", "redis", "nginx"}
    assert all(s["profiles"] == ["observability"] for s in SERVICES.values() if "profiles" in s)


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_held_down(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert "privileged" not in service
    assert "network_mode" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_each_image_is_pinned_and_may_be_another(name: str) -> None:
    match = re.fullmatch(rf"\$\{{{name.upper()}_IMAGE:-([a-z./]+):([\w.-]+)\}}", SERVICES[name]["image"])
    assert match
    assert match[2] == "dev" if name == "weir" else re.search(r"\d+\.\d+", match[2])


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_tells_whether_it_is_well(name: str) -> None:
    if name == "weir":
        assert "\nHEALTHCHECK " in (ROOT / "Dockerfile").read_text()
    else:
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


def test_nothing_is_published_beyond_this_machine() -> None:
    published = {n: [defaults(p) for p in s["ports"]] for n, s in SERVICES.items() if "ports" in s}
    assert set(published) == {"nginx", "prometheus", "alertmanager", "grafana"}
    for ports in published.values():
        for port in ports:
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    listens = re.findall(r"listen (\d+) ssl;", (COMPOSE / "nginx/nginx.conf").read_text())
    assert [port.rpartition(":")[2] for port in published["nginx"]] == listens


def test_who_can_reach_whom() -> None:
    on = {
        network: {n for n, s in SERVICES.items() if network in s["networks"]} for network in STACK["networks"]
    }
    assert on["redis"] == {"weir", "redis"}
    assert STACK["networks"]["redis"] == {"internal": True}
    assert on["edge"] == {"weir", "nginx"}
    assert on["observability"] == {n for n, s in SERVICES.items() if "profiles" in s} | {"weir"}
    for service in SERVICES.values():
        assert set(service["networks"]) <= set(STACK["networks"])
        assert set(service.get("depends_on", ())) <= set(SERVICES)


def test_what_is_mounted_is_there(prepared: Path) -> None:
    used = set()
    for name in SERVICES:
        for source, target in mounts(name):
            assert target.startswith("/")
            if source.startswith("."):
                assert (prepared / source).exists(), (name, source)
            elif not source.startswith("/"):
                used.add(source)
    assert used == set(STACK["volumes"])
    assert [n for n in SERVICES if any("docker.sock" in s for s, _ in mounts(n))] == ["alloy"]


def test_what_comes_from_the_host_cannot_be_written() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            if isinstance(volume, dict):
                assert volume["read_only"] is True
                assert volume["bind"] == {"create_host_path": False}
            elif volume.startswith((".", "/")):
                assert volume.endswith(":ro")


def test_a_stream_is_not_cut_by_a_kill() -> None:
    drain = WEIR["DRAIN_DELAY"] + WEIR["DRAIN_TIMEOUT"]
    nginx = re.search(r"worker_shutdown_timeout (\w+);", (COMPOSE / "nginx/nginx.conf").read_text())
    assert nginx
    assert drain < seconds(SERVICES["weir"]["stop_grace_period"])
    assert drain <= seconds(nginx[1]) < seconds(SERVICES["nginx"]["stop_grace_period"])


def test_weir_starts_with_what_it_is_given(tmp_path: Path) -> None:
    assert set(WEIR) <= {name.upper() for name in Settings.model_fields}
    assert dict(mounts("weir"))["./keys"] == str(Path(WEIR["WEIR_KEYS_FILE"]).parent)
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys: [{{name: a, sha256: '{'0' * 64}'}}]")
    given = {name: defaults(str(value)) for name, value in WEIR.items()} | {"WEIR_KEYS_FILE": str(keys)}
    for endpoint in ("", "http://tempo:4318"):
        given["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
        with WeirProcess("check-config", **given) as checking:
            assert checking.wait() == 0, checking.error_lines
        assert "1 keys" in checking.lines[0]


# what the person does


def test_every_variable_is_documented_and_none_else() -> None:
    # Those of compose's own have their place in the text.
    used = set(re.findall(r"\$\{(\w+)", (COMPOSE / "compose.yaml").read_text()))
    used -= {"COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME"}
    page = (ROOT / "docs/compose.md").read_text().partition("## What you may set")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == used


def test_init_makes_secrets_once(prepared: Path) -> None:
    passwords = re.findall(r"^(\w+_PASSWORD)=(\w+)$", (prepared / ".env").read_text(), re.MULTILINE)
    assert [name for name, _ in passwords] == ["REDIS_PASSWORD", "GRAFANA_ADMIN_PASSWORD"]
    assert len({value for _, value in passwords}) == 2
    assert all(len(value) == 48 for _, value in passwords)
    made = [prepared / ".env", prepared / "certs/tls.key", prepared / "certs/tls.crt"]
    for secret in made[:2]:
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = [path.read_bytes() for path in made]
    assert "made" not in init(prepared)
    assert [path.read_bytes() for path in made] == before
    ignored = (COMPOSE / ".gitignore").read_text().split()
    assert {".env", "weir.env", "certs/", "keys/"} <= set(ignored)


def test_who_runs_nginx_can_read_the_key(prepared: Path) -> None:
    owner = (prepared / "certs/tls.key").stat()
    given = re.search(r"^NGINX_USER=(\S+)$", (prepared / ".env").read_text(), re.MULTILINE)
    user = given[1] if given else defaults(SERVICES["nginx"]["user"])
    assert user == f"{owner.st_uid}:{owner.st_gid}"


def test_the_documented_commands_make_keys_that_weir_takes(tmp_path: Path) -> None:
    page = (ROOT / "docs/compose.md").read_text()
    commands = re.findall(r"^ *(docker compose run --rm --no-deps -T weir make-key .*)$", page, re.MULTILINE)
    assert [("> keys" in c, ">> keys" in c) for c in commands] == [(True, False), (True, True)]
    (tmp_path / "keys").mkdir()
    for command in commands:
        here = command.replace("docker compose run --rm --no-deps -T weir", f"{sys.executable} -m service")
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        told = subprocess.run(
            here, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert re.search(r"^[\w-]{20,}$", told.stderr, re.MULTILINE), "the key itself is shown"
    names = [key.name for key in read_keys(tmp_path / "keys/keys.yaml")]
    assert len(set(names)) == 2


# Prometheus and Alertmanager


def prometheus_folder(prepared: Path, folder: Path) -> Path:
    """Prometheus' folder as in its container."""
    for source, target in mounts("prometheus"):
        if target.startswith("/etc/prometheus/"):
            (folder / Path(target).name).symlink_to(prepared / source)
    return folder / "prometheus.yml"


def test_promtool_accepts_the_config(prepared: Path, tmp_path: Path) -> None:
    config = prometheus_folder(prepared, tmp_path)
    command = [need("promtool"), "check", "config", str(config)]
    given = subprocess.run(command, capture_output=True, text=True)
    assert given.returncode == 0, given.stdout + given.stderr


def test_a_wrong_rule_in_the_charts_folder_is_noticed(prepared: Path, tmp_path: Path) -> None:
    config = prometheus_folder(prepared, tmp_path)
    rule = prepared / "../../helm/weir/files/rules/wrong.yaml"
    rule.write_text("groups: [{name: a, rules: [{alert: A, expr: 'sum('}]}]")
    try:
        given = subprocess.run(
            [need("promtool"), "check", "config", str(config)], capture_output=True, text=True
        )
    finally:
        rule.unlink()
    assert given.returncode != 0
    assert "wrong.yaml" in given.stdout + given.stderr


def amtool(*arguments: str) -> str:
    given = subprocess.run([need("amtool"), *arguments], capture_output=True, text=True, timeout=30)
    assert given.returncode == 0, given.stdout + given.stderr
    return given.stdout.strip()


def test_amtool_accepts_the_config_and_its_routes() -> None:
    file = str(COMPOSE / "alertmanager/alertmanager.yml")
    amtool("check-config", file)
    routes = ("config", "routes", "test", f"--config.file={file}")
    assert amtool(*routes, "alertname=A", "severity=page") == "on-call"
    assert amtool(*routes, "alertname=A", "severity=ticket") == "tickets"
    assert amtool(*routes, "alertname=A") == "nobody"


def test_alertmanager_has_nobody_to_tell_yet() -> None:
    receivers = document("alertmanager/alertmanager.yml")["receivers"]
    assert [set(receiver) for receiver in receivers] == [{"name"}] * 3


# who listens where


def port_of(service: str) -> set[int]:
    """Ports that a service listens on within the stack."""
    if service == "tempo":
        tempo = document("tempo/tempo.yaml")
        protocols = tempo["distributor"]["receivers"]["otlp"]["protocols"]
        receivers = {int(p["endpoint"].rpartition(":")[2]) for p in protocols.values()}
        return {tempo["server"]["http_listen_port"], *receivers}
    if service == "loki":
        return {document("loki/loki.yaml")["server"]["http_listen_port"]}
    if service == "weir":
        return {WEIR["PORT"], WEIR["ADMIN_PORT"]}
    return {{"prometheus": 9090, "alertmanager": 9093, "grafana": 3000}[service]}


def test_what_prometheus_asks_is_there() -> None:
    config = document("prometheus/prometheus.yml")
    jobs = [(job["job_name"], job["static_configs"]) for job in config["scrape_configs"]]
    managers = [("alertmanager", m["static_configs"]) for m in config["alerting"]["alertmanagers"]]
    asked = {}
    for job, targets in jobs + managers:
        for target in targets[0]["targets"]:
            host, _, port = target.partition(":")
            assert host == job or (host, job) == ("localhost", "prometheus")
            assert int(port) in port_of(job)
            asked[job] = int(port)
    assert asked["weir"] == WEIR["ADMIN_PORT"]
    assert asked["alertmanager"] == 9093


def test_every_address_in_the_stack_is_a_service_that_listens_there() -> None:
    addresses = [d["url"] for d in DATASOURCES.values()]
    addresses += re.findall(r'url = "(\S+)"', (COMPOSE / "alloy/config.alloy").read_text())
    otlp = re.search(r":\+(http://\S+?)\}", WEIR["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert otlp
    protocols = document("tempo/tempo.yaml")["distributor"]["receivers"]["otlp"]["protocols"]
    assert protocols["http"]["endpoint"] == f"0.0.0.0:{urlsplit(otlp[1]).port}"
    for address in (*addresses, otlp[1]):
        parts = urlsplit(address)
        assert parts.hostname in SERVICES
        assert parts.port in port_of(parts.hostname)
    assert f"server weir:{WEIR['PORT']} " in (COMPOSE / "nginx/nginx.conf").read_text()


def test_health_checks_ask_the_port_that_is_listened_on() -> None:
    for name in ("prometheus", "alertmanager", "grafana"):
        address = urlsplit(SERVICES[name]["healthcheck"]["test"][-1])
        assert {address.port} == port_of(name)
    # `tempo -health` and `loki -health` ask these.
    assert document("tempo/tempo.yaml")["server"]["http_listen_port"] == 3200
    assert document("loki/loki.yaml")["server"]["http_listen_port"] == 3100
    listen = next(c for c in SERVICES["alloy"]["command"] if "listen-addr" in c).partition("=")[2]
    assert listen.replace(":", "/") in SERVICES["alloy"]["healthcheck"]["test"][-1]


# Grafana, Tempo, Loki, Alloy: no program of theirs is at hand


def misspelled(value: Any) -> Iterator[Any]:
    """Copies of a document with one name wrong in each."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield {(f"{name}s" if n == name else n): v for n, v in value.items()}
            for wrong in misspelled(inner):
                yield value | {name: wrong}
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            for wrong in misspelled(inner):
                yield [*value[:place], wrong, *value[place + 1 :]]


@pytest.mark.parametrize("path", SCHEMAS)
def test_their_files_have_known_names_and_no_others(path: str) -> None:
    schema = Draft202012Validator(SCHEMAS[path])
    schema.validate(document(path))
    wrong = list(misspelled(document(path)))
    assert len(wrong) >= 10
    assert not any(map(schema.is_valid, wrong))


def test_datasources_know_each_other() -> None:
    assert {d["type"] for d in DATASOURCES.values()} == {"prometheus", "tempo", "loki", "alertmanager"}
    text = (COMPOSE / "grafana/provisioning/datasources/datasources.yaml").read_text()
    named = re.findall(r"datasourceUid: (\w+)", text)
    assert set(named) == {"tempo", "loki"}
    assert set(named) <= set(DATASOURCES)
    assert [d["uid"] for d in DATASOURCES.values() if d.get("isDefault")] == ["prometheus"]
    assert not re.search(r"(?<!\$)\$(?!\$)", text), "Grafana puts the environment in the place of one $"


def test_dashboards_are_the_charts() -> None:
    (provider,) = document("grafana/provisioning/dashboards/dashboards.yaml")["providers"]
    assert ("../../helm/weir/files/dashboards", provider["options"]["path"]) in mounts("grafana")


def test_nobody_gets_into_grafana_without_a_password() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert defaults(environment["GF_AUTH_ANONYMOUS_ENABLED"]) == "false"
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")
    assert environment["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"


def test_data_lies_on_volumes() -> None:
    loki, tempo = document("loki/loki.yaml"), document("tempo/tempo.yaml")["storage"]["trace"]
    paths = {
        "loki": [
            loki["common"]["path_prefix"],
            *loki["common"]["storage"]["filesystem"].values(),
            loki["compactor"]["working_directory"],
        ],
        "tempo": [tempo["local"]["path"], tempo["wal"]["path"]],
        "prometheus": [_option("prometheus", "--storage.tsdb.path")],
        "alertmanager": [_option("alertmanager", "--storage.path")],
        "alloy": [_option("alloy", "--storage.path")],
        "redis": [re.findall(r"--dir (\S+)", SERVICES["redis"]["command"][-1])[0]],
        "grafana": ["/var/lib/grafana"],
    }
    for name, used in paths.items():
        target = dict(mounts(name))[name]
        assert all(Path(path).is_relative_to(target) for path in used), name


def _option(service: str, name: str) -> str:
    command: list[str] = SERVICES[service]["command"]
    return next(c.partition("=")[2] for c in command if c.startswith(f"{name}="))


def test_logs_and_traces_are_forgotten_in_time() -> None:
    loki, tempo = document("loki/loki.yaml"), document("tempo/tempo.yaml")
    assert (
        loki["limits_config"]["retention_period"]
        == tempo["overrides"]["defaults"]["compaction"]["block_retention"]
    )
    assert loki["compactor"]["retention_enabled"] is True
    assert loki["compactor"]["delete_request_store"] == loki["schema_config"]["configs"][-1]["object_store"]
    # Structured metadata want both.
    assert {k: loki["schema_config"]["configs"][-1][k] for k in ("schema", "store")} == {
        "schema": "v13",
        "store": "tsdb",
    }


def test_alloys_components_are_whole_and_know_each_other() -> None:
    text = re.sub(r"^\s*//.*$", "", (COMPOSE / "alloy/config.alloy").read_text(), flags=re.MULTILINE)
    bare = re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)
    stack = []
    for sign in re.findall(r"[][(){}]", bare):
        if sign in "[({":
            stack.append(sign)
        else:
            assert stack.pop() + sign in ("[]", "()", "{}")
    assert stack == []
    assert '"' not in bare.replace('""', "")
    components = {
        f"{kind}.{label}" for kind, label in re.findall(r'^([a-z._]+) "(\w+)" \{', text, re.MULTILINE)
    }
    assert len(components) == 5
    used = {
        ".".join(name.split(".")[:-1]) for name in re.findall(r"\b(?:discovery|loki)(?:\.\w+){3}\b", bare)
    }
    assert used <= components
    # The sources: nothing takes their output by name but what they name themselves.
    assert components - used == {"loki.source.docker.containers"}


def test_log_labels_are_bounded_and_are_fields_of_weirs_line(tmp_path: Path) -> None:
    text = (COMPOSE / "alloy/config.alloy").read_text()
    taken = _block(text, "stage.json")
    assert _block(text, "stage.labels") == {"level", "outcome"}
    assert re.findall(r'target_label\s*= "(\w+)"', text) == ["service_name", "namespace"]
    assert _block(text, "stage.structured_metadata") == {"request_id", "trace_id", "span_id"}
    assert re.findall(r'selector = "\{service_name=\\"(\w+)\\"\}"', text) == ["weir"]
    with WeirProcess(SIMULATOR_TOKENS_PER_SECOND="10000") as weir:
        weir.wait_until_ready()
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        request = urllib.request.Request(
            f"{weir.url}/v1/chat/completions",
            data=b'{"model":"simulator","messages":[{"role":"user","content":"Hello"}]}',
            headers={"content-type": "application/json", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
        )
        urllib.request.urlopen(request, timeout=20).read()
        line = weir.wait_for_line('"event":"request"')
    event = json.loads(line)
    assert taken == {"timestamp", "level", "outcome", "request_id", "trace_id", "span_id"}
    assert taken - {"span_id"} <= set(event)  # which is there where Weir makes spans
    assert event["level"] in ("debug", "info", "warning", "error", "critical")
    assert event["outcome"] in set(Outcome)
    assert datetime.fromisoformat(event["timestamp"]).tzinfo is not None
    # The link from a line in Grafana to its trace.
    matcher = DATASOURCES["loki"]["jsonData"]["derivedFields"][0]["matcherRegex"]
    found = re.search(matcher, line)
    assert found
    assert found[1] == trace


def _block(text: str, name: str) -> set[str]:
    """Names in the one map of a stage."""
    inner = re.search(rf"{re.escape(name)} \{{\s*\w+ = \{{(.*?)\}}", text, re.DOTALL)
    assert inner
    return set(re.findall(r"(\w+)\s*=", inner[1]))
