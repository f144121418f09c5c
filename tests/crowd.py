"""What many models and tenants leave in the metrics of one process: made without asking anybody."""

from __future__ import annotations

from itertools import product
from typing import Any, Final

from service.domain import (
    AttemptKind,
    BudgetState,
    CacheUse,
    Cost,
    Operation,
    Outcome,
    Principal,
    RequestRecord,
    Standing,
    Usage,
)
from service.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable, WeirError
from service.routing.breaker import Circuit
from service.telemetry import Metrics
from service.telemetry.recorder import ERROR_TYPES

MODELS: Final = tuple(f"model-{n}" for n in range(50))
TENANTS: Final = tuple(f"tenant-{n}" for n in range(200))
CODES: Final = tuple(sorted(ERROR_TYPES))
ROUTES: Final = ("/v1/chat/completions", "/api/v1/chat")
_ERRORS: Final[tuple[WeirError, ...]] = (
    UpstreamUnavailable("no"),
    UpstreamTimeout("late"),
    UpstreamError("broken"),
)


def record(**fields: Any) -> RequestRecord:
    """A good one, but for these fields."""
    known: dict[str, Any] = {
        "id": "1",
        "request_id": "r",
        "route": "/v1/chat/completions",
        "operation": Operation.CHAT,
        "outcome": Outcome.SUCCESS,
        "request_model": "asked",
        "response_model": "answered",
        "provider": "openai",
        "upstream": "openai",
        "attempts": 1,
    }
    return RequestRecord(**known | fields)


def all_of(metrics: Metrics, done: RequestRecord) -> None:
    """A request's whole way: attempts, the pace of its stream, its end."""
    metrics.opened()
    good = done.outcome is Outcome.SUCCESS
    error = None if good else _ERRORS[len(done.request_model) % len(_ERRORS)]
    metrics.attempted(done, error, AttemptKind.FIRST, 0.1, done.response_model)
    if done.stream and good:
        metrics.pace(done, done.response_model)(0.02, 1)
    metrics.closed(done)
    if done.stream:
        metrics.streamed(done, 0.2)


def fill(metrics: Metrics) -> int:
    """Each tenant asks each model once, and each model fails in every way; the number of requests."""
    asked = 0
    for number, (model, tenant) in enumerate(product(MODELS, TENANTS)):
        done = record(
            request_model=model,
            response_model=model,
            route=ROUTES[number % 2],
            stream=number % 3 > 0,
            principal=Principal(f"{tenant}-key-{number % 5}", tenant),
            usage=Usage(10, 5, 1, 1, 1, 1, 1),
            cost=Cost(1.0, "genai-prices"),
            cache=CacheUse.MISS,
            time_to_first_token_seconds=0.5,
            time_per_output_token_seconds=0.01,
            overhead_seconds=0.001,
            trace_id=f"{number + 1:032x}",
            sampled=number % 10 == 0,
        )
        all_of(metrics, done)
        asked += 1
    for model, outcome, code in product(MODELS, Outcome, CODES[::5]):
        if outcome is not Outcome.SUCCESS:
            principal = Principal("key", TENANTS[asked % len(TENANTS)])
            failed = record(
                request_model=model,
                response_model="",
                outcome=outcome,
                error_code=code,
                principal=principal,
            )
            all_of(metrics, failed)
            asked += 1
    for tenant in TENANTS:
        state = BudgetState("month", "", used_ratio=0.5, remaining_usd=1.0, warns=False)
        metrics.standing(record(principal=Principal("k", tenant)), Standing(budgets=(state,)))
    for model in MODELS:
        metrics.circuit("openai", model, Circuit.OPEN)
    return asked
