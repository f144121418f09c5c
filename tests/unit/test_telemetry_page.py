"""The page of metrics: it says what prometheus-client's own says, with exemplars where there are any."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Info, Summary, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.samples import Sample

from service.domain import AttemptKind, Outcome
from service.errors import UpstreamUnavailable
from service.telemetry import exposition
from service.telemetry.instruments import Counter, Gauge, Histogram
from service.telemetry.page import SLICE_LINES
from tests.crowd import record
from tests.unit.test_telemetry import Measured

MOST_LETTERS = 128
"""Of an exemplar's labels together, as OpenMetrics allows."""
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

Families = dict[str, tuple[str, str, set[tuple[Any, ...]]]]


def comparable(families: Iterable[Metric]) -> Families:
    """What a scraper understands: kinds, texts and samples, whatever their order."""
    return {
        family.name: (
            family.type,
            family.documentation,
            {(s.name, frozenset(s.labels.items()), repr(s.value), _exemplar(s)) for s in family.samples},
        )
        for family in families
        if not family.name.startswith("process_")  # its values change from one page to the next
    }


def _exemplar(sample: Sample) -> tuple[Any, ...] | None:
    told = sample.exemplar
    return (tuple(told.labels.items()), told.value, str(told.timestamp)) if told is not None else None


def page(registry: CollectorRegistry, accept: str = "") -> str:
    return exposition(registry)(accept)[0].decode()


def as_the_library_says(registry: CollectorRegistry) -> None:
    ours, theirs = page(registry), generate_latest(registry).decode()
    assert comparable(parse_text(ours)) == comparable(parse_text(theirs))
    ours, theirs = page(registry, OPENMETRICS), generate_openmetrics(registry).decode()
    assert comparable(parse_openmetrics(ours)) == comparable(parse_openmetrics(theirs))


def busy() -> Measured:
    """With a sample of nearly everything."""
    measured = Measured("asked", "answered")
    for sampled in (True, False):
        measured.metrics.attempted(
            record(sampled=sampled, trace_id=TRACE), None, AttemptKind.FIRST, 0.25, "answered"
        )
        measured.metrics.attempted(
            record(stream=True, sampled=sampled, trace_id=TRACE), None, AttemptKind.FIRST, 0.25, "answered"
        )
        measured.went(
            sampled=sampled,
            trace_id=TRACE,
            duration_seconds=0.5,
            time_to_first_token_seconds=0.3,
            time_per_output_token_seconds=0.02,
            overhead_seconds=0.002,
        )
    measured.went(outcome=Outcome.TIMEOUT, duration_seconds=1000.0)
    measured.metrics.attempted(record(), UpstreamUnavailable("no"), AttemptKind.RETRY, 2.0)
    measured.metrics.http("POST", "/v1/chat/completions", 200, 0.25)
    measured.metrics.beat(0.125, waiting=3, places=512)
    return measured


def test_a_scraper_reads_what_the_librarys_own_page_says() -> None:
    as_the_library_says(busy().registry)


def test_other_collectors_are_on_the_page_too() -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Summary("took_seconds", "Some.", ["a"], registry=registry).labels("x").observe(1.5)
    Info("built", "Some.", registry=registry).info({"by": "us"})

    class Own:
        def collect(self) -> Iterator[Metric]:
            family = GaugeMetricFamily("own", 'Some "own"\nwith \\ in it.', labels=["a"])
            family.add_metric(['q"\n\\'], 2.5)
            yield family

    registry.register(Own())
    as_the_library_says(registry)
    assert "process_open_fds" in page(registry)


@given(st.dictionaries(st.text(max_size=12), st.floats(), max_size=5))
def test_any_label_and_any_number_come_through(values: dict[str, float]) -> None:
    values = {label: value for label, value in values.items() if label.isascii() or label.isprintable()}
    registry = CollectorRegistry()
    gauge = Gauge("some", "Some.", ["a"], registry=registry)
    for label, value in values.items():
        gauge.labels(label).set(value)
    (family,) = parse_text(page(registry).replace("\r", "?"))
    found = {sample.labels["a"]: sample.value for sample in family.samples}
    assert found.keys() == {label.replace("\r", "?") for label in values}
    for label, value in values.items():
        seen = found[label.replace("\r", "?")]
        assert seen == value or (math.isnan(seen) and math.isnan(value)) or "\r" in label


@given(st.lists(st.floats(min_value=0, max_value=1e9), max_size=30))
def test_a_histogram_counts_as_the_librarys_does(amounts: list[float]) -> None:
    registry = CollectorRegistry()
    ours = Histogram("ours", "Some.", buckets=(0.1, 1.0, 10.0), registry=registry)
    for amount in (*amounts, 0.1, 1.0, 10.0):
        ours.observe(amount)
    (family,) = registry.collect()
    for bound in (0.1, 1.0, 10.0, math.inf):
        edge = "+Inf" if bound == math.inf else str(bound)
        (count,) = (s.value for s in family.samples if s.labels.get("le") == edge)
        assert count == sum(amount <= bound for amount in (*amounts, 0.1, 1.0, 10.0))
    as_the_library_says(registry)


def test_one_observation_may_stand_for_several() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("some", "Some.", buckets=(1.0,), registry=registry)
    histogram.observe(0.5, times=4)
    assert registry.get_sample_value("some_count") == 4
    assert registry.get_sample_value("some_sum") == 2.0
    assert registry.get_sample_value("some_bucket", {"le": "1.0"}) == 4


# -- exemplars -----------------------------------------------------------------------------------


def exemplars(measured: Measured) -> dict[str, set[str]]:
    """Samples' names, with the trace ids of their exemplars."""
    found: dict[str, set[str]] = {}
    for family in parse_openmetrics(page(measured.registry, OPENMETRICS)):
        for sample in family.samples:
            if sample.exemplar is not None:
                assert sum(map(len, itertools.chain(*sample.exemplar.labels.items()))) <= MOST_LETTERS
                found.setdefault(sample.name, set()).add(sample.exemplar.labels["trace_id"])
    return found


def test_what_is_sampled_leaves_its_trace() -> None:
    names = {
        "weir_requests_total",
        "gen_ai_server_request_duration_seconds_bucket",
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "gen_ai_server_time_per_output_token_seconds_bucket",
        "gen_ai_client_inference_duration_seconds_bucket",
        "gen_ai_client_inference_time_to_first_chunk_seconds_bucket",
        "weir_overhead_seconds_bucket",
    }
    assert exemplars(busy()) == {name: {TRACE} for name in names}


def test_an_exemplar_stands_in_the_bucket_of_its_value() -> None:
    measured = Measured()
    measured.went(sampled=True, trace_id=TRACE, duration_seconds=0.5)
    before = time.time()
    (told,) = (
        (sample.labels["le"], sample.exemplar)
        for family in parse_openmetrics(page(measured.registry, OPENMETRICS))
        for sample in family.samples
        if sample.exemplar is not None and sample.name.endswith("_bucket")
    )
    assert told[0] == "0.64"
    assert told[1].value == 0.5
    assert before - 60 < float(told[1].timestamp) <= time.time()


def test_what_is_not_sampled_leaves_none() -> None:
    measured = Measured()
    measured.went(sampled=False, trace_id=TRACE)
    measured.went(sampled=True, trace_id=None)
    assert exemplars(measured) == {}


def test_the_text_format_has_no_exemplars() -> None:
    text = page(busy().registry)
    assert TRACE not in text
    assert list(parse_text(text))


# -- the page as such ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "kind", "end"),
    [
        (OPENMETRICS, "application/openmetrics-text", "# EOF\n"),
        ("application/openmetrics-text", "application/openmetrics-text", "# EOF\n"),
        ("text/plain", "text/plain", "\n"),
        ("", "text/plain", "\n"),
        ("*/*", "text/plain", "\n"),
    ],
)
def test_the_page_is_written_as_the_scraper_asks(accept: str, kind: str, end: str) -> None:
    measured = busy()
    text, content_type = exposition(measured.registry)(accept)
    assert content_type.startswith(kind)
    assert text.decode().endswith(end)
    assert text.decode().endswith("# EOF\n") is (kind != "text/plain")
    assert b"weir_requests_total{" in text
    assert b"_created" not in text
    assert b"process_open_fds" in text


def test_a_long_page_is_whole_though_it_is_written_in_parts() -> None:
    registry = CollectorRegistry()
    counter = Counter("some_total", "Some.", ["a"], registry=registry)
    for number in range(3 * SLICE_LINES + 7):
        counter.labels(str(number)).inc(number)
    (family,) = parse_text(page(registry))
    assert {s.labels["a"]: s.value for s in family.samples} == {
        str(number): number for number in range(3 * SLICE_LINES + 7)
    }


def test_a_long_page_lets_others_run_meanwhile() -> None:
    rests: list[float] = []
    registry = CollectorRegistry()
    counter = Counter("some_total", "Some.", ["a"], registry=registry)
    for number in range(3 * SLICE_LINES + 7):
        counter.labels(str(number))
    exposition(registry, rests.append)("")
    assert len(rests) == 3
    assert all(rest > 0 for rest in rests), "a sleep of 0 need not let anybody run"


def test_what_is_counted_while_a_page_is_written_breaks_nothing() -> None:
    measured = Measured()
    failures: list[BaseException] = []
    stop = threading.Event()

    def scrape() -> None:
        read: Callable[[str], Any] = exposition(measured.registry)
        while not stop.is_set():
            try:
                list(parse_openmetrics(read(OPENMETRICS)[0].decode()))
            except Exception as error:
                failures.append(error)
                return

    scraper = threading.Thread(target=scrape)
    scraper.start()
    for number in range(150):
        measured.went(request_model=f"m-{number}", response_model=f"m-{number}", duration_seconds=0.1)
    stop.set()
    scraper.join()
    assert failures == []
