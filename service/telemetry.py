"""Metrics: a view of each request's record, in a registry that the caller brings.

Names and labels are those of OpenTelemetry's GenAI conventions and of docs/metrics.md. Label values
come from bounded sets: what callers make up becomes `_other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

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

from service.domain import Outcome, RequestRecord, Usage
from service.errors import WeirError

OTHER: Final = "_other"
MAX_MODELS: Final = 200
MAX_TENANTS: Final = 500
MAX_KEYS: Final = 1_000
MAX_KEPT_LABELS: Final = 5_000
DURATION_BUCKETS: Final = (*(0.01 * 2**n for n in range(14)), 163.84, 327.68)
FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
HTTP_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
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


class _Labels(NamedTuple):
    """The label values of one request, for each metric that has them."""

    request: tuple[str, ...]
    key: tuple[str, ...]
    call: tuple[str, ...]
    genai: tuple[str, ...]
    error_type: str
    cost: tuple[str, ...]


class Metrics:
    """All metrics of one process. Adding to them never waits."""

    def __init__(self, registry: CollectorRegistry, version: str, models: Iterable[str] = ()) -> None:
        disable_created_metrics()
        self.registry = registry
        self._models = BoundedLabel(MAX_MODELS, models)
        self._tenants = BoundedLabel(MAX_TENANTS)
        self._keys = BoundedLabel(MAX_KEYS)
        self._children: dict[tuple[Any, ...], Any] = {}
        self._kept_labels: dict[tuple[Any, ...], _Labels] = {}
        self._running = 0

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=tuple(buckets))

        self._requests = counter(
            "weir_requests_total",
            "Requests by how they truly ended.",
            *("route", "gen_ai_request_model", "outcome"),
        )
        self._by_key = counter(
            "weir_key_requests_total", "Requests to models by API key and its tenant.", "tenant", "key"
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
            "Requests to models that run now, as of the last heartbeat.",
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
        known = _Definitions(registry)
        instrumentator.requests(registry=known)
        instrumentator.latency(registry=known, should_include_status=False, buckets=HTTP_BUCKETS)
        self._http_requests, self._http_duration = known.defined
        ProcessCollector(registry=registry)

    # -- requests to models ----------------------------------------------------------------------

    def opened(self) -> None:
        self._running += 1

    def attempted(self, record: RequestRecord, error: WeirError | None) -> None:
        kind = "first" if record.attempts == 1 else "retry"
        outcome = error.outcome if error is not None else Outcome.SUCCESS
        model = self._model(record.request_model, admit=error is None)
        self._child(self._attempts, record.upstream, model, kind, outcome).inc()

    def closed(self, record: RequestRecord) -> None:
        self._running -= 1
        labels = self._labels(record)
        self._child(self._requests, *labels.request).inc()
        self._child(self._by_key, *labels.key).inc()
        self._child(self._calls, *labels.call).inc()
        self._child(self._duration, *labels.genai, labels.error_type).observe(record.duration_seconds)
        if record.time_to_first_token_seconds is not None:
            self._child(self._first_token, *labels.genai).observe(record.time_to_first_token_seconds)
        if record.time_per_output_token_seconds is not None:
            self._child(self._per_token, *labels.genai).observe(record.time_per_output_token_seconds)
        if record.usage is not None:
            self._count(record, record.usage, labels)

    def refused(self, route: str, outcome: Outcome) -> None:
        """A request to a model that ended before a record of it was opened: no key, no good body."""
        self._child(self._requests, route, "", outcome.value).inc()

    def _count(self, record: RequestRecord, usage: Usage, labels: _Labels) -> None:
        for kind, number in (
            ("input_tokens", usage.input_tokens),
            ("output_tokens", usage.output_tokens),
            ("cache_read_input_tokens", usage.cached_input_tokens),
            ("cache_write_input_tokens", usage.cache_write_tokens),
            ("reasoning_output_tokens", usage.reasoning_tokens),
        ):
            if number:
                self._child(self._tokens[kind], *labels.genai).inc(number)
        self._child(self._tokens_used, labels.call[0]).inc(usage.total_tokens)
        if record.cost.usd is None:
            self._child(self._unpriced, *labels.genai).inc()
        else:
            self._child(self._cost, *labels.cost).inc(record.cost.usd)

    def _labels(self, record: RequestRecord) -> _Labels:
        """The record's labels; those of good requests are kept, because the next one has them too."""
        good = record.outcome is Outcome.SUCCESS
        if not good:
            return self._make_labels(record, good=False)
        key = (
            record.route,
            record.provider,
            record.request_model,
            record.response_model,
            record.principal,
            record.cost.source,
        )
        labels = self._kept_labels.get(key)
        if labels is None:
            if len(self._kept_labels) >= MAX_KEPT_LABELS:
                self._kept_labels.clear()
            labels = self._kept_labels[key] = self._make_labels(record, good=True)
        return labels

    def _make_labels(self, record: RequestRecord, *, good: bool) -> _Labels:
        model = self._model(record.request_model, admit=good)
        answered_by = self._model(record.response_model, admit=good)
        genai = (record.operation.genai_name, record.provider, model, answered_by)
        tenant = self._tenants.of(record.principal.tenant, admit=True)
        return _Labels(
            request=(record.route, model, record.outcome.value),
            key=(tenant, self._keys.of(record.principal.name, admit=True)),
            call=(model, "success" if good else "error"),
            genai=genai,
            error_type="" if good else record.error_code or record.outcome.value,
            cost=(*genai, tenant, record.cost.source),
        )

    # -- all of HTTP -----------------------------------------------------------------------------

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        group = f"{status // 100}xx"
        self._child(self._http_requests, method=method, status=group, handler=route).inc()
        self._child(self._http_duration, method=method, handler=route).observe(seconds)

    def beat(self, loop_lag_seconds: float) -> None:
        """What is told at each heartbeat instead of at each request."""
        self._lag.set(loop_lag_seconds)
        self._inflight.set(self._running)

    def _model(self, name: str, *, admit: bool) -> str:
        label = self._models.of(name, admit=admit)
        if label is OTHER:
            self._child(self._overflow, "model").inc()
        return label

    def _child(self, metric: MetricWrapperBase, *values: str, **named: str) -> Any:
        """The metric's child for these labels, without the lock and the checks of `labels()`."""
        key = (metric, *values, *named.values())
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*values, **named)
        return child


class _Definitions(CollectorRegistry):
    """Takes the metrics that a library defines, so that they can be counted without its middleware.

    prometheus-fastapi-instrumentator made these names known. Its middleware, or its functions for each
    request, would cost a tenth of the throughput.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry
        self.defined: list[Any] = []

    def register(self, collector: Any) -> None:
        self._registry.register(collector)
        self.defined.append(collector)


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
