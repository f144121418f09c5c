"""The rule files of the chart as the tests read them, and promtool over them."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from service.telemetry import DURATION_BUCKETS
from tests.programs import ROOT, need
from tests.promql import reads

RULES: Final = sorted((ROOT / "helm/weir/files/rules").glob("*.yaml"))
CASES: Final = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
RUNBOOKS: Final = ROOT / "docs/runbooks"

Rule = dict[str, Any]

FIRING: Final = re.compile(r'ALERTS\{alertname="(\w+)"')


_GROUPS: Final = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]


def groups() -> Iterator[dict[str, Any]]:
    yield from _GROUPS


def rules() -> list[Rule]:
    return [rule for group in groups() for rule in group["rules"]]


ALERTS: Final = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDS: Final = {rule["record"] for rule in rules() if "record" in rule}


def promtool(*arguments: str | Path) -> str:
    """What it said; an assertion fails with that where it found something."""
    done = subprocess.run(
        [need("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@functools.cache
def cases() -> tuple[tuple[Path, dict[str, Any], dict[str, Any]], ...]:
    """Each expectation of an alert: its file, its test, the expectation."""
    return tuple(
        (path, test, expectation)
        for path in CASES
        for test in yaml.safe_load(path.read_text())["tests"]
        for expectation in test["promql_expr_test"]
        if FIRING.search(expectation["expr"])
    )


def edges_of(made: Mapping[str, Rule]) -> dict[str, set[str]]:
    """The edges of buckets that rules read, by the bucket's name."""
    found: dict[str, set[str]] = {}
    for rule in made.values():
        for read in reads(rule["expr"]):
            if "le" in read.matchers:
                found.setdefault(read.name, set()).add(read.matchers["le"])
    return found


def next_edge(seconds: float) -> str:
    """The first edge of the buckets of durations that is not below."""
    return str(min(edge for edge in DURATION_BUCKETS if edge >= seconds))
