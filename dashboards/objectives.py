"""The service level objectives as panels need them: docs/slo.md says what they are."""

from __future__ import annotations

from typing import Final

from dashboards.panels import Limit, Thresholds
from dashboards.queries import select

OBJECTIVES: Final = (("availability", "availability"), ("ttft", "first token"), ("streams", "streams"))
"""The names of the recorded series, and what people call them."""

BURN: Final = Thresholds(
    "green",
    (Limit(1, "yellow"), Limit(6, "orange"), Limit(14.4, "red")),
    "at 1 the budget is spent in 30 days; from 6 over six hours or 14.4 over one hour somebody is paged.",
)


def budget_left(objective: str) -> str:
    """The share of 30 days' error budget that is left; of several installations the least."""
    return f"min({select(f'weir:{objective}:error_budget_remaining_ratio')})"
