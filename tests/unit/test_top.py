"""The terminal view's arithmetic, what it makes of scrapes, and its picture at any size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from dashboards.queries import BAD, VALID
from service.domain import CALLERS_FAULTS, FAULTS, Outcome
from service.top import screen as pictures
from service.top.figures import Series, added, buckets, increases, quantile, ratio
from service.top.run import NobodyAnswers, top
from service.top.scraping import Away, Round, metrics_url, read
from service.top.screen import screen
from service.top.watch import (
    Budget,
    Circuit,
    Model,
    Pod,
    Quantiles,
    Report,
    Tenant,
    Watch,
)
from service.top.watch import Outcome as OutcomeRate
from tests.running import ROOT, free_port

EDGES = (0.1, 0.5, 1.0, 2.5, 5.0)
BUILD = 'weir_build_info{version="1.0"} 1.0\n'
A = Series("a_total", ())


# -- arithmetic ----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=20))
def test_a_counter_that_begins_anew_loses_nothing_that_was_seen(steps: list[tuple[bool, int]]) -> None:
    value, counted, sum_of_steps = 0, 0.0, 0.0
    for again, more in steps:
        assume(not again or more < value or value == 0)  # else nobody can see that it began anew
        before, value = value, more if again else value + more
        counted += more
        sum_of_steps += increases({A: before}, {A: value})[A]
    assert sum_of_steps == counted


@given(
    st.dictionaries(st.integers(0, 9), st.floats(0, 1e9)),
    st.dictionaries(st.integers(0, 9), st.floats(0, 1e9)),
)
def test_nothing_ever_falls(before: dict[int, float], after: dict[int, float]) -> None:
    def series(values: dict[int, float]) -> dict[Series, float]:
        return {Series(str(number), ()): value for number, value in values.items()}

    risen = increases(series(before), series(after))
    assert risen.keys() == series(after).keys()
    assert all(value >= 0 for value in risen.values())


def histogram(observations: list[float]) -> dict[float, float]:
    return {edge: float(sum(o <= edge for o in observations)) for edge in (*EDGES, math.inf)}


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=60), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_observation_of_its_rank(
    observations: list[float], q: float
) -> None:
    found = quantile(q, histogram(observations))
    wanted = sorted(observations)[max(math.ceil(q * len(observations)) - 1, 0)]
    assert found is not None
    if wanted > EDGES[-1]:
        assert found == EDGES[-1], "above the highest edge nobody knows"
    else:
        upper = next(edge for edge in EDGES if wanted <= edge)
        lower = max((edge for edge in EDGES if edge < wanted), default=0.0)
        assert lower <= found <= upper


@given(st.lists(st.floats(0.001, 10), min_size=1), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_higher_share_is_no_lower_quantile(observations: list[float], one: float, other: float) -> None:
    low, high = (quantile(q, histogram(observations)) for q in sorted((one, other)))
    assert low is not None
    assert high is not None
    assert low <= high


@given(st.lists(st.floats(0.001, 10)), st.lists(st.floats(0.001, 10)))
def test_two_pods_together_are_one_that_saw_all(one: list[float], other: list[float]) -> None:
    def values(observations: list[float]) -> dict[Series, float]:
        return {
            Series("h_bucket", (("le", str(edge)),)): count for edge, count in histogram(observations).items()
        }

    assert buckets(added([values(one), values(other)]), "h") == histogram(one + other)


@pytest.mark.parametrize(
    ("cumulative", "q", "value"),
    [
        ({}, 0.5, None),
        ({1.0: 0.0, math.inf: 0.0}, 0.5, None),
        ({1.0: 10.0, math.inf: 10.0}, 0.5, 0.5),
        ({1.0: 0.0, 2.0: 10.0, math.inf: 10.0}, 0.95, 1.95),
        ({1.0: 5.0, 2.0: 10.0, math.inf: 20.0}, 0.95, 2.0),
        ({math.inf: 3.0}, 0.5, 0.0),
        ({1.0: 10.0, 2.0: 8.0, math.inf: 10.0}, 0.5, 0.5),
    ],
)
def test_quantiles_by_hand(cumulative: dict[float, float], q: float, value: float | None) -> None:
    assert quantile(q, cumulative) == (None if value is None else pytest.approx(value))


def test_a_ratio_of_nothing_is_none() -> None:
    assert ratio(0, 0) is None
    assert ratio(1, 4) == 0.25


# -- scrapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:9000", "http://127.0.0.1:9000/metrics"),
        ("http://pod:9000", "http://pod:9000/metrics"),
        ("https://pod/", "https://pod/metrics"),
        ("http://[::1]:9000", "http://[::1]:9000/metrics"),
        ("http://pod:9000/weir/metrics", "http://pod:9000/weir/metrics"),
    ],
)
def test_an_address_is_taken_as_people_write_it(text: str, url: str) -> None:
    assert metrics_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "http://", "ftp://pod", "http://pod:0", "http://pod:port", "http://[::1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        metrics_url(text)


def test_only_what_is_needed_is_read() -> None:
    text = (
        BUILD + '# TYPE weir_requests counter\nweir_requests_total{outcome="success",route="/x"} 4.0\n'
        'weir_event_loop_lag_seconds NaN\nhttp_requests_total{handler="x"} 3.0\nnonsense with "quotes\n'
    )
    assert read(text) == {
        Series("weir_build_info", (("version", "1.0"),)): 1.0,
        Series("weir_requests_total", (("outcome", "success"), ("route", "/x"))): 4.0,
    }


@pytest.mark.parametrize("text", ["", "<html>hello</html>", "up 1\n", 'weir_build_info{version="1.0" 1.0\n'])
def test_what_has_no_metrics_of_weir_is_away(text: str) -> None:
    with pytest.raises(Away):
        read(text)


def test_who_does_not_answer_is_away_and_the_others_are_there(tmp_path: Any) -> None:
    port = free_port()
    asked = Round([f"http://127.0.0.1:{port}/metrics", "http://no-such-host.invalid/metrics"])
    asked.wait()
    refused, unknown = asked.answers.values()
    assert str(refused) == "connection refused"
    assert isinstance(unknown, Away)


def test_where_nobody_answers_it_is_said_what_to_do() -> None:
    url = f"http://127.0.0.1:{free_port()}/metrics"
    with pytest.raises(NobodyAnswers, match=r"refused[\s\S]*kubectl port-forward deploy/weir 9000"):
        top([url], interval_seconds=1, once=True, as_json=False)


# -- the report ----------------------------------------------------------------------------------


def pod(began: float = 1.0, **values: float) -> dict[Series, float]:
    """A pod that has counted requests by outcome."""
    text = f"{BUILD}process_start_time_seconds {began}\n"
    text += "weir_inflight_requests 5.0\nweir_queue_requests 3.0\nweir_concurrency_limit 10.0\n"
    text += "".join(f'weir_requests_total{{outcome="{name}"}} {n}\n' for name, n in values.items())
    return read(text)


def watched(*rounds: Mapping[str, Any], step: float = 10.0, window: float = 1_000.0) -> Report:
    watch = Watch(list(rounds[0]), window)
    for number, answers in enumerate(rounds):
        watch.take(number * step, answers)
    return watch.report(0.0)


def test_outcomes_are_told_apart_as_the_objectives_do() -> None:
    assert FAULTS | CALLERS_FAULTS | {Outcome.SUCCESS} == set(Outcome)
    assert not FAULTS & CALLERS_FAULTS
    rules = (ROOT / "helm/weir/files/rules/slo.yaml").read_text()
    told = re.findall(r'weir_requests_total\{(outcome[!=]~"[^"]+")', rules)
    assert {split(text) for text in told} == {("=~", FAULTS), ("!~", CALLERS_FAULTS)}
    assert [split(BAD), split(VALID)] == [("=~", FAULTS), ("!~", CALLERS_FAULTS)]


def split(matcher: str) -> tuple[str, frozenset[str]]:
    """The operator of a matcher of outcomes, and those that it names."""
    operator, names = matcher.removeprefix("outcome").split('"')[:2]
    return operator, frozenset(names.split("|"))


def test_pods_are_summed() -> None:
    report = watched({"a": pod(success=10), "b": pod(success=1)}, {"a": pod(success=20), "b": pod(success=6)})
    assert report.requests_per_second == 1.5
    assert (report.running, report.queued, report.places) == (4.0, 6.0, 20.0)
    assert report.versions == {"1.0": 2}


def test_callers_faults_are_in_no_error_ratio() -> None:
    after = pod(success=6, timeout=2, client_error=90, rate_limited=2)
    report = watched({"a": pod()}, {"a": after})
    assert report.error_ratio == 0.25
    assert [(o.outcome, o.per_second, o.share) for o in report.outcomes[:2]] == [
        ("client_error", 9.0, 0.9),
        ("success", 0.6, 0.06),
    ]


def test_quick_failures_make_no_answer_faster() -> None:
    def took(error: str, seconds: str, count: int) -> str:
        labels = f'error_type="{error}",le='
        name = "gen_ai_server_request_duration_seconds_bucket"
        return f'{name}{{{labels}"{seconds}"}} {count}\n{name}{{{labels}"+Inf"}} {count}\n'

    after = read(BUILD + took("", "8.0", 2) + took("rate_limit_exceeded", "0.1", 98))
    assert watched({"a": read(BUILD)}, {"a": after}).duration_seconds == Quantiles(p50=4.0, p95=7.6)


def test_nothing_valid_is_no_error_ratio() -> None:
    assert watched({"a": pod()}, {"a": pod(client_error=3)}).error_ratio is None


def test_a_new_process_in_the_same_place_counts_from_nothing() -> None:
    report = watched({"a": pod(1.0, success=10)}, {"a": pod(2.0, success=30)})
    assert report.requests_per_second == 3.0


def test_a_pod_that_is_away_is_told_and_the_others_go_on() -> None:
    gone = Away("connection refused")
    report = watched({"a": pod(success=1), "b": pod(success=1)}, {"a": pod(success=11), "b": gone})
    assert report.requests_per_second == 1.0
    assert [(p.url, p.away) for p in report.pods] == [("a", None), ("b", "connection refused")]
    assert report.places == 10.0


def test_what_a_pod_counted_while_it_was_away_makes_no_peak() -> None:
    gone = Away("connection refused")
    report = watched({"a": pod(success=1)}, {"a": gone}, {"a": pod(success=1_000)}, {"a": pod(success=1_030)})
    assert report.requests_per_second == 1.0


def test_rates_are_of_the_last_seconds_alone() -> None:
    counts = (0, 1_000, 1_010, 1_020, 1_030)
    report = watched(*({"a": pod(success=n)} for n in counts), step=10.0, window=30.0)
    assert (report.seconds, report.requests_per_second) == (30.0, 1.0)


def test_before_the_second_scrape_nothing_is_known_of_rates() -> None:
    report = watched({"a": pod(success=7)})
    assert (report.seconds, report.requests_per_second, report.outcomes) == (0.0, 0.0, ())
    assert report.duration_seconds == Quantiles(None, None)


STATE = f"""{BUILD}weir_degraded{{feature="limits"}} 1.0
weir_degraded{{feature="cache"}} 0.0
weir_circuit_state{{upstream="main",model="gpt",state="open"}} 1.0
weir_circuit_state{{upstream="main",model="gpt",state="closed"}} 0.0
weir_circuit_state{{upstream="other",model="gpt",state="closed"}} 1.0
weir_budget_used_ratio{{tenant="acme",key="",budget="month"}} USED
weir_event_loop_lag_seconds LAG
"""


def test_the_state_is_that_of_all_pods() -> None:
    one = read(STATE.replace("USED", "0.5").replace("LAG", "0.25"))
    other = read(STATE.replace("USED", "0.75").replace("LAG", "0.125"))
    report = watched({"a": one, "b": other})
    assert report.degraded == ("limits",)
    assert [(c.upstream, c.model, c.state) for c in report.circuits] == [("main", "gpt", "open")]
    assert [(b.tenant, b.key, b.used_ratio) for b in report.budgets] == [("acme", "", 0.75)]
    assert report.loop_lag_seconds == 0.25


# -- the picture ---------------------------------------------------------------------------------


def drawn(report: Report, width: int, height: int | None, hint: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    console.print(screen(report, height, hint))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def crowded(models: int = 60, pods: int = 8) -> Report:
    """Much of everything."""

    def text(count: int) -> str:
        lines = [STATE.replace("USED", "1.25").replace("LAG", "0.3")]
        for n in range(models):
            label = f'gen_ai_request_model="a-model-with-a-rather-long-name-{n}"'
            lines.append(f'weir_requests_total{{{label},outcome="success"}} {count * (n + 1)}\n')
            cost = f'weir_cost_usd_total{{{label},tenant="tenant-{n}"}} {count * (n + 1) / 100}\n'
            budget = f'weir_budget_used_ratio{{tenant="tenant-{n}",key="a-key",budget="month"}} 0.{n:02}\n'
            lines += [cost, budget]
        lines += [f'weir_requests_total{{outcome="{outcome}"}} {count}\n' for outcome in Outcome]
        return "".join(lines)

    here = {f"http://10.0.0.{n}:9000/metrics": read(text(1)) for n in range(pods)}
    later: dict[str, Any] = {url: read(text(2)) for url in here}
    later |= {
        url: Away("it does not answer within 5 s, and this is a long story " * 3) for url in list(here)[1:]
    }
    return watched(here, later)


@pytest.mark.parametrize("size", [(80, 24), (80, 25), (100, 30), (132, 43), (250, 80)])
@pytest.mark.parametrize("many", [0, 1, 60])
def test_it_fits_into_the_terminal(size: tuple[int, int], many: int) -> None:
    width, height = size
    report = crowded(many, max(many // 8, 1))
    lines = drawn(report, width, height, "q ends")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[-1].strip() == "q ends"


def test_a_larger_terminal_shows_more() -> None:
    small, large = (drawn(crowded(), width, height) for width, height in ((80, 24), (160, 60)))
    shown = [sum("a-model-with" in line for line in lines) for lines in (small, large)]
    assert shown[0] >= 4
    assert shown[1] > 2 * shown[0]
    assert any("58" in line and "a-model-with-a-rather-long-name-58" in line for line in large)


def test_the_worst_is_said_first_and_however_small_the_terminal_is() -> None:
    text = "\n".join(drawn(crowded(), 80, 24))
    for what in ("degraded: limits", "circuit open: gpt at main", "1 of 8 pods", "10.0.0.1:9000"):
        assert what in text


def test_without_a_height_all_is_told() -> None:
    text = "\n".join(drawn(crowded(), 200, None))
    assert all(f"a-model-with-a-rather-long-name-{n} " in text for n in range(60))
    assert all(outcome.value in text for outcome in Outcome)


def test_names_that_callers_made_up_command_no_terminal() -> None:
    text = (
        f'{BUILD}weir_requests_total{{gen_ai_request_model="\x1b[2J\x9b\u202eevil[red]",outcome="success"}} '
    )
    lines = drawn(watched({"a": read(f"{text}1\n")}, {"a": read(f"{text}2\n")}), 80, 24)
    picture = "\n".join(lines)
    assert "?[2J??evil[red]" in picture
    assert not set(picture) & {"\x1b", "\x9b", "\u202e"}


def test_before_the_second_scrape_it_says_that_it_measures() -> None:
    lines = drawn(watched({"a": pod(success=7)}), 80, 24)
    assert "measuring" in lines[0]


EXAMPLE = Report(
    at=1_795_600_000.0,
    seconds=30.0,
    pods=(
        Pod("http://10.1.0.17:9000/metrics", None),
        Pod("http://10.1.0.18:9000/metrics", None),
        Pod("http://10.1.0.23:9000/metrics", "connection refused"),
    ),
    versions={"1.4.2": 2},
    requests_per_second=42.7,
    error_ratio=0.0042,
    outcomes=(
        OutcomeRate("success", 40.9, 0.958),
        OutcomeRate("rate_limited", 1.2, 0.028),
        OutcomeRate("client_disconnected", 0.43, 0.01),
        OutcomeRate("upstream_error", 0.17, 0.004),
    ),
    time_to_first_token_seconds=Quantiles(0.31, 1.24),
    duration_seconds=Quantiles(2.8, 9.6),
    input_tokens_per_second=38_400.0,
    output_tokens_per_second=12_600.0,
    usd_per_hour=58.31,
    unpriced_per_second=0.0,
    cache_hit_ratio=0.184,
    running=121.0,
    queued=0.0,
    places=1024.0,
    loop_lag_seconds=0.002,
    models=(
        Model("gpt-4o", 11.9, 16_300.0, 41.8),
        Model("claude-sonnet-4-5", 3.1, 4_700.0, 12.4),
        Model("gpt-4o-mini", 24.6, 28_900.0, 4.11),
        Model("llama-3.3-70b", 3.1, 1_100.0, 0.0),
    ),
    tenants=(Tenant("shop", 44.02), Tenant("search", 12.6), Tenant("default", 1.69)),
    degraded=("limits",),
    circuits=(Circuit("azure-west", "gpt-4o", "open"),),
    budgets=(Budget("shop", "", "month", 0.83), Budget("search", "batch", "day", 0.41)),
)


def test_the_page_shows_it_as_it_is() -> None:
    page = (ROOT / "docs" / "top.md").read_text("utf-8").splitlines()
    title, *rest = [line.rstrip() for line in drawn(EXAMPLE, 80, 24, "q ends")]
    assert title[:-8] in {line.strip()[:-8] for line in page}, "but for the time of day"
    missing = [line for line in rest if f"    {line}".rstrip() not in page]
    assert not missing


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0.00"), (0.014, "0.01"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (999.6, "1.00k")),
        *((12_345, "12.3k"), (999_600, "1.00M"), (2.5e9, "2.50G"), (2.5e13, "25000G")),
    ],
)
def test_rates_have_three_digits(value: float, text: str) -> None:
    assert pictures.rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0004, "0 ms"), (0.25, "250 ms"), (0.9996, "1.0 s"), (83.25, "83.2 s")]
)
def test_seconds_are_read_at_a_glance(value: float | None, text: str) -> None:
    assert pictures.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00"), (0.0123, "0.0123"), (1.5, "1.50"), (1234.5, "1234.50")]
)
def test_small_sums_keep_their_digits(value: float, text: str) -> None:
    assert pictures.money(value) == text
