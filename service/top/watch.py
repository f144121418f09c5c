"""From scrapes of all pods to one report: rates over the last seconds, and the state as it is now."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from service.domain import CALLERS_FAULTS, FAULTS
from service.top import figures
from service.top import scraping as names
from service.top.figures import Series, Values
from service.top.scraping import Answer, Away

WINDOW_SECONDS: Final = 30.0
"""What rates and quantiles are made of: shorter, they jump; longer, they lag behind."""

_CLOSED: Final = "closed"


class Pod(msgspec.Struct, frozen=True):
    url: str
    away: str | None
    """Why it gives no metrics; None if it does."""


class Quantiles(msgspec.Struct, frozen=True):
    p50: float | None
    p95: float | None


class Outcome(msgspec.Struct, frozen=True):
    outcome: str
    per_second: float
    share: float


class Model(msgspec.Struct, frozen=True):
    model: str
    requests_per_second: float
    tokens_per_second: float
    usd_per_hour: float


class Tenant(msgspec.Struct, frozen=True):
    tenant: str
    usd_per_hour: float


class Circuit(msgspec.Struct, frozen=True):
    upstream: str
    model: str
    state: str


class Budget(msgspec.Struct, frozen=True):
    tenant: str
    key: str
    budget: str
    used_ratio: float


class Report(msgspec.Struct, frozen=True):
    """All that is shown. Rates are of the last `seconds`; None stands for what nothing is known of."""

    at: float
    """Seconds since 1970."""
    seconds: float
    pods: tuple[Pod, ...]
    versions: dict[str, int]
    """How many pods run which."""
    requests_per_second: float
    error_ratio: float | None
    outcomes: tuple[Outcome, ...]
    time_to_first_token_seconds: Quantiles
    duration_seconds: Quantiles
    """Of good answers: a quick refusal makes nothing faster."""
    input_tokens_per_second: float
    output_tokens_per_second: float
    usd_per_hour: float
    unpriced_per_second: float
    cache_hit_ratio: float | None
    running: float
    """Those that have a place, without the queued ones."""
    queued: float
    places: float
    loop_lag_seconds: float
    """The worst pod's."""
    models: tuple[Model, ...]
    tenants: tuple[Tenant, ...]
    degraded: tuple[str, ...]
    circuits: tuple[Circuit, ...]
    """Those that are not closed."""
    budgets: tuple[Budget, ...]
    """The fullest first."""


class Watch:
    """Takes one scrape of all pods after the other, and reports on the last of them."""

    def __init__(self, urls: Sequence[str], window_seconds: float = WINDOW_SECONDS) -> None:
        self._urls = urls
        self._window = window_seconds
        self._last: dict[str, Answer] = {}
        self._steps: deque[tuple[float, Values]] = deque()
        """Seconds, and how much counters rose in them."""
        self._at: float | None = None

    @property
    def away(self) -> dict[str, str]:
        """Why a pod gave no metrics when it was asked last."""
        return {url: str(answer) for url, answer in self._last.items() if isinstance(answer, Away)}

    def take(self, clock: float, answers: Mapping[str, Answer]) -> None:
        """`clock` is in seconds and never goes back."""
        if self._at is not None and clock > self._at:
            risen = [_risen(self._last.get(url), answers[url]) for url in self._urls]
            self._steps.append((clock - self._at, figures.added(risen)))
        while len(self._steps) > 1 and sum(seconds for seconds, _ in self._steps) > self._window:
            self._steps.popleft()
        self._at = clock
        self._last = dict(answers)

    def report(self, at: float) -> Report:
        seconds = sum(seconds for seconds, _ in self._steps)
        risen = figures.added(values for _, values in self._steps)
        pods = [answer for answer in self._last.values() if not isinstance(answer, Away)]
        now = figures.added(pods)

        def rate(name: str, **labels: str) -> float:
            return figures.total(risen, name, **labels) / seconds if seconds else 0.0

        hits, misses = rate(names.CACHE, result="hit"), rate(names.CACHE, result="miss")
        outcomes = _outcomes(risen, seconds)
        return Report(
            at=at,
            seconds=seconds,
            pods=tuple(Pod(url, self.away.get(url)) for url in self._urls),
            versions=_versions(pods),
            requests_per_second=rate(names.REQUESTS),
            error_ratio=figures.ratio(
                sum(o.per_second for o in outcomes if o.outcome in FAULTS),
                sum(o.per_second for o in outcomes if o.outcome not in CALLERS_FAULTS),
            ),
            outcomes=outcomes,
            time_to_first_token_seconds=_quantiles(risen, names.TIME_TO_FIRST),
            duration_seconds=_quantiles(risen, names.DURATION, error_type=""),
            input_tokens_per_second=rate(names.INPUT_TOKENS),
            output_tokens_per_second=rate(names.OUTPUT_TOKENS),
            usd_per_hour=rate(names.COST) * 3600,
            unpriced_per_second=rate(names.UNPRICED),
            cache_hit_ratio=figures.ratio(hits, hits + misses),
            running=max(figures.total(now, names.INFLIGHT) - figures.total(now, names.QUEUE), 0.0),
            queued=figures.total(now, names.QUEUE),
            places=figures.total(now, names.PLACES),
            loop_lag_seconds=max((figures.total(pod, names.LAG) for pod in pods), default=0.0),
            models=_models(risen, seconds),
            tenants=_tenants(risen, seconds),
            degraded=tuple(
                sorted({f for (f,), on in figures.by(now, names.DEGRADED, "feature").items() if on})
            ),
            circuits=_circuits(now),
            budgets=_budgets(pods),
        )


def _risen(before: Answer | None, after: Answer) -> Values:
    """How much one pod's counters rose; of one that was away it is not known in what time."""
    if before is None or isinstance(before, Away) or isinstance(after, Away):
        return {}
    if _began(before) != _began(after):
        before = {}  # a new process, however much it has counted already
    return figures.increases(_counters(before), _counters(after))


def _began(values: Values) -> float:
    return figures.total(values, names.BEGAN)


def _counters(values: Values) -> dict[Series, float]:
    return {series: value for series, value in values.items() if series.name in names.COUNTERS}


def _quantiles(risen: Values, name: str, **only: str) -> Quantiles:
    found = figures.buckets(risen, name, **only)
    return Quantiles(figures.quantile(0.5, found), figures.quantile(0.95, found))


def _versions(pods: Sequence[Values]) -> dict[str, int]:
    found: dict[str, int] = {}
    for pod in pods:
        for (version,) in figures.by(pod, names.BUILD, "version"):
            found[version] = found.get(version, 0) + 1
    return dict(sorted(found.items()))


def _outcomes(risen: Values, seconds: float) -> tuple[Outcome, ...]:
    counts = figures.by(risen, names.REQUESTS, "outcome")
    every = sum(counts.values())
    found = [Outcome(name, n / seconds, n / every) for (name,), n in counts.items() if n]
    return tuple(sorted(found, key=lambda o: -o.per_second))


def _models(risen: Values, seconds: float) -> tuple[Model, ...]:
    label = "gen_ai_request_model"
    requests = figures.by(risen, names.REQUESTS, label)
    given = figures.by(risen, names.INPUT_TOKENS, label)
    made = figures.by(risen, names.OUTPUT_TOKENS, label)
    cost = figures.by(risen, names.COST, label)
    found = [
        Model(
            model=key[0],
            requests_per_second=requests.get(key, 0.0) / seconds,
            tokens_per_second=(given.get(key, 0.0) + made.get(key, 0.0)) / seconds,
            usd_per_hour=cost.get(key, 0.0) * 3600 / seconds,
        )
        for key in requests.keys() | given.keys() | made.keys() | cost.keys()
        if requests.get(key) or given.get(key) or made.get(key) or cost.get(key)
    ]
    return tuple(sorted(found, key=lambda m: (-m.usd_per_hour, -m.requests_per_second, m.model)))


def _tenants(risen: Values, seconds: float) -> tuple[Tenant, ...]:
    found = [
        Tenant(name, usd * 3600 / seconds)
        for (name,), usd in figures.by(risen, names.COST, "tenant").items()
        if usd
    ]
    return tuple(sorted(found, key=lambda t: (-t.usd_per_hour, t.tenant)))


def _circuits(now: Values) -> tuple[Circuit, ...]:
    states = figures.by(now, names.CIRCUITS, "upstream", "model", "state")
    return tuple(sorted((Circuit(*key) for key, on in states.items() if on and key[2] != _CLOSED), key=str))


def _budgets(pods: Sequence[Values]) -> tuple[Budget, ...]:
    """A budget is one of the whole fleet: the pod that looked last knows it best, and it never shrinks."""
    fullest: dict[tuple[str, ...], float] = {}
    for pod in pods:
        for key, used in figures.by(pod, names.BUDGETS, "tenant", "key", "budget").items():
            fullest[key] = max(used, fullest.get(key, 0.0))
    found = [Budget(tenant, key, name, used) for (tenant, key, name), used in fullest.items()]
    return tuple(sorted(found, key=lambda b: (-b.used_ratio, b.tenant, b.key, b.budget)))
