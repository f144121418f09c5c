"""Settings: where they come from, and one plain line for each that is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from service.config import (
    SIMULATOR,
    Configuration,
    FileConfig,
    KeyConfig,
    Settings,
    UpstreamConfig,
    UpstreamKind,
    is_loopback,
    load,
)
from service.errors import ConfigurationError
from tests.running import settings

HASH = "0123456789abcdef" * 4
SECRET = "hunter2-the-secret"


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` but the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def refused(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    """The lines that say why these variables are no configuration."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load()
    return caught.value.message.split("\n")


# -- wrong values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT", "http", "valid integer"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("PORT", "-1", "greater than or equal to 0"),
        ("ADMIN_PORT", "1.5", "valid integer"),
        ("WORKER_COUNT", "0", "greater than or equal to 1"),
        ("WORKER_COUNT", "65", "less than or equal to 64"),
        ("DRAIN_TIMEOUT", "-1", "greater than or equal to 0"),
        ("DRAIN_DELAY", "soon", "valid number"),
        ("LIVENESS_TIMEOUT", "0", "greater than 0"),
        ("OPENAI_BASE_URL", "api.openai.com/v1", "must be a URL such as https://host/v1"),
        ("OPENAI_BASE_URL", "ftp://host/v1", "must be a URL such as https://host/v1"),
        ("OPENAI_BASE_URL", "https://", "must be a URL such as https://host/v1"),
        ("OPENAI_TEMPERATURE", "2.1", "less than or equal to 2"),
        ("OPENAI_MAX_TOKENS", "0", "greater than or equal to 1"),
        ("OPENAI_TIMEOUT", "0", "greater than 0"),
        ("OPENAI_MAX_RETRIES", "11", "less than or equal to 10"),
        ("STREAM_IDLE_TIMEOUT", "nan", "finite number"),
        ("CONVERSATION_TTL", "inf", "finite number"),
        ("STREAM_KEEPALIVE", "4000", "less than or equal to 3600"),
        ("AUTH", "maybe", "'keys' or 'none'"),
        ("MAX_BODY_BYTES", "1", "greater than or equal to 1024"),
        ("RATE_LIMIT_REQUESTS", "0", "greater than or equal to 1"),
        ("BATCH_CONCURRENCY", "101", "less than or equal to 100"),
        ("CONVERSATION_MESSAGES", "-1", "greater than or equal to 0"),
        ("LOG_LEVEL", "loud", "'debug', 'info'"),
        ("LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
        ("DEBUG", "perhaps", "valid boolean"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "must be a URL"),
        ("OTEL_TRACES_SAMPLER", "some", "'always_on'"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.1", "less than or equal to 1"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_setting_the_value_and_what_is_allowed(
    environment: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    (line,) = refused(environment, **{name: value})
    assert line.startswith(f"{name}={value}: ")
    assert allowed in line
    description = Settings.model_fields[name.lower()].description
    assert line.endswith(f"({description})")


def test_all_wrong_values_are_told_at_once(environment: pytest.MonkeyPatch) -> None:
    lines = refused(environment, PORT="x", AUTH="maybe", DEBUG="perhaps")
    assert [line.partition("=")[0] for line in lines] == ["PORT", "AUTH", "DEBUG"]


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", f"http://user:{SECRET}@redis:6379"),
        ("REDIS_URL", f"redis+sentinel://user:{SECRET}@redis:26379/0"),
        ("REDIS_URL", SECRET),
        ("OPENAI_API_KEY", SECRET),
    ],
)
def test_a_secret_is_named_and_never_shown(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    message = "\n".join(refused(environment, **{name: value}))
    assert name in message
    assert SECRET not in message


def test_secrets_do_not_show_in_the_settings_themselves() -> None:
    made = settings(
        openai_api_key=f"sk-{SECRET}",
        redis_url=f"redis://:{SECRET}@redis",
        otel_exporter_otlp_headers=f"authorization={SECRET}",
    )
    assert SECRET not in repr(made)
    assert SECRET not in str(made)
    assert SECRET not in made.model_dump_json()


# -- the upstream that needs no YAML -------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["", "nope", "sk-", "sk-abc", "sk-with space", "sk-good-key-with-end\n", "Bearer sk-abcdefgh"]
)
def test_a_key_for_openai_begins_with_sk(key: str) -> None:
    with pytest.raises(ValueError, match="must be a key that begins with `sk-`") as caught:
        settings(openai_api_key=key)
    assert "OPENAI_API_KEY" in str(caught.value)


def test_a_key_is_needed_for_openais_own_address() -> None:
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        settings(openai_base_url="https://api.openai.com/v1")


@pytest.mark.parametrize("key", [None, "anything"])
def test_another_host_takes_any_key_and_none(key: str | None) -> None:
    configuration = load(settings(openai_base_url="http://llm.internal/v1", openai_api_key=key))
    (upstream,) = configuration.upstreams
    assert (upstream.kind, upstream.base_url) == (UpstreamKind.DIRECT, "http://llm.internal/v1")
    assert configuration.api_keys(upstream) == ((key,) if key else ())


def test_a_key_alone_means_openai() -> None:
    configuration = load(settings(openai_api_key="sk-abcdefgh"))
    assert configuration.upstreams[0].base_url == "https://api.openai.com/v1"
    assert configuration.default_model == "gpt-4o-mini"


def test_with_nothing_set_the_simulator_answers_on_loopback() -> None:
    configuration = load(settings())
    assert [u.kind for u in configuration.upstreams] == [UpstreamKind.SIMULATOR]
    assert configuration.default_model == SIMULATOR
    assert (configuration.host, configuration.admin_host) == ("127.0.0.1", "127.0.0.1")
    assert configuration.open_to_all


@pytest.mark.parametrize("key", ["key-with-end\n", "two words", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(settings(openai_base_url="http://llm.internal/v1", openai_api_key=key))
    assert "OPENAI_API_KEY" in caught.value.message
    assert key not in caught.value.message


# -- Redis ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://localhost:6379/0",
        f"redis://:{SECRET}@redis:6379/1",
        f"rediss://user:{SECRET}@redis:6380",
        "redis+sentinel://a:26379,b:26379/0?master=main",
        f"rediss+sentinel://:{SECRET}@a:26379/0?master=main&timeout=1",
        "redis+cluster://a:6379,b:6379",
        "rediss+cluster://a",
    ],
)
def test_every_form_of_a_redis_url_is_taken(url: str) -> None:
    known = settings(redis_url=url).redis_url
    assert known is not None
    assert known.get_secret_value() == url


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis", "schemes"),
        ("redis://", "a host"),
        (f"redis://:{SECRET}@", "a host"),
        ("http://redis", "schemes"),
        ("unix:///run/redis", "schemes"),
        ("redis+sentinel://a:26379/0", "must name the master"),
    ],
)
def test_other_forms_are_refused_with_what_is_missing(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        settings(redis_url=url)


# -- the environment and .env --------------------------------------------------------------------


def test_dot_env_is_read_and_the_environment_goes_before_it(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("PORT=7001\nLOG_LEVEL=debug\nUNKNOWN=x\n")
    environment.setenv("PORT", "7002")
    known = load().settings
    assert (known.port, known.log_level) == (7002, "debug")


def test_a_wrong_value_in_dot_env_is_told_alike(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=x\n")
    (line,) = refused(environment)
    assert line.startswith("PORT=x: ")


def test_an_empty_variable_is_as_good_as_none(environment: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        environment.setenv(name.upper(), "")
    assert load().settings == settings()


def test_words_are_taken_in_any_case_and_lists_by_commas(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOG_LEVEL", " WARNING ")
    environment.setenv("AUTH", "None")
    environment.setenv("CORS_ORIGINS", "https://a.example, https://b.example,")
    known = load().settings
    assert (known.log_level, known.auth) == ("warning", "none")
    assert known.cors_origins == ("https://a.example", "https://b.example")


# -- the YAML file -------------------------------------------------------------------------------

UPSTREAM = "upstreams:\n  - {name: one, base_url: 'http://one/v1'}\n"


def loaded(tmp_path: Path, text: str, **values: Any) -> Configuration:
    path = tmp_path / "weir.yaml"
    path.write_text(text)
    return load(settings(weir_config=path, **values))


def refusal(tmp_path: Path, text: str, **values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        loaded(tmp_path, text, **values)
    return caught.value.message


def test_a_good_file_is_taken_whole(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ONE_KEY", "secret-one")
    (tmp_path / "two.key").write_text("secret-two\n")
    configuration = loaded(
        tmp_path,
        f"""
upstreams:
  - name: one
    base_url: https://one.example/v1
    api_key_env: ONE_KEY
  - name: two
    kind: azure
    base_url: https://two.openai.azure.com
    api_version: "2024-10-21"
    api_key_file: {tmp_path}/two.key
  - {{name: sim, kind: simulator}}
models:
  - {{name: fast, upstream: one, upstream_model: small-1, aliases: [quick], context_tokens: 4096}}
  - {{name: big, upstream: two, price: {{input: 2.5, output: 10, cached_input: 1.25}}}}
keys:
  - {{name: anna, tenant: team, sha256: {HASH}}}
""",
    )
    assert [u.name for u in configuration.upstreams] == ["one", "two", "sim"]
    assert [configuration.api_keys(u) for u in configuration.upstreams] == [
        ("secret-one",),
        ("secret-two",),
        (),
    ]
    assert configuration.file.models[0].aliases == ("quick",)
    assert configuration.keys == (KeyConfig(name="anna", tenant="team", sha256=HASH),)
    assert configuration.default_model == "fast"
    assert not configuration.open_to_all


def test_an_empty_file_is_a_good_one(tmp_path: Path) -> None:
    assert loaded(tmp_path, "# nothing yet\n").file == FileConfig()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("upstreams: [\n", ["line 2"]),
        ("upstreams:\n  - a: 1\n b: 2\n", ["line 3"]),
        ("a: &x 1\nb: *y\n", ["line 2", "undefined alias"]),
        ("models: 2024-99-99\n", ["a value in it cannot be read"]),
        ("models: " + "[" * 5_000, ["a value in it cannot be read"]),
        ("\x00", ["is not valid YAML"]),
        ("- a list\n", ["valid dictionary"]),
        ("just text\n", ["valid dictionary"]),
        ("upstream: []\n", ["upstream: Extra inputs are not permitted"]),
        ("upstreams:\n  - {name: one, base_url: one/v1}\n", ["upstreams.0", "must be a URL"]),
        ("upstreams:\n  - {name: 'One!', base_url: 'http://one'}\n", ["upstreams.0.name 'One!'"]),
        ("upstreams:\n  - {name: one}\n", ["upstreams.0", "'one' needs a base_url"]),
        (
            "upstreams:\n  - {name: one, kind: azure, base_url: 'http://one'}\n",
            ["upstreams.0", "'one' of kind azure needs an api_version"],
        ),
        ("upstreams:\n  - {name: one, kind: gopher}\n", ["upstreams.0.kind 'gopher'", "'azure'"]),
        (UPSTREAM + "  - {name: one, base_url: 'http://two'}\n", ["upstream 'one' is there twice"]),
        (
            UPSTREAM + "models:\n  - {name: a, upstream: one}\n  - {name: b, upstream: one, aliases: [a]}\n",
            ["model or alias 'a' is there twice"],
        ),
        (
            UPSTREAM + "models:\n  - {name: a, upstream: one, aliases: ['gpt-*']}\n",
            ["models.0", "'a'", "an alias is one name"],
        ),
        (UPSTREAM + "limits: !!int ''\n", ["is not valid YAML"]),
        (
            UPSTREAM + "models:\n  - {name: a, upstream: two}\n",
            ["model 'a' names the upstream 'two'", "one of one"],
        ),
        ("models:\n  - {name: a, upstream: two}\n", ["model 'a' names the upstream 'two'", SIMULATOR]),
        (
            UPSTREAM + "models:\n  - {name: a, upstream: one, price: {input: -1}}\n",
            ["models.0.price.input -1", "greater than or equal to 0"],
        ),
        (
            UPSTREAM + "models:\n  - {name: a, upstream: one, context_tokens: 0}\n",
            ["models.0.context_tokens 0"],
        ),
        (
            UPSTREAM + "models:\n  - {name: a, upstream: one, price: {input: .nan}}\n",
            ["models.0.price.input nan", "finite number"],
        ),
        ("keys:\n  - {name: anna, sha256: abc}\n", ["keys.0.sha256", "should match pattern"]),
        (
            f"keys:\n  - {{name: a, sha256: {HASH}}}\n  - {{name: b, sha256: {HASH}}}\n",
            ["key hash of", "is there twice"],
        ),
    ],
    ids=itertools.count(),
)
def test_a_wrong_file_is_one_line_with_file_and_place(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert "\n" not in message
    assert "weir.yaml" in message or message.startswith("WEIR_CONFIG: ")
    for part in parts:
        assert part in message


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        load(settings(weir_config=tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="is not UTF-8 text"):
        load(settings(weir_config=tmp_path / "binary.yaml"))
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load(settings(weir_config=tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        f"upstreams:\n  - {{name: one, base_url: 'http://one', api_key: {SECRET}}}\n",
        f"upstreams:\n  - [one, {SECRET}]\n",
        f"keys:\n  - {{name: anna, sha256: {SECRET}}}\n",
        f"keys:\n  - {{name: anna, key: {SECRET}}}\n",
        f"keys: {SECRET}\n",
        f"api_key: {SECRET}\n",
    ],
)
def test_a_secret_that_strayed_into_the_file_is_not_shown(tmp_path: Path, text: str) -> None:
    assert SECRET not in refusal(tmp_path, text)


@pytest.mark.parametrize("name", ["ONE_KEY", "OPENAI_API_KEY"])
@pytest.mark.parametrize("value", [None, ""])
def test_an_upstream_whose_key_is_not_in_the_environment_is_refused(
    tmp_path: Path, environment: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    environment.delenv(name, raising=False)
    if value is not None:
        environment.setenv(name, value)
    text = f"upstreams:\n  - {{name: one, base_url: 'http://one', api_key_env: {name}}}\n"
    assert refusal(tmp_path, text) == (
        f"WEIR_CONFIG: upstream 'one': the environment has no {name}, its api_key_env"
    )


@pytest.mark.parametrize("content", [None, "", "two words"])
def test_an_upstream_whose_key_file_has_no_key_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "one.key").write_text(content)
    text = f"upstreams:\n  - {{name: one, base_url: 'http://one', api_key_file: {tmp_path}/one.key}}\n"
    message = refusal(tmp_path, text)
    assert "upstream 'one'" in message
    assert "one.key" in message
    assert "two words" not in message


def test_keys_of_both_files_count_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    text = f"keys:\n  - {{name: anna, sha256: {HASH}}}\n"
    path.write_text(f"keys:\n  - {{name: bert, sha256: {'f' * 64}}}\n")
    configuration = loaded(tmp_path, text, weir_keys_file=path)
    assert {key.name for key in configuration.keys} == {"anna", "bert"}
    for again in (f"{{name: anna, sha256: {'f' * 64}}}", f"{{name: carl, sha256: {HASH}}}"):
        path.write_text(f"keys:\n  - {again}\n")
        message = refusal(tmp_path, text, weir_keys_file=path)
        assert "there twice" in message
        assert HASH not in message


def test_a_provider_need_not_be_named() -> None:
    assert UpstreamConfig(name="one", base_url="http://one").provider is None


# -- who may come in -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "weir.example"])
def test_without_keys_only_loopback_is_allowed(host: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(settings(host=host))
    assert caught.value.message.startswith(f"HOST={host}: ")
    assert "AUTH=none" in caught.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    configuration = load(settings(host=host))
    assert configuration.host == configuration.admin_host == host


def test_auth_none_lets_everybody_in_on_purpose() -> None:
    assert load(settings(host="0.0.0.0", auth="none")).open_to_all


def test_with_keys_every_host_is_allowed(tmp_path: Path) -> None:
    text = f"keys:\n  - {{name: anna, sha256: {HASH}}}\n"
    assert not loaded(tmp_path, text, host="0.0.0.0").open_to_all
    (tmp_path / "keys.yaml").write_text(text)
    assert not load(settings(host="0.0.0.0", weir_keys_file=tmp_path / "keys.yaml")).open_to_all


def test_a_file_of_keys_that_is_empty_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    assert not load(settings(host="0.0.0.0", weir_keys_file=tmp_path / "keys.yaml")).open_to_all


def test_the_admin_port_may_listen_elsewhere() -> None:
    assert load(settings(admin_host="0.0.0.0")).admin_host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("", False), ("x", False)],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# -- where traces go -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "endpoint"),
    [
        ({}, None),
        ({"otel_exporter_otlp_endpoint": "http://c:4318"}, "http://c:4318/v1/traces"),
        ({"otel_exporter_otlp_endpoint": "http://c:4318/"}, "http://c:4318/v1/traces"),
        (
            {
                "otel_exporter_otlp_endpoint": "http://c:4318",
                "otel_exporter_otlp_traces_endpoint": "http://t/x",
            },
            "http://t/x",
        ),
        ({"otel_exporter_otlp_endpoint": "http://c:4318", "otel_sdk_disabled": True}, None),
    ],
)
def test_the_endpoint_of_traces(values: dict[str, Any], endpoint: str | None) -> None:
    assert settings(**values).traces_endpoint == endpoint
