"""The run that all tests here look at."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.observability.run import SHORT, Run, run
from tests.programs import need

pytest.register_assert_rewrite("tests.observability.checks")


@pytest.fixture(scope="package")  # with it ends a Prometheus that has much to do
def traffic_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    for program in ("prometheus", "promtool", "redis-server", "initdb"):
        need(program)
    with ExitStack() as stack:
        yield asyncio.run(run(tmp_path_factory.mktemp("run"), SHORT, stack))
