"""The sums agree: requests in metrics, records in the ledger, canonical log lines; tokens and dollars too."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from tests.observability.asking import CHAT, EMBEDDINGS, GENERATE, RESPONSES, TURN, TURN_STREAM, used
from tests.observability.run import Run

ROUTES = {CHAT, EMBEDDINGS, RESPONSES, TURN, TURN_STREAM, GENERATE}


def lines(run: Run) -> list[dict[str, Any]]:
    """The canonical lines of requests to models, of all pods."""
    return [line for pod in run.lines for line in pod.requests if line["route"] in ROUTES]


def opened(run: Run) -> list[dict[str, Any]]:
    """Those of requests that came as far as to be about a model: with a key, and through the door."""
    return [line for line in lines(run) if "operation" in line]


def test_every_request_is_in_every_book_once(traffic_run: Run) -> None:
    asked = len(traffic_run.truth.asked)
    assert traffic_run.samples.sum("weir_requests_total") == asked
    assert len(lines(traffic_run)) == asked
    assert len(traffic_run.ledger) == len(opened(traffic_run))
    assert len({record["id"] for record in traffic_run.ledger}) == len(traffic_run.ledger)
    assert traffic_run.usage["totals"]["requests"] == len(traffic_run.ledger)


def test_only_strangers_and_the_turned_away_have_no_record(traffic_run: Run) -> None:
    without = Counter(
        (line["outcome"], line["status"]) for line in lines(traffic_run) if "operation" not in line
    )
    assert set(without) == {("client_error", 401), ("overloaded", 503)}
    assert without[("client_error", 401)] == sum(ask.wrong_key for ask, _ in traffic_run.truth.asked)


def test_outcomes_agree(traffic_run: Run) -> None:
    by_line = Counter((line["outcome"],) for line in lines(traffic_run))
    assert by_line == traffic_run.samples.by("weir_requests_total", "outcome")
    by_record = Counter(record["outcome"] for record in traffic_run.ledger)
    assert by_record == Counter(line["outcome"] for line in opened(traffic_run))


def test_each_pod_agrees_with_its_own_lines(traffic_run: Run) -> None:
    for pod in traffic_run.lines:
        told = Counter((line["outcome"],) for line in pod.requests if line["route"] in ROUTES)
        assert told == traffic_run.per_pod[pod.pod].by("weir_requests_total", "outcome"), pod.pod


def test_each_record_has_what_its_request_used(traffic_run: Run) -> None:
    """One by one: the caller's own id is in the record."""
    records = {record["request_id"]: record for record in traffic_run.ledger}
    different = []
    for ask, seen in traffic_run.truth.asked:
        record = records.get(seen.request_id)
        if record is None:
            continue  # it had no key, or found the door shut
        tokens = used(ask, seen)
        usage = record.get("usage") or {}
        wanted = (seen.outcome, *((tokens.input, tokens.output) if tokens is not None else (0, 0)))
        found = (record["outcome"], usage.get("input_tokens", 0), usage.get("output_tokens", 0))
        if wanted != found:
            different.append((wanted, found, ask, seen, record))
    assert not different


@pytest.mark.parametrize(
    ("metric", "field"),
    [
        ("gen_ai_client_inference_usage_input_tokens_total", "input_tokens"),
        ("gen_ai_client_inference_usage_output_tokens_total", "output_tokens"),
    ],
)
def test_tokens_agree(traffic_run: Run, metric: str, field: str) -> None:
    counted = traffic_run.samples.sum(metric)
    assert sum((record.get("usage") or {}).get(field, 0) for record in traffic_run.ledger) == counted
    assert sum(line.get(field, 0) for line in lines(traffic_run)) == counted
    assert traffic_run.usage["totals"][field] == counted


def test_dollars_agree(traffic_run: Run) -> None:
    """To a billionth, which is what the ledger counts in."""
    nano = Decimal("0.000000001")

    def exact(value: float) -> Decimal:
        return Decimal(value).quantize(nano)

    counted = exact(traffic_run.samples.sum("weir_cost_usd_total"))
    records = sum((exact(record["cost"]["usd"] or 0.0) for record in traffic_run.ledger), Decimal(0))
    told = sum((exact(line.get("cost_usd") or 0.0) for line in lines(traffic_run)), Decimal(0))
    assert records == told == counted
    assert exact(traffic_run.usage["totals"]["cost_usd"]) == counted


def test_dollars_of_each_tenant_agree_with_its_report(traffic_run: Run) -> None:
    metered = traffic_run.samples.by("weir_cost_usd_total", "tenant")
    for row in traffic_run.usage["rows"]:
        assert row["cost_usd"] == pytest.approx(metered[(row["tenant"],)], abs=1e-9), row["tenant"]
