"""Weir as it is after 50 models were asked by 200 tenants: what a scrape of its metrics is measured on.

Run as `python -m tests.performance.crowded`, with the environment of `python -m service`.
"""

from __future__ import annotations

import sys
from typing import Any

import service.app
from service.__main__ import main
from service.telemetry import Metrics
from tests.crowd import fill


class CrowdedMetrics(Metrics):
    """With all the series that there may be."""

    def __init__(self, *known: Any, **more: Any) -> None:
        super().__init__(*known, **more)
        fill(self)


if __name__ == "__main__":
    setattr(service.app, "Metrics", CrowdedMetrics)  # noqa: B010  # no assignment to a type that mypy knows
    sys.exit(main())
