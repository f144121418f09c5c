"""The Dockerfile keeps its promises, as far as its text shows; hadolint reads it in `make check`."""

from __future__ import annotations

import json
import re

import pytest

from docs.generate import ROOT

LINES = [
    line
    for line in re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]
STARTS = [i for i, line in enumerate(LINES) if line.startswith("FROM ")]
STAGES = {
    LINES[start].split()[-1]: LINES[start:end]
    for start, end in zip(STARTS, [*STARTS[1:], len(LINES)], strict=True)
}
FINAL = list(STAGES)[-1]


def lines(target: str) -> list[str]:
    """What makes this target: its own lines after those of the stage that it starts from."""
    base = STAGES[target][0].split()[1]
    return [*(lines(base) if base in STAGES else []), *STAGES[target]]


def instruction(name: str, target: str = FINAL) -> str:
    """The last one wins, as it does for the builder."""
    return [line.partition(" ")[2] for line in lines(target) if line.startswith(name + " ")][-1]


def test_the_base_is_an_argument_for_every_stage() -> None:
    assert "ARG BASE_IMAGE=python:3.13-slim" in LINES
    assert list(STAGES) == ["dependencies", "reload", "runtime", "dev", "production"]
    for stage in STAGES:
        assert lines(stage)[0].split()[1] == "${BASE_IMAGE}"


def test_what_is_built_when_no_target_is_named_is_for_production() -> None:
    assert FINAL == "production"
    assert not [line for line in lines(FINAL) if "reload" in line]


@pytest.mark.parametrize("target", ["dev", "production"])
def test_it_runs_as_a_numbered_user_who_is_not_root(target: str) -> None:
    assert instruction("USER", target) == "10001:10001"


def test_signals_arrive_because_nothing_is_between() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == ["python3", "-m", "service"]


def test_the_dev_target_is_the_same_with_a_watcher_of_a_source_that_its_user_owns() -> None:
    shared = lines("runtime")
    assert lines("dev")[: len(shared)] == lines("production")[: len(shared)] == shared
    command = json.loads(instruction("ENTRYPOINT", "dev"))
    assert command[:3] == ["/opt/reload/bin/python3", "-m", "watchfiles"]
    assert command[-2:] == [" ".join(json.loads(instruction("ENTRYPOINT"))), "service"]
    assert instruction("COPY", "dev") == "--chown=10001:10001 service service"
    assert "RUN chown 10001:10001 /app" in lines("dev")


def test_in_production_the_source_belongs_to_root_and_has_its_byte_code() -> None:
    assert instruction("COPY") == "service service"
    assert instruction("RUN") == "python3 -m compileall -q service"


def test_it_has_a_health_check_and_says_what_it_is() -> None:
    assert "CMD [" in instruction("HEALTHCHECK")
    for label in ("title", "description", "licenses", "version"):
        assert f"org.opencontainers.image.{label}" in instruction("LABEL")


@pytest.mark.parametrize("target", ["dev", "production"])
def test_dependencies_are_a_layer_before_the_source(target: str) -> None:
    assert "COPY --from=dependencies /opt/weir /opt/weir" in lines("runtime")
    source = [line for line in lines(target) if line.startswith("COPY") and line.endswith("service service")]
    assert len(source) == 1
    assert source[0] in STAGES[target]
    assert "--require-hashes" not in "\n".join(STAGES[target])


def test_only_what_it_needs_is_sent_to_the_builder() -> None:
    kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert kept == ["!service", "!requirements/runtime.txt", "!requirements/reload.txt"]


def test_each_stage_installs_what_is_locked_and_leaves_no_pip() -> None:
    for stage, locked in (("dependencies", "runtime.txt"), ("reload", "reload.txt")):
        assert instruction("COPY", stage) == f"requirements/{locked} ."
        install = [line for line in STAGES[stage] if "pip install" in line]
        assert len(install) == 1
        for part in (f"--require-hashes --no-deps -r {locked}", "pip uninstall --yes"):
            assert part in install[0]


def test_locked_requirements_have_hashes_and_name_no_registry() -> None:
    for file in (ROOT / "requirements").glob("*.txt"):
        text = file.read_text()
        pinned = re.findall(r"^([a-z0-9-]+)(?:\[.*?\])?==", text, re.MULTILINE)
        assert pinned
        assert text.count("--hash=sha256:") >= len(pinned)
        assert "://" not in text
        assert "--index-url" not in text
