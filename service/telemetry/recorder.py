"""Metrics as a view of each request's record, in a registry that the caller brings.

Names and labels are those of OpenTelemetry's GenAI conventions and of docs/metrics.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics

from service.domain import AttemptKind, CacheUse, Outcome, RequestRecord, Standing, Usage
from service.errors import CallerGone, WeirError, catalogue, outcome_of
from service.overload import Priority, Shed
from service.routing.breaker import Circuit
from service.telemetry.catalogue import ANSWERED_BY, MODALITY, MODEL, OPERATION, PROVIDER, Catalogue
from service.telemetry.labels import OTHER, BoundedLabel, Views

log = structlog.get_logger("weir")

SHARED_FEATURES: Final = ("limits", "conversations", "ledger", "cache", "idempotency")
MAX_MODELS: Final = 200
MAX_TENANTS: Final = 500
MAX_KEYS: Final = 1_000
MAX_UPSTREAMS: Final = 100
MAX_KEPT_VIEWS: Final = 12_000
"""Views of good requests and attempts that are kept, because the next one has them too."""

RESPONSE_FAILED: Final = "response_failed"
ERROR_TYPES: Final = frozenset(
    (
        *(error.code for error in catalogue()),
        *(WeirError.code, CallerGone.code),
        *(outcome.value for outcome in Outcome),
        RESPONSE_FAILED,
    )
)
_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_LABEL_NAMES: Final = {ANSWERED_BY: "model", MODEL: "model", PROVIDER: "provider"}
"""What the overflow of a label is counted as; else as the label is called."""
_TEXT: Final = "text"
_AUDIO: Final = "audio"


class Metrics:
    """All metrics of one process. Adding to them never waits."""

    def __init__(self, registry: CollectorRegistry, version: str, models: Iterable[str] = ()) -> None:
        disable_created_metrics()
        self.registry = registry
        self._all = Catalogue(registry, version)
        self._models = BoundedLabel(MAX_MODELS, models)
        self._tenants = BoundedLabel(MAX_TENANTS)
        self._keys = BoundedLabel(MAX_KEYS)
        self._upstreams = BoundedLabel(MAX_UPSTREAMS)
        self._kept: dict[tuple[Any, ...], Views] = {}
        self._http: dict[tuple[str, str, int], tuple[Any, Any]] = {}
        self._queued: dict[str, Any] = {}
        self._cache_uses = {use: self._all.cache_requests.labels(use.value) for use in CacheUse}
        self._overflow: dict[str, Any] = {}
        self._circuit_labels: dict[tuple[str, str], str] = {}
        self._circuit_states: dict[tuple[str, str], dict[str, Circuit]] = {}
        self._begun: set[tuple[str, ...]] = set()
        self._running = 0
        self._prices_known_at: float | None = None

    # -- attempts at upstreams -------------------------------------------------------------------

    def attempted(
        self,
        record: RequestRecord,
        error: WeirError | None,
        kind: AttemptKind,
        seconds: float,
        response_model: str = "",
    ) -> None:
        """`seconds` until the whole answer, the first event of its stream, or the failure."""
        views = self._attempt_views(record, error, kind, response_model)
        views[self._all.attempts].inc()
        if error is not None:
            views[self._all.failed_attempt_duration].observe(seconds, _exemplar(record))
        elif record.stream:
            views[self._all.first_chunk].observe(seconds, _exemplar(record))
        else:
            views[self._all.attempt_duration].observe(seconds, _exemplar(record))
        self._count_overflow(views)

    def pace(self, record: RequestRecord, response_model: str) -> Callable[[float, int], None]:
        """What is told of a stream's events after the first: seconds since those before, and how many."""
        views = self._attempt_views(record, None, AttemptKind.FIRST, response_model)
        observe = views[self._all.per_chunk].observe

        def told(seconds: float, events: int) -> None:
            observe(seconds / events, None, events)

        return told

    def streamed(self, record: RequestRecord, seconds: float) -> None:
        """A stream is over, `seconds` after it was asked for; the record says how, and is closed by now."""
        views = self._views(record)
        self._begin_streams(views.labels[MODEL])
        views[self._all.streams].inc()
        good = record.outcome is Outcome.SUCCESS
        duration = self._all.attempt_duration if good else self._all.failed_attempt_duration
        views[duration].observe(seconds, _exemplar(record))

    def unheard(self, record: RequestRecord, kind: AttemptKind, seconds: float) -> None:
        """The stream that an attempt began was given up for a quicker one."""
        views = self._attempt_views(record, CallerGone("unheard"), kind, "")
        views[self._all.failed_attempt_duration].observe(seconds)

    def hedged(self, *, won: bool, wasted_usd: float) -> None:
        """A second call was made to be quicker."""
        self._all.hedges.labels("won" if won else "lost").inc()
        if wasted_usd:
            self._all.wasted.labels("hedge").inc(wasted_usd)

    def late(self, wasted_usd: float) -> None:
        """A call was given up as late, and another one stands in its request's record."""
        if wasted_usd:
            self._all.wasted.labels("timeout").inc(wasted_usd)

    def _attempt_views(
        self, record: RequestRecord, error: WeirError | None, kind: AttemptKind, response_model: str
    ) -> Views:
        if error is not None:
            return self._make_attempt_views(record, error, kind, response_model)
        key = (record.operation, record.upstream, record.provider, record.request_model, response_model, kind)
        views = self._kept.get(key)
        if views is None:
            views = self._keep(key, self._make_attempt_views(record, error, kind, response_model))
        return views

    def _make_attempt_views(
        self, record: RequestRecord, error: WeirError | None, kind: AttemptKind, response_model: str
    ) -> Views:
        labels = self._genai(record, response_model, admit=error is None)
        overflow = _overflowed(labels)
        labels["upstream"] = self._upstreams.of(record.upstream, admit=True)
        labels["kind"] = kind.value
        labels["outcome"] = (Outcome.SUCCESS if error is None else outcome_of(error)).value
        labels["error_type"] = "" if error is None else _error_type(error.code)
        return Views(labels, overflow)

    # -- requests to models ----------------------------------------------------------------------

    def opened(self) -> None:
        self._running += 1

    def queued(self, priority: str, seconds: float) -> None:
        """A request got a place, or was turned away, after so long."""
        child = self._queued.get(priority)
        if child is None:
            child = self._queued[priority] = self._all.queue_wait.child({"priority": priority}, set())
        child.observe(seconds)

    def standing(self, record: RequestRecord, standing: Standing) -> None:
        tenant = self._tenants.of(record.principal.tenant, admit=True)
        for budget in standing.budgets:
            labels = {"tenant": tenant, "budget": budget.name}
            labels["key"] = self._keys.of(budget.key, admit=True)
            for metric, value in (
                (self._all.budget_used, budget.used_ratio),
                (self._all.budget_left, budget.remaining_usd),
            ):
                child = metric.child(labels, set())
                if child is None:
                    self._count_value("budget")
                else:
                    child.set(value)

    def closed(self, record: RequestRecord) -> None:
        self._running -= 1
        every, views, exemplar = self._all, self._views(record), _exemplar(record)
        views[every.requests].inc(1, exemplar)
        views[every.by_key].inc()
        views[every.calls].inc()
        self._duration(record, views).observe(record.duration_seconds, exemplar)
        if record.overhead_seconds is not None:
            views[every.overhead].observe(record.overhead_seconds, exemplar)
        if record.cache is not None:
            self._cache_uses[record.cache].inc()
            if record.saved_usd:
                views[every.cache_saved].inc(record.saved_usd)
        if record.time_to_first_token_seconds is not None and record.cache is not CacheUse.HIT:
            views[every.first_token].observe(record.time_to_first_token_seconds, exemplar)
        if record.time_per_output_token_seconds is not None:
            views[every.per_token].observe(record.time_per_output_token_seconds, exemplar)
        if record.usage is not None:
            self._count(record, record.usage, views)
        self._count_overflow(views)

    def _duration(self, record: RequestRecord, views: Views) -> Any:
        if record.outcome is Outcome.SUCCESS:
            return views[self._all.duration]
        if record.outcome is Outcome.CLIENT_DISCONNECTED:
            # Without the operation, and the answer's model, which few of them saw: so fifty models have room.
            return self._all.left_duration.child(
                {**views.labels, OPERATION: "", ANSWERED_BY: ""}, views.overflow
            )
        return views[self._all.failed_duration]

    def refused(self, route: str, outcome: Outcome) -> None:
        """A request to a model that ended before a record of it was opened: no key, no good body."""
        self._begin(route)
        self._all.requests.child({"route": route, MODEL: "", "outcome": outcome.value}, set()).inc()

    def expect(self, routes: Iterable[str]) -> None:
        """These routes will be asked."""
        for route in routes:
            self._begin(route)

    def _begin(self, route: str, model: str = "") -> None:
        """All outcomes of a route and model, from their first request on.

        A rate does not see an event that comes together with its series: the first failures of a process,
        when it matters most, would be in no ratio and no alert.
        """
        if (route, model) not in self._begun:
            self._begun.add((route, model))
            for outcome in Outcome:
                self._all.requests.child({"route": route, MODEL: model, "outcome": outcome.value}, set())

    def _begin_streams(self, model: str) -> None:
        if (model,) not in self._begun:
            self._begun.add((model,))
            for outcome in Outcome:
                self._all.streams.child({MODEL: model, "outcome": outcome.value}, set())

    def _count(self, record: RequestRecord, usage: Usage, views: Views) -> None:
        every = self._all
        given, made = usage.input_tokens, usage.output_tokens
        self._count_tokens("input_tokens", given, usage.audio_input_tokens, views)
        self._count_tokens("output_tokens", made, usage.audio_output_tokens, views)
        if usage.cached_input_tokens:
            views[every.tokens["cache_read_input_tokens"]].inc(usage.cached_input_tokens)
        if usage.cache_write_tokens:
            views[every.tokens["cache_write_input_tokens"]].inc(usage.cache_write_tokens)
        if usage.reasoning_tokens:
            views[every.tokens["reasoning_output_tokens"]].inc(usage.reasoning_tokens)
        views[every.tokens_used].inc(usage.total_tokens)
        if record.outcome is Outcome.SUCCESS:
            views[every.token_sizes["input_tokens"]].observe(given)
            views[every.token_sizes["output_tokens"]].observe(made)
        if record.cost.usd is None:
            views[every.unpriced].inc()
        else:
            views[every.cost].inc(record.cost.usd)

    def _count_tokens(self, kind: str, tokens: int, audio: int, views: Views) -> None:
        metric = self._all.tokens[kind]
        if audio:
            heard = min(audio, tokens)
            metric.child({**views.labels, MODALITY: _AUDIO}, views.overflow).inc(heard)
            tokens -= heard
        if tokens:
            views[metric].inc(tokens)

    def _views(self, record: RequestRecord) -> Views:
        """The record's views; those of good requests are kept, because the next one has them too."""
        if record.outcome is not Outcome.SUCCESS:
            return self._make_views(record, good=False)
        key = (
            record.route,
            record.provider,
            record.request_model,
            record.response_model,
            record.principal,
            record.cost.source,
        )
        views = self._kept.get(key)
        return self._keep(key, self._make_views(record, good=True)) if views is None else views

    def _make_views(self, record: RequestRecord, *, good: bool) -> Views:
        labels = self._genai(record, record.response_model, admit=good)
        principal, model = record.principal, labels[MODEL]
        labels |= {
            "route": record.route,
            "outcome": record.outcome.value,
            "model": model,
            "status": "success" if good else "error",
            "tenant": self._tenants.of(principal.tenant, admit=True),
            "key": self._keys.of(principal.name, admit=True),
            "error_type": "" if good else _error_type(record.error_code or record.outcome.value),
            "cost_source": record.cost.source,
            MODALITY: _TEXT,
        }
        self._begin(record.route, model)
        return Views(labels, _overflowed(labels))

    def _genai(self, record: RequestRecord, response_model: str, *, admit: bool) -> dict[str, str]:
        return {
            OPERATION: record.operation.genai_name,
            PROVIDER: record.provider,
            MODEL: self._models.of(record.request_model, admit=admit),
            ANSWERED_BY: self._models.of(response_model, admit=admit),
        }

    def _keep(self, key: tuple[Any, ...], views: Views) -> Views:
        if len(self._kept) >= MAX_KEPT_VIEWS:
            self._kept.clear()
        self._kept[key] = views
        return views

    def _count_overflow(self, views: Views) -> None:
        if views.overflow:
            for name in {_LABEL_NAMES.get(label, label) for label in views.overflow}:
                self._count_value(name)

    def _count_value(self, name: str) -> None:
        child = self._overflow.get(name)
        if child is None:
            child = self._overflow[name] = self._all.overflow.labels(name)
        child.inc()

    # -- all of HTTP -----------------------------------------------------------------------------

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        key = (method if method in _METHODS else OTHER, route, status // 100)
        children = self._http.get(key)
        if children is None:
            labels = {"method": key[0], "status": f"{key[2]}xx", "handler": route}
            children = (
                self._all.http_requests.child(labels, set()),
                self._all.http_duration.child(labels, set()),
            )
            self._http[key] = children
        children[0].inc()
        children[1].observe(seconds)

    def beat(self, loop_lag_seconds: float, *, waiting: int = 0, places: int = 0) -> None:
        """What is told at each heartbeat instead of at each request."""
        every = self._all
        every.lag.set(loop_lag_seconds)
        every.inflight.set(self._running)
        every.waiting.set(waiting)
        every.places.set(places)
        if self._prices_known_at is not None:
            every.price_age.set(max(time.time() - self._prices_known_at, 0.0))

    # -- upstreams and overload ------------------------------------------------------------------

    def circuit(self, upstream: str, model: str, state: Circuit) -> None:
        """The circuit of a model at an upstream changed."""
        log.warning("circuit_changed", upstream=upstream, model=model, state=state.value)
        self.show_circuit(upstream, model, state)

    def show_circuit(self, upstream: str, model: str, state: Circuit) -> None:
        """It is in this state just now, whether or not it changed."""
        last = self._circuit_labels.get((upstream, model))
        before = self._circuit_states[(upstream, last)][model] if last is not None else None
        if before is state:
            return
        if last is not None and before is not Circuit.CLOSED:
            label = last  # though meanwhile the model's name may have been admitted
        else:
            label = self._models.of(model, admit=False)
            if label != last:
                self.forget_circuit(upstream, model)
            self._circuit_labels[(upstream, model)] = label
        together = self._circuit_states.setdefault((upstream, label), {})
        together[model] = state
        states = set(together.values()) - {Circuit.CLOSED} or {Circuit.CLOSED}
        for known in Circuit:
            child = self._all.circuits.child(_of_circuit(upstream, label, known), set())
            if child is not None:
                child.set(1 if known in states else 0)

    def forget_circuit(self, upstream: str, model: str) -> None:
        """That model there is in use no more. Its circuit is closed by now."""
        label = self._circuit_labels.pop((upstream, model), None)
        if label is None:
            return  # it was never open
        together = self._circuit_states[(upstream, label)]
        del together[model]
        if together:
            return  # others have the same label
        del self._circuit_states[(upstream, label)]
        for known in Circuit:
            self._all.circuits.forget(_of_circuit(upstream, label, known))

    def shed(self, reason: Shed, priority: Priority) -> None:
        """A request was turned away for want of a place."""
        self._all.shed(reason, priority).inc()

    # -- the configuration -----------------------------------------------------------------------

    def config_read(self, good: bool) -> None:
        """The files of the configuration were read again."""
        self._all.reloads.labels("loaded" if good else "refused").inc()
        self._all.stale.set(0 if good else 1)
        if good:
            self._all.reloaded_at.set_to_current_time()

    def know(self, models: Iterable[str]) -> None:
        """Names of models that are labels in any case."""
        self._models.know(models)
        self._kept.clear()

    def prices_known(self, at: float | None) -> None:
        """When the table's prices were last looked at, in seconds since 1970; None: it does not say."""
        self._prices_known_at = at

    # -- the state that all pods share, and telemetry itself ---------------------------------------

    def shared_state(self, available: bool) -> None:
        for feature in SHARED_FEATURES:
            self._all.degraded.labels(feature).set(0 if available else 1)

    def write_dropped(self, feature: str) -> None:
        self._all.dropped_writes.labels(feature).inc()

    def telemetry_dropped(self, signal: str, count: int) -> None:
        """So many spans (`traces`) or lines (`logs`) were lost. May be called from any thread."""
        self._all.dropped_telemetry.labels(signal).inc(count)

    def log_line_sampled(self) -> None:
        """The line of a good request was left out."""
        self._all.lines_sampled.inc()


def _overflowed(labels: Mapping[str, str]) -> list[str]:
    return [name for name, value in labels.items() if value == OTHER]


def _error_type(code: str) -> str:
    return code if code in ERROR_TYPES else OTHER


def _of_circuit(upstream: str, model: str, state: Circuit) -> dict[str, str]:
    return {"upstream": upstream, "model": model, "state": state.value}


def _exemplar(record: RequestRecord) -> dict[str, str] | None:
    """Only of what is sampled: nothing else can be looked up."""
    return {"trace_id": record.trace_id} if record.sampled and record.trace_id else None
