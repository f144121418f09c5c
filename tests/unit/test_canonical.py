"""The canonical line without a server: which are written, which left out, and that each is of the schema."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any, Final

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from docs import log_schema
from docs.log_schema import EventLine
from service.api.context import RequestContext
from service.canonical import RequestLine, RequestLog, kept
from service.domain import FAULTS, Operation, Outcome, RequestRecord
from service.ports import Trace
from tests.log_lines import LINES, line_of
from tests.running import ROOT

CHAT: Final = "/v1/chat/completions"


def context(request_id: str = "a", **values: Any) -> RequestContext:
    made = RequestContext({"method": "POST", "path": CHAT, "headers": []}, request_id)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def record(**values: Any) -> RequestRecord:
    usual: dict[str, Any] = {
        "id": "1",
        "request_id": "a",
        "route": CHAT,
        "operation": Operation.CHAT,
        "outcome": Outcome.SUCCESS,
    }
    return RequestRecord(**usual | values)


def told(
    log: RequestLog, about: RequestContext, outcome: Outcome = Outcome.SUCCESS, **more: Any
) -> list[dict[str, Any]]:
    """What is written, by structlog's own logger."""
    values: dict[str, Any] = {"route": CHAT, "status": 200, "seconds": 0.5} | more
    with structlog.testing.capture_logs() as lines:
        log.write(about, outcome=outcome, **values)
    return list(map(dict, lines))


def nothing() -> None: ...


def sampling(keep: float, slow_seconds: float = 0.0) -> tuple[RequestLog, list[None]]:
    left_out: list[None] = []
    log = RequestLog(keep=keep, slow_seconds=slow_seconds, sampled=lambda: left_out.append(None))
    return log, left_out


@pytest.mark.parametrize("outcome", Outcome)
def test_the_level_is_that_of_the_outcome(outcome: Outcome) -> None:
    (line,) = told(RequestLog(sampled=nothing), context(), outcome)
    assert line["log_level"] == ("warning" if outcome in FAULTS else "info")


def test_a_status_of_500_is_trouble_whatever_else() -> None:
    assert told(RequestLog(sampled=nothing), context(), status=500)[0]["log_level"] == "warning"


@pytest.mark.parametrize(("seconds", "slow"), [(1.0, False), (1.001, True)])
def test_what_took_longer_than_the_setting_is_slow(seconds: float, slow: bool) -> None:
    (line,) = told(RequestLog(slow_seconds=1.0, sampled=nothing), context(), seconds=seconds)
    assert line.get("slow", False) is slow
    assert line["log_level"] == ("warning" if slow else "info")


def test_with_0_nothing_is_slow() -> None:
    (line,) = told(RequestLog(slow_seconds=0.0, sampled=nothing), context(), seconds=86_400.0)
    assert "slow" not in line


def test_what_is_not_known_is_not_there() -> None:
    (line,) = told(RequestLog(sampled=nothing), context(record=record()))
    assert None not in line.values()
    assert {"cost_usd", "usage_source", "queue_seconds", "response_id"}.isdisjoint(line)
    assert (line["input_tokens"], line["output_tokens"], line["cost_source"]) == (0, 0, "unpriced")


# -- sampling ------------------------------------------------------------------------------------


def test_lines_and_those_left_out_are_all_requests() -> None:
    log, left_out = sampling(0.25)
    lines = [line for n in range(1_000) for line in told(log, context(f"request-{n}"))]
    assert len(lines) + len(left_out) == 1_000
    assert 200 < len(lines) < 300
    assert {line["sample_ratio"] for line in lines} == {0.25}


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_none_and_all(keep: float) -> None:
    log, left_out = sampling(keep)
    lines = [line for n in range(100) for line in told(log, context(f"request-{n}"))]
    assert (len(lines), len(left_out)) == ((100, 0) if keep else (0, 100))
    assert not any("sample_ratio" in line for line in lines)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.SUCCESS])
def test_what_did_not_end_well_is_never_left_out(outcome: Outcome) -> None:
    log, left_out = sampling(0.0)
    (line,) = told(log, context(), outcome)
    assert "sample_ratio" not in line
    assert left_out == []


def test_what_was_slow_is_never_left_out() -> None:
    log, left_out = sampling(0.0, slow_seconds=0.1)
    assert len(told(log, context())) == 1
    assert left_out == []


def test_each_record_of_a_batch_is_told_by_its_own_end() -> None:
    log, left_out = sampling(0.0)
    good, bad = record(id="good"), record(id="bad", outcome=Outcome.UPSTREAM_ERROR, duration_seconds=2.0)
    (line,) = told(log, context(batch=[good, bad], record=good))
    assert (line["id"], line["outcome"], line["duration_seconds"]) == ("bad", "upstream_error", 2.0)
    assert len(left_out) == 1


@given(st.integers(1, 2**128 - 1), st.floats(0, 1))
def test_a_trace_is_chosen_as_opentelemetry_chooses_it(trace_id: int, ratio: float) -> None:
    decision = TraceIdRatioBased(ratio).should_sample(None, trace_id, "a").decision
    assert kept("any", f"{trace_id:032x}", ratio) is (decision is Decision.RECORD_AND_SAMPLE)


@given(st.text(min_size=1, max_size=128), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_share_keeps_a_part_of_what_a_larger_one_keeps(name: str, one: float, two: float) -> None:
    smaller, larger = sorted((one, two))
    assert not kept(name, None, smaller) or kept(name, None, larger)


def test_a_request_of_a_trace_is_chosen_by_the_trace() -> None:
    log, _ = sampling(0.5)
    low, high = Trace("0" * 31 + "1"), Trace("0" * 16 + "f" * 16)
    assert all(told(log, context(f"request-{n}", trace=low)) for n in range(20))
    assert not any(told(log, context(f"request-{n}", trace=high)) for n in range(20))


def test_at_level_debug_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log, left_out = sampling(0.0)
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    assert len(told(log, context())) == 1
    assert left_out == []


# -- as JSON -------------------------------------------------------------------------------------


def test_a_line_is_written_though_an_upstream_uses_letters_that_have_no_json() -> None:
    program = """
from service.logging import configure
configure("info", "json")
from tests.unit.test_canonical import *
log = RequestLog(sampled=nothing)
odd = record(response_model="half a pair: \\ud83d", response_id="fine", upstream_seconds=0.25)
log.write(context(record=odd), route=CHAT, status=200, outcome=Outcome.SUCCESS, seconds=0.5)
log.write(context(record=record()), route=CHAT, status=200, outcome=Outcome.TIMEOUT, seconds=0.5)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    odd, usual = map(line_of, done.stdout.splitlines())
    assert (odd["response_model"], odd["response_id"]) == ("'half a pair: \\ud83d'", "fine")
    assert (odd["upstream_seconds"], odd["outcome"], odd["level"]) == (0.25, "success", "info")
    assert (usual["outcome"], usual["level"]) == ("timeout", "warning")
    assert list(odd)[:3] == list(usual)[:3] == ["timestamp", "level", "event"]


# -- the schema ----------------------------------------------------------------------------------


def test_the_schema_names_every_field_and_what_it_is() -> None:
    parts = log_schema.schema()["$defs"]
    for part, struct in (("RequestLine", RequestLine), ("EventLine", EventLine)):
        fields = parts[part]["properties"]
        assert list(fields) == list(struct.__struct_fields__)
        assert all(field["description"].endswith(".") for field in fields.values())
        assert '"null"' not in json.dumps(parts[part])
    assert parts["RequestLine"]["additionalProperties"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"outcome": "fine"},
        {"level": "error"},
        {"trace_id": None},
        {"timestamp": "yesterday"},
        {"duration_seconds": "0.5"},
    ],
)
def test_the_schema_refuses_what_is_no_line(change: dict[str, Any]) -> None:
    line = {
        "timestamp": "2026-01-01T00:00:00.000000Z",
        "level": "info",
        "event": "request",
        "request_id": "a",
        "method": "GET",
        "route": "none",
        "status": 404,
        "outcome": "client_error",
        "duration_seconds": 0.5,
        "key": "anonymous",
        "tenant": "default",
    }
    assert LINES.is_valid(line)
    assert not LINES.is_valid(line | change)
