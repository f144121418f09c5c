"""The whole run: pods, traffic, a Prometheus that scrapes them, and what is left at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from tests.observability.history import write_blocks
from tests.observability.prometheus import Prometheus, rule_groups
from tests.observability.script import waves
from tests.observability.traffic import LogLines, Plan, Traffic, Truth

SHORT: Final = Plan(
    seconds=32.0,
    rate=waves(45, 12, 15),
    fault_share=0.15,
    bad_config_at=3.0,
    good_config_at=6.0,
    outage=(8.0, 11.0),
    rush_at=5.0,
    deploy_at=16.0,
)
"""For the tests: all faults, in half a minute."""


LONG: Final = Plan(
    seconds=170.0,
    rate=waves(42, 16, 85),
    fault_share=0.025,
    bad_config_at=40.0,
    good_config_at=55.0,
    outage=(100.0, 112.0),
    rush_at=22.0,
    deploy_at=78.0,
)
"""For pictures: waves of traffic, and room between the events."""


class Samples:
    """The samples of several registries, added up as `sum()` does."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._samples = [
            (sample.name, sample.labels, sample.value)
            for text in texts.values()
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
        self.types = {
            family.name: family.type
            for text in texts.values()
            for family in text_string_to_metric_families(text)
        }

    def sum(self, name: str, **labels: str) -> float:
        return sum(
            value
            for found, own, value in self._samples
            if found == name and all(own.get(k, "") == v for k, v in labels.items())
        )

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Sums by the values of these labels, without zeros."""
        found: dict[tuple[str, ...], float] = {}
        for given, own, value in self._samples:
            if given == name and value:
                key = tuple(own.get(label, "") for label in labels)
                found[key] = found.get(key, 0.0) + value
        return found

    def names(self) -> dict[str, set[str]]:
        """Names of samples, with the labels that they have."""
        found: dict[str, set[str]] = {}
        for name, own, _ in self._samples:
            found.setdefault(name, set()).update(own)
        return found


@dataclass
class Run:
    """What is left of a run; its Prometheus still answers."""

    prometheus: Prometheus
    truth: Truth
    began: float
    """Of the main part, seconds since 1970."""
    ended: float
    """Prometheus has scraped all that the pods had to say."""
    samples: Samples
    """The pods' metrics at their end."""
    opened: Samples
    """Theirs when each had its part of the run before it: what no rate sees."""
    per_pod: dict[str, Samples]
    worker: Samples
    ledger: list[dict[str, Any]]
    usage: dict[str, Any]
    lines: list[LogLines]
    provider_calls: dict[str, int]
    traces: set[str]
    """Ids of those that the collector was sent."""


async def run(directory: Path, plan: Plan, stack: ExitStack, **options: Any) -> Run:
    """Do it all; the Prometheus ends with `stack`."""
    traffic = Traffic(directory, plan, **options)
    try:
        await traffic.start()
        labels = dict(traffic.targets()[-1].labels)
        blocks = await asyncio.to_thread(
            write_blocks, next(iter(traffic.metrics().values())), labels, time.time(), directory
        )
        prometheus = stack.enter_context(Prometheus(directory / "prometheus", rule_groups(), blocks))
        traffic.on_pods = prometheus.targets
        traffic.until_scraped = lambda pod: _scraped(prometheus, [pod])
        prometheus.targets(traffic.targets())
        await asyncio.to_thread(prometheus.until, lambda: _seen(prometheus, traffic), "pods were not scraped")
        began = time.time()
        # All that comes now lies between two scrapes: a rate sees it whole.
        await asyncio.to_thread(_scraped, prometheus, traffic.scraped())
        await traffic.main()
        await asyncio.to_thread(_scraped, prometheus, traffic.scraped())
        await asyncio.to_thread(_evaluated, prometheus, time.time())
        ended = time.time()
        texts, worker = traffic.metrics(), traffic.worker_metrics()
        ledger, usage = traffic.ledger(), traffic.usage("tenant")
    finally:
        await traffic.close()
    prometheus.targets([])
    return Run(
        prometheus=prometheus,
        truth=traffic.truth,
        began=began,
        ended=ended,
        samples=Samples(texts),
        opened=Samples(traffic.opened),
        per_pod={name: Samples({name: text}) for name, text in texts.items()},
        worker=Samples({"worker": worker}),
        ledger=ledger,
        usage=usage,
        lines=traffic.lines(),
        traces={span.trace_id for span in traffic.collector.spans},
        provider_calls={name: provider.calls_seen for name, provider in traffic.providers.items()},
    )


def _seen(prometheus: Prometheus, traffic: Traffic) -> bool:
    """Prometheus has all requests that the pods have counted."""
    counted = Samples(traffic.metrics()).sum("weir_requests_total")
    return prometheus.value("sum(last_over_time(weir_requests_total[50m]))") == counted


def _scraped(prometheus: Prometheus, pods: Sequence[str]) -> None:
    """Returns when these pods have been scraped once more, from the beginning of the scrape on."""
    since = time.time()

    def done() -> bool:
        found = prometheus.query("max by (pod) (timestamp(weir_build_info))")
        at = {series.labels["pod"]: series.value for series in found}
        return all(at.get(pod, 0.0) > since for pod in pods)

    prometheus.until(done, f"{pods} were not scraped")


def _evaluated(prometheus: Prometheus, since: float) -> None:
    """Returns when all rules have been evaluated twice: some read what others have recorded."""

    def done() -> bool:
        times = [_seconds(rule["lastEvaluation"]) for rule in prometheus.rules()]
        return all(at > since for at in times)

    prometheus.until(done, "rules were not evaluated")
    since = time.time()
    prometheus.until(done, "rules were not evaluated")


def _seconds(text: str) -> float:
    # Prometheus writes nanoseconds, which Python does not read.
    head, _, rest = text.partition(".")
    zone = rest.lstrip("0123456789") or "+00:00"
    return datetime.fromisoformat(head + zone.replace("Z", "+00:00")).timestamp()
