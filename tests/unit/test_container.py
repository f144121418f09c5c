"""The Dockerfile keeps its promises, as far as its text shows; hadolint reads it in `make check`."""

from __future__ import annotations

import json
import re

from docs.generate import ROOT

LINES = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
STAGES = [i for i, line in enumerate(LINES) if line.startswith("FROM ")]
FINAL = LINES[STAGES[-1] :]


def instruction(name: str) -> str:
    return next(line.partition(" ")[2] for line in FINAL if line.startswith(name + " "))


def test_the_base_is_an_argument_for_every_stage() -> None:
    assert "ARG BASE_IMAGE=python:3.13-slim" in LINES
    assert len(STAGES) >= 2
    assert all(LINES[i].split()[1] == "${BASE_IMAGE}" for i in STAGES)


def test_it_runs_as_a_numbered_user_who_is_not_root() -> None:
    user, _, group = instruction("USER").partition(":")
    assert user.isdigit()
    assert group.isdigit()
    assert int(user) == 10001


def test_signals_arrive_because_nothing_is_between() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == ["python3", "-m", "service"]


def test_it_has_a_health_check_and_says_what_it_is() -> None:
    assert "CMD [" in instruction("HEALTHCHECK")
    for label in ("title", "description", "licenses", "version"):
        assert f"org.opencontainers.image.{label}" in instruction("LABEL")


def test_dependencies_are_a_layer_before_the_source() -> None:
    text = "\n".join(LINES)
    assert text.index("--require-hashes") < text.index("COPY service")


def test_only_what_it_needs_is_sent_to_the_builder() -> None:
    kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert kept == ["!service", "!requirements/runtime.txt"]


def test_locked_requirements_have_hashes_and_name_no_registry() -> None:
    for file in (ROOT / "requirements").glob("*.txt"):
        text = file.read_text()
        pinned = re.findall(r"^([a-z0-9-]+)(?:\[.*?\])?==", text, re.MULTILINE)
        assert len(pinned) > 20
        assert text.count("--hash=sha256:") >= len(pinned)
        assert "://" not in text
        assert "--index-url" not in text
