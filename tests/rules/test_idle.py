"""A Weir that nobody asks for anything wakes nobody, by its real metrics."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.middleware import MODEL_ROUTES
from service.telemetry import Metrics
from service.worker.metrics import SinkMetrics
from tests.rules.files import RULES, groups, promtool

HOURS = 27
STEP_MINUTES = 5


def series(registry: CollectorRegistry, job: str) -> list[dict[str, str]]:
    """Each sample of a registry as promtool's input: it stays as it is."""
    return [
        {
            "series": sample.name + _braces(sample.labels | {"job": job, "namespace": "apps", "pod": job}),
            "values": f"{sample.value}x{HOURS * 60 // STEP_MINUTES}",
        }
        for family in registry.collect()
        for sample in family.samples
    ]


def _braces(labels: dict[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def service() -> CollectorRegistry:
    """As it is after its start, with Redis."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1.2.3", ["gpt-4o"])
    metrics.expect(MODEL_ROUTES)
    metrics.config_read(good=True)
    metrics.shared_state(True)
    metrics.prices_known(time.time() - 30 * 86_400)
    metrics.beat(0.001, places=512)
    return registry


def worker(*, postgres: bool) -> CollectorRegistry:
    """As it is when it has looked for both of its ends."""
    registry = CollectorRegistry()
    metrics = SinkMetrics(registry)
    metrics.available("redis", well=True)
    metrics.available("postgres", well=postgres)
    return registry


@pytest.mark.parametrize("postgres", [True, False])
def test_no_alert_is_even_pending_but_that_of_a_missing_part(postgres: bool, tmp_path: Path) -> None:
    told = [{"labels": '{alertname="WeirSinkUnavailable"}', "value": 1}]
    case = {
        "rule_files": [str(path) for path in RULES],
        "evaluation_interval": f"{STEP_MINUTES}m",
        "group_eval_order": [group["name"] for group in groups()],
        "tests": [
            {
                "interval": f"{STEP_MINUTES}m",
                "input_series": series(service(), "weir") + series(worker(postgres=postgres), "weir-worker"),
                "promql_expr_test": [
                    {
                        "expr": "count by (alertname) (ALERTS)",
                        "eval_time": f"{hours}h",
                        "exp_samples": [] if postgres else told,
                    }
                    for hours in (1, 26)
                ],
            }
        ],
    }
    path = tmp_path / "idle.yaml"
    path.write_text(yaml.safe_dump(case))
    promtool("test", "rules", path)
