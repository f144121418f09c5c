"""Metrics: a view of each request's record, in a registry that the caller brings.

Names and labels are those of OpenTelemetry's GenAI conventions and of docs/metrics.md. Label values
come from bounded sets: what callers make up becomes `_other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    multiprocess,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.process_collector import ProcessCollector
from prometheus_fastapi_instrumentator import metrics as instrumentator
from prometheus_fastapi_instrumentator.metrics import Info

from service.domain import Outcome, RequestRecord, Usage
from service.errors import WeirError

OTHER: Final = "_other"
MAX_MODELS: Final = 200
MAX_TENANTS: Final = 500
DURATION_BUCKETS: Final = (*(0.01 * 2**n for n in range(14)), 163.84, 327.68)
FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
PER_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

_GENAI: Final = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "gen_ai_response_model",
)


class BoundedLabel:
    """A label whose values are admitted up to `most`; everything else is `_other`."""

    def __init__(self, most: int, known: Iterable[str] = ()) -> None:
        self._most = most
        self._known = set(known)

    def of(self, value: str, *, admit: bool) -> str:
        """`value`, if it is known or may be admitted; the empty value stands for itself."""
        if not value or value in self._known:
            return value
        if admit and len(self._known) < self._most:
            self._known.add(value)
            return value
        return OTHER


class Metrics:
    """All metrics of one process. Adding to them never waits."""

    def __init__(self, registry: CollectorRegistry, version: str, models: Iterable[str] = ()) -> None:
        disable_created_metrics()
        self.registry = registry
        self._models = BoundedLabel(MAX_MODELS, models)
        self._tenants = BoundedLabel(MAX_TENANTS)
        self._children: dict[tuple[Any, ...], Any] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=tuple(buckets))

        self._requests = counter(
            "weir_requests_total",
            "Requests by how they truly ended.",
            *("route", "gen_ai_request_model", "outcome"),
        )
        self._attempts = counter(
            "weir_upstream_attempts_total",
            "Attempts at upstreams.",
            *("upstream", "gen_ai_request_model", "kind", "outcome"),
        )
        self._duration = histogram(
            "gen_ai_server_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            DURATION_BUCKETS,
            *_GENAI,
            "error_type",
        )
        self._first_token = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from a request's arrival to the first piece of its streamed answer.",
            FIRST_TOKEN_BUCKETS,
            *_GENAI,
        )
        self._per_token = histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time between the tokens of a streamed answer after its first.",
            PER_TOKEN_BUCKETS,
            *_GENAI,
        )
        usage = "gen_ai_client_inference_usage_"
        text = "tokens; cached, cache-written and reasoning tokens are parts of the totals."
        self._tokens = {
            kind: counter(f"{usage}{kind}_total", f"{kind.replace('_', ' ').capitalize()}: {text}", *_GENAI)
            for kind in (
                "input_tokens",
                "output_tokens",
                "cache_read_input_tokens",
                "cache_write_input_tokens",
                "reasoning_output_tokens",
            )
        }
        self._cost = counter(
            "weir_cost_usd_total",
            "US dollars, by the price table or its override.",
            *_GENAI,
            *("tenant", "cost_source"),
        )
        self._unpriced = counter(
            "weir_unpriced_requests_total", "Requests with tokens whose price nobody knows.", *_GENAI
        )
        self._overflow = counter("weir_label_overflow_total", "Label values that became _other.", "label")
        self._calls = counter("openai_api_calls_total", "Calls by model and status.", "model", "status")
        self._tokens_used = counter("openai_tokens_used_total", "Tokens by model.", "model")
        self._inflight = Gauge(
            "weir_inflight_requests",
            "Requests to models that run now.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._lag = Gauge(
            "weir_event_loop_lag_seconds",
            "How late the main loop's last heartbeat came.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        build = Gauge("weir_build_info", "1.", ["version"], registry=registry, multiprocess_mode="max")
        build.labels(version).set(1)
        self._http = instrumentator.default(registry=registry)
        ProcessCollector(registry=registry)

    # -- requests to models ----------------------------------------------------------------------

    def opened(self, record: RequestRecord) -> None:
        self._inflight.inc()

    def attempted(self, record: RequestRecord, error: WeirError | None) -> None:
        kind = "first" if record.attempts == 1 else "retry"
        outcome = error.outcome if error is not None else Outcome.SUCCESS
        model = self._model(record.request_model, admit=error is None)
        self._child(self._attempts, record.upstream, model, kind, outcome).inc()

    def closed(self, record: RequestRecord) -> None:
        self._inflight.dec()
        good = record.outcome is Outcome.SUCCESS
        model = self._model(record.request_model, admit=good)
        answered_by = self._model(record.response_model, admit=good)
        genai = (record.operation.genai_name, record.provider, model, answered_by)
        error_type = "" if good else record.error_code or record.outcome.value
        self._child(self._requests, record.route, model, record.outcome.value).inc()
        self._child(self._calls, model, "success" if good else "error").inc()
        self._child(self._duration, *genai, error_type).observe(record.duration_seconds)
        if record.time_to_first_token_seconds is not None:
            self._child(self._first_token, *genai).observe(record.time_to_first_token_seconds)
        if record.time_per_output_token_seconds is not None:
            self._child(self._per_token, *genai).observe(record.time_per_output_token_seconds)
        if record.usage is not None:
            self._count(record, record.usage, genai, model)

    def refused(self, route: str, outcome: Outcome) -> None:
        """A request to a model that ended before a record of it was opened: no key, no good body."""
        self._child(self._requests, route, "", outcome.value).inc()

    def _count(self, record: RequestRecord, usage: Usage, genai: tuple[str, ...], model: str) -> None:
        for kind, number in (
            ("input_tokens", usage.input_tokens),
            ("output_tokens", usage.output_tokens),
            ("cache_read_input_tokens", usage.cached_input_tokens),
            ("cache_write_input_tokens", usage.cache_write_tokens),
            ("reasoning_output_tokens", usage.reasoning_tokens),
        ):
            if number:
                self._child(self._tokens[kind], *genai).inc(number)
        self._child(self._tokens_used, model).inc(usage.total_tokens)
        if record.cost.usd is None:
            self._child(self._unpriced, *genai).inc()
        else:
            tenant = self._tenants.of(record.principal.tenant, admit=True)
            self._child(self._cost, *genai, tenant, record.cost.source).inc(record.cost.usd)

    # -- all of HTTP, under the names of prometheus-fastapi-instrumentator -----------------------

    def http(self, method: str, route: str, status: int, seconds: float, sizes: HTTPSizes) -> None:
        if self._http is not None:
            self._http(
                Info(sizes, sizes.response, method, route, f"{status // 100}xx", seconds)  # type: ignore[arg-type]
            )

    def loop_lag(self, seconds: float) -> None:
        self._lag.set(seconds)

    def _model(self, name: str, *, admit: bool) -> str:
        label = self._models.of(name, admit=admit)
        if label is OTHER:
            self._child(self._overflow, "model").inc()
        return label

    def _child(self, metric: MetricWrapperBase, *labels: str) -> Any:
        """The metric's child for these labels, without the lock and the checks of `labels()`."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


class HTTPSizes:
    """Content-Length of request and response, in the form in which the instrumentator reads them."""

    __slots__ = ("headers", "response")

    def __init__(self, request_bytes: int, response_bytes: int) -> None:
        self.headers = {"Content-Length": request_bytes}
        self.response = _Sized(response_bytes)


class _Sized:
    __slots__ = ("headers",)

    def __init__(self, size: int) -> None:
        self.headers = {"Content-Length": size}


def exposition(registry: CollectorRegistry) -> Callable[[str], tuple[bytes, str]]:
    """A function from an Accept header to the metrics and their content type."""

    def render(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return render


def merged_registry(directory: str) -> CollectorRegistry:
    """The metrics of all worker processes that write to `directory`."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=directory)
    return registry
