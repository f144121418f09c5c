"""All metrics of a process that serves: names, labels, buckets, and how many series each may have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector
from prometheus_fastapi_instrumentator import metrics as instrumentator

from service.overload import Priority, Shed
from service.telemetry.instruments import Counter, Gauge, Histogram
from service.telemetry.labels import Bounded, Room

MOST_SERIES: Final = 20_000
"""Of all metrics together: what the rooms below have, and what is there in any case."""
WORK_SERIES: Final = 10_500
COST_SERIES: Final = 3_600
FAILED_SERIES: Final = 700
LEFT_SERIES: Final = 475
KEY_SERIES: Final = 900
BUDGET_SERIES: Final = 300

DURATION_BUCKETS: Final = (*(0.01 * 2**n for n in range(14)), 163.84, 327.68)
FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
PER_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKEN_BUCKETS: Final = tuple(4.0**n for n in range(14))
HTTP_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
OVERHEAD_BUCKETS: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
QUEUE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

MODEL: Final = "gen_ai_request_model"
ANSWERED_BY: Final = "gen_ai_response_model"
PROVIDER: Final = "gen_ai_provider_name"
MODALITY: Final = "gen_ai_token_modality"
OPERATION: Final = "gen_ai_operation_name"
GENAI: Final = (OPERATION, PROVIDER, MODEL, ANSWERED_BY)
FOLDS: Final = (ANSWERED_BY, MODEL, PROVIDER)
"""What is known least well goes first."""


class Catalogue:
    """Every metric, by what it counts. Those that have a bound are `Bounded`."""

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        self._registry = registry
        self._work = Room(WORK_SERIES, folded=600)
        self._budgets = Room(BUDGET_SERIES)
        self._make_requests()
        self._make_attempts()
        self._make_tokens()
        self._make_cost()
        self._make_process(version)
        self._make_http()

    def _make_requests(self) -> None:
        self.requests = self._counter(
            "weir_requests_total",
            "Requests by how they truly ended.",
            ("route", MODEL, "outcome"),
            (MODEL,),
        )
        self.by_key = self._counter(
            "weir_key_requests_total",
            "Requests to models by API key and its tenant.",
            ("tenant", "key"),
            ("key", "tenant"),
            Room(KEY_SERIES, folded=100),
        )
        self.streams = self._counter(
            "weir_streams_total",
            "Streams of upstreams whose first event was there, by how they truly ended.",
            (MODEL, "outcome"),
            (MODEL,),
        )
        self.calls = self._counter(
            "openai_api_calls_total", "Calls by model and status.", ("model", "status"), ("model",)
        )
        duration = self._plain_histogram(
            "gen_ai_server_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            DURATION_BUCKETS,
            (*GENAI, "error_type"),
        )
        self.duration, self.failed_duration = self._good_and_failed(duration)
        # Of those who left, apart from what failed: an alert wants them by model, in the worst hour too.
        left = Room(LEFT_SERIES, folded=LEFT_SERIES)
        self.left_duration = Bounded(duration, left, (PROVIDER, MODEL, "error_type"))
        self.first_token = self._histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from a request's arrival to the first piece of its streamed answer; none from the cache.",
            FIRST_TOKEN_BUCKETS,
            GENAI,
            FOLDS,
        )
        self.per_token = self._histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time between the tokens of a streamed answer after its first.",
            PER_TOKEN_BUCKETS,
            GENAI,
            FOLDS,
        )
        self.overhead = self._histogram(
            "weir_overhead_seconds",
            "Weir's own time: a request's, without upstreams, waiting and the stream that it passed on.",
            OVERHEAD_BUCKETS,
            ("route",),
            ("route",),
        )
        self.queue_wait = self._histogram(
            "weir_queue_wait_seconds",
            "Time until a request to a model got a place, or was turned away.",
            QUEUE_BUCKETS,
            ("priority",),
            ("priority",),
        )
        self.cache_requests = self._plain_counter(
            "weir_cache_requests_total", "Requests by what the response cache was to them.", ("result",)
        )
        self.cache_saved = self._counter(
            "weir_cache_saved_usd_total",
            "US dollars that answers from the cache had cost when they were first given.",
            (MODEL,),
            (MODEL,),
        )

    def _make_attempts(self) -> None:
        self.attempts = self._counter(
            "weir_upstream_attempts_total",
            "Attempts at upstreams, by how each ended: for a stream, up to its first event.",
            ("upstream", MODEL, "kind", "outcome"),
            (MODEL, "upstream"),
        )
        duration = self._plain_histogram(
            "gen_ai_client_inference_duration_seconds",
            "Time of one attempt at an upstream, up to the end of its answer.",
            DURATION_BUCKETS,
            (*GENAI, "error_type"),
        )
        self.attempt_duration, self.failed_attempt_duration = self._good_and_failed(duration)
        self.first_chunk = self._histogram(
            "gen_ai_client_inference_time_to_first_chunk_seconds",
            "Time from asking an upstream to the first event of its stream.",
            DURATION_BUCKETS,
            GENAI,
            FOLDS,
        )
        self.per_chunk = self._histogram(
            "gen_ai_client_inference_time_per_output_chunk_seconds",
            "Time between events of a stream; those that come at once have had equal parts of it.",
            DURATION_BUCKETS,
            GENAI,
            FOLDS,
        )
        self.circuits = self._gauge(
            "weir_circuit_state",
            "1 for the state that the circuit of a model at an upstream is in, once it was ever open.",
            ("upstream", "model", "state"),
            "livemax",
            self._work,
        )
        self.hedges = self._plain_counter(
            "weir_hedges_total",
            "Second calls that were made to be quicker, by whether their answer was taken: won or lost.",
            ("result",),
        )
        self.wasted = self._plain_counter(
            "weir_wasted_cost_usd_total",
            "US dollars for questions whose answers nobody took, estimated: beside what requests cost.",
            ("reason",),
        )
        _begin(self.hedges, "won", "lost")
        _begin(self.wasted, "hedge", "timeout")

    def _make_tokens(self) -> None:
        usage = "gen_ai_client_inference_usage_"
        text = "tokens; cached, cache-written and reasoning tokens are parts of the totals."
        self.tokens = {
            kind: self._counter(
                f"{usage}{kind}_total",
                f"{kind.replace('_', ' ').capitalize()}: {text}",
                (*GENAI, MODALITY),
                FOLDS,
            )
            for kind in (
                *("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_write_input_tokens"),
                "reasoning_output_tokens",
            )
        }
        self.token_sizes = {
            kind: self._histogram(
                f"gen_ai_client_inference_operation_{kind}",
                f"{kind.replace('_', ' ').capitalize()} of one good answer: for percentiles, not for sums.",
                TOKEN_BUCKETS,
                GENAI,
                FOLDS,
            )
            for kind in ("input_tokens", "output_tokens")
        }
        self.tokens_used = self._counter(
            "openai_tokens_used_total", "Tokens by model.", ("model",), ("model",)
        )

    def _make_cost(self) -> None:
        self.cost = self._counter(
            "weir_cost_usd_total",
            "US dollars, by the price table or its override.",
            (*GENAI, "tenant", "cost_source"),
            ("tenant", *FOLDS),
            Room(COST_SERIES, folded=300),
        )
        self.unpriced = self._counter(
            "weir_unpriced_requests_total", "Requests with tokens whose price nobody knows.", GENAI, FOLDS
        )
        self.price_age = self._plain_gauge(
            "weir_price_table_age_seconds",
            "Time since the latest day on which any of the table's prices was checked, by its own words.",
            "max",
        )
        budget = ("tenant", "key", "budget")
        self.budget_used = self._gauge(
            "weir_budget_used_ratio",
            "The share of a budget that is spent in this day or month; 1 and more: all of it.",
            budget,
            "max",
            self._budgets,
        )
        self.budget_left = self._gauge(
            "weir_budget_remaining_usd",
            "US dollars that are left of a budget in this day or month.",
            budget,
            "min",
            self._budgets,
        )

    def _make_process(self, version: str) -> None:
        self.inflight = self._plain_gauge(
            "weir_inflight_requests",
            "Requests to models that run or wait for a place, as of the last heartbeat.",
            "livesum",
        )
        self.waiting = self._plain_gauge(
            "weir_queue_requests",
            "Requests to models that wait for a place, as of the last heartbeat.",
            "livesum",
        )
        self.places = self._plain_gauge(
            "weir_concurrency_limit", "Requests to models that may run at a time just now.", "livesum"
        )
        self.sheds = self._plain_counter(
            "weir_shed_total", "Requests that were turned away for want of a place.", ("reason", "priority")
        )
        for reason, priority in product(Shed, Priority):
            self.shed(reason, priority)
        self.lag = self._plain_gauge(
            "weir_event_loop_lag_seconds", "How late the main loop's last heartbeat came.", "livemax"
        )
        self.degraded = self._plain_gauge(
            "weir_degraded",
            "1 while a feature does without Redis, which it needs for its whole; 0 while it has it.",
            "livemax",
            ("feature",),
        )
        self.dropped_writes = self._plain_counter(
            "weir_state_writes_dropped_total",
            "Writes that were lost because Redis was away too long.",
            ("feature",),
        )
        self.dropped_telemetry = self._plain_counter(
            "weir_telemetry_dropped_total",
            "Spans and log lines that nobody got: no room, or not taken in time.",
            ("signal",),
        )
        self.lines_sampled = self._plain_counter(
            "weir_log_lines_sampled_total", "Lines of good requests that LOG_SAMPLE_SUCCESS left out.", ()
        )
        self.overflow = self._plain_counter(
            "weir_label_overflow_total", "Requests and attempts of which a label became _other.", ("label",)
        )
        self.reloads = self._plain_counter(
            "weir_config_reloads_total",
            "Times that changed files of the configuration were read: loaded or refused.",
            ("result",),
        )
        self.reloaded_at = self._plain_gauge(
            "weir_config_last_reload_success_timestamp_seconds",
            "When the configuration was last read and found good, at the start or later.",
            "livemin",
        )
        self.stale = self._plain_gauge(
            "weir_config_stale",
            "1 while the files of the configuration are bad and an older configuration serves; else 0.",
            "livemax",
        )
        _begin(self.dropped_telemetry, "traces", "logs")
        _begin(self.overflow, "model", "tenant", "key", "error_type")
        _begin(self.reloads, "loaded", "refused")
        self.reloaded_at.set_to_current_time()
        self.stale.set(0)
        self._plain_gauge("weir_build_info", "1.", "max", ("version",)).labels(version).set(1)
        ProcessCollector(registry=self._registry)

    def shed(self, reason: Shed, priority: Priority) -> Counter:
        return self.sheds.labels(reason.value, priority.name.lower())

    def _make_http(self) -> None:
        known = _Definitions(self._registry)
        instrumentator.requests(registry=known)
        instrumentator.latency(registry=known, should_include_status=False, buckets=HTTP_BUCKETS)
        requests, duration = known.defined
        folds = ("handler", "method")
        self.http_requests = Bounded(requests, self._work, folds)
        self.http_duration = Bounded(duration, self._work, folds)

    # -- kinds -----------------------------------------------------------------------------------

    def _plain_counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _counter(
        self, name: str, text: str, labels: Sequence[str], folds: Sequence[str], room: Room | None = None
    ) -> Bounded:
        return Bounded(self._plain_counter(name, text, labels), room or self._work, folds)

    def _plain_histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Sequence[str]
    ) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=tuple(buckets))

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Sequence[str], folds: Sequence[str]
    ) -> Bounded:
        return Bounded(self._plain_histogram(name, text, buckets, labels), self._work, folds)

    def _good_and_failed(self, metric: Histogram) -> tuple[Bounded, Bounded]:
        """The failed ones apart: in a bad hour they must not take the room of the good ones."""
        failed = Room(FAILED_SERIES, folded=FAILED_SERIES // 2)
        return Bounded(metric, self._work, FOLDS), Bounded(metric, failed, (*FOLDS, "error_type"))

    def _plain_gauge(self, name: str, text: str, mode: Any, labels: Sequence[str] = ()) -> Gauge:
        """`mode`: what one value for all worker processes is made by."""
        return Gauge(name, text, labels, registry=self._registry, multiprocess_mode=mode)

    def _gauge(self, name: str, text: str, labels: Sequence[str], mode: str, room: Room) -> Bounded:
        return Bounded(self._plain_gauge(name, text, mode, labels), room)


class _Definitions(CollectorRegistry):
    """Takes the metrics that a library defines, and makes ours of the same names.

    prometheus-fastapi-instrumentator made these names known. Its middleware, or its functions for each
    request, would cost a tenth of the throughput.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry
        self.defined: list[Counter | Histogram] = []

    def register(self, collector: Any) -> None:
        (about,) = collector.describe()
        labels = collector._labelnames  # noqa: SLF001  # there is no other way to know them
        if about.type == "histogram":
            self.defined.append(
                Histogram(
                    about.name, about.documentation, labels, registry=self._registry, buckets=HTTP_BUCKETS
                )
            )
        else:
            self.defined.append(Counter(about.name, about.documentation, labels, registry=self._registry))


def _begin(metric: Counter, *values: str) -> None:
    """At 0, so that a rise from nothing is one."""
    for value in values:
        metric.labels(value)
