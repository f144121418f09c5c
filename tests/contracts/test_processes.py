"""Several processes at one limit and one budget: they run apart, and Redis alone stands between them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Final

import pytest

from tests.performance import budgets, overadmission
from tests.redis_servers import Single

PROCESSES: Final = 4
START_SECONDS: Final = 60.0


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Started once, for that takes most of the time; and all wait until the last of them is there."""
    context = get_context("spawn")
    there = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, there.wait, (START_SECONDS,)) as pool:
        yield pool


def test_limits_of_requests_and_tokens_hold_to_the_last_one(
    redis_single: Single, pool: ProcessPoolExecutor
) -> None:
    assert overadmission.holds(redis_single, pool, PROCESSES, attempts=4_000, limit=500)


def test_a_budget_is_overspent_by_no_more_than_one_error_of_estimate(
    redis_single: Single, pool: ProcessPoolExecutor
) -> None:
    assert budgets.holds(redis_single, pool, PROCESSES, usd=50.0)
