"""`python -m service smoke`: it passes a Weir that is well, and says what is wrong with one that is not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.__main__ import main
from service.auth import hash_key
from service.config import KeyConfig
from tests.fakes.upstream import FakeUpstream
from tests.running import RunningWeir, WeirProcess, configuration

KEY = "weir-a-key-of-the-test"


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("WEIR_API_KEY", KEY)
    return monkeypatch


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[WeirProcess]:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'keys: [{{name: test, sha256: "{hash_key(KEY)}"}}]')
    with WeirProcess(
        WEIR_KEYS_FILE=str(keys), SIMULATOR_TOKENS_PER_SECOND="10000", RATE_LIMIT_REQUESTS="12"
    ) as weir:
        weir.wait_until_ready()
        yield weir


def test_a_weir_that_is_well_passes_every_check(
    smoke: pytest.MonkeyPatch, guarded: WeirProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["smoke", "--url", guarded.url, "--admin-url", guarded.admin_url, "--rate-limit-requests", "12"]
    )
    told = capsys.readouterr().out
    assert code == 0, told
    assert [line.split(":")[:2] for line in told.splitlines()] == [
        [check, " good"] for check in ("auth", "chat", "stream", "conversation", "metrics", "limit")
    ]
    assert "429" in told


def test_without_a_limit_there_is_nothing_to_check(
    smoke: pytest.MonkeyPatch, guarded: WeirProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["smoke", "limit", "--url", guarded.url]) == 0
    assert capsys.readouterr().out.startswith("limit: skipped")


def test_a_limit_too_high_to_be_reached_is_left_alone(
    smoke: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["smoke", "limit", "--url", "http://127.0.0.1:9", "--rate-limit-requests", "600"]) == 0
    assert "limit: skipped: a limit of 600" in capsys.readouterr().out


def test_without_a_key_what_needs_one_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, guarded: WeirProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WEIR_API_KEY", raising=False)
    places = ["--url", guarded.url, "--admin-url", guarded.admin_url]
    assert main(["smoke", *places, "--rate-limit-requests", "12"]) == 0
    told = capsys.readouterr().out
    assert [line.split(":")[1].strip() for line in told.splitlines()] == (
        ["good", "skipped", "skipped", "skipped", "good", "skipped"]
    )
    assert told.count("WEIR_API_KEY") == 4


def test_a_stranger_at_the_address_is_told_apart(
    smoke: pytest.MonkeyPatch, upstream: FakeUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something that speaks HTTP and is no Weir: each check fails by itself, with words and no traceback."""
    assert main(["smoke", "--url", upstream.base_url, "--admin-url", upstream.base_url]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == (
        ["auth", "chat", "stream", "conversation", "metrics", "limit"]
    )
    assert all("FAILED" in line for line in lines[:5])
    upstream.errors.clear()


def test_an_open_door_is_noticed(smoke: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with RunningWeir(configuration()) as weir:
        assert main(["smoke", "auth", "--url", weir.url]) == 1
    assert "without a key was let in" in capsys.readouterr().out


def test_a_wrong_key_and_a_stream_without_end_are_noticed(
    smoke: pytest.MonkeyPatch, upstream: FakeUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = (KeyConfig(name="other", sha256=hash_key("weir-other")),)
    with RunningWeir(configuration(keys=keys)) as weir:
        assert main(["smoke", "chat", "--url", weir.url]) == 1
        assert "not known here" in capsys.readouterr().out
    with RunningWeir(configuration(simulator_tokens_per_second=10_000)) as weir:
        assert main(["smoke", "stream", "--model", "sim-no-done", "--url", weir.url]) == 1
        assert "did not end with [DONE]" in capsys.readouterr().out


def test_a_limit_that_does_not_hold_is_noticed(
    smoke: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunningWeir(configuration(simulator_tokens_per_second=10_000)) as weir:
        assert main(["smoke", "limit", "--url", weir.url, "--rate-limit-requests", "3"]) == 1
    assert "7 requests got through a limit of 3" in capsys.readouterr().out


def test_nobody_there_is_told_with_the_address(
    smoke: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["smoke", "chat", "metrics", "--url", "http://127.0.0.1:9", "--admin-url", "http://127.0.0.1:9"])
        == 1
    )
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert all("FAILED" in line and "http://127.0.0.1:9" in line for line in told)


def test_a_pod_that_has_just_ended_is_waited_out(
    guarded: WeirProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its address is told for a while, and whoever calls it hears nothing. DNS is what cannot be here."""
    port = urlsplit(guarded.admin_url).port
    asked: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        if host != "weir-metrics.test":
            return real(host, *rest, **options)
        asked.append(host)
        hosts = ["127.0.0.1", "127.0.0.2"] if len(asked) == 1 else ["127.0.0.1"]
        return [found for one in hosts for found in real(one, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.2", port or 0)):
        code = main(
            ["smoke", "metrics", "--url", guarded.url, "--admin-url", f"http://weir-metrics.test:{port}"]
        )
    told = capsys.readouterr().out
    assert code == 0, told
    assert "1 of 1 addresses show metrics" in told
    assert len(asked) == 2


def test_a_check_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "taste"]) == 78
    assert "no check 'taste'" in capsys.readouterr().err
