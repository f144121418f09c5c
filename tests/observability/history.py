"""A month before the run, for Prometheus: so that panels over days, and against last week, have data.

The series are those of a pod as they are after its first requests, names and labels to the last one; the pod
has another name, and the numbers are made up: each counter grows as a daily wave says. What rules
would have recorded is there too, as far as other rules look back on it for days. The history ends more than
an hour before the run, so nothing that looks back an hour or less sees it.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from tests.programs import need

HOUR, DAY = 3600, 86400
COUNTED_DAYS, RECORDED_DAYS = 8, 29
"""How far back counters go, and what rules have recorded."""
ENDS_SECONDS: Final = 65 * 60
"""Before now."""
STEP_SECONDS: Final = 30 * 60
FINE_SECONDS: Final = 60
"""Around the same time of other days, which panels look at with `offset`."""
FINEST_SECONDS, FINEST_ROOM = 5, 300
"""A week ago, for rates over as short a window as the run's."""
POD: Final = "weir-5c8b6d7f9-hq7vj"
COUNTED: Final = ("weir_requests", "weir_cost_usd", "gen_ai_client_inference_usage_")
"""Beginnings of the counters that panels over days look at; the others would only take time."""
PER_DAY: Final = 3_000.0
"""How many times what the first requests were."""
RECORDED: Final = {
    "weir:availability:valid_rate5m": 40.0,
    "weir:availability:bad_rate5m": 40.0 * 0.0003,
    "weir:ttft:valid_rate5m": 24.0,
    "weir:ttft:bad_rate5m": 24.0 * 0.008,
    "weir:streams:valid_rate5m": 24.0,
    "weir:streams:bad_rate5m": 24.0 * 0.0004,
    "weir:cost_usd:rate5m": 0.0023,
    "weir:cost_usd:rate1h": 0.0023,
}
"""Their mean, a second."""


def write_blocks(text: str, labels: Mapping[str, str], now: float, directory: Path) -> Path:
    """The history of the series in `text`, one pod's metrics, as blocks in a new directory."""
    program = need("promtool")
    source, blocks = directory / "history.om", directory / "blocks"
    with source.open("w") as file:
        file.writelines(_counted(text, {**labels, "pod": POD}, now))
        file.writelines(_recorded({k: labels[k] for k in ("cluster", "namespace", "job")}, now))
        file.write("# EOF\n")
    subprocess.run(
        [
            *(program, "tsdb", "create-blocks-from", "openmetrics"),
            *("--max-block-duration=360h", "--quiet", str(source), str(blocks)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    source.unlink()
    return blocks


def moments(now: float) -> list[int]:
    """When counters have a sample: each half hour, and each minute around the same time of other days."""
    first, last = now - COUNTED_DAYS * DAY, now - ENDS_SECONDS
    coarse = (first + i * STEP_SECONDS for i in range(int((last - first) // STEP_SECONDS) + 1))
    fine = (
        now - days * DAY + minute * FINE_SECONDS
        for days in range(1, COUNTED_DAYS)
        for minute in range(-35, 15)
    )
    week = now - 7 * DAY
    finest = (week + at for at in range(-FINEST_ROOM // 5, FINEST_ROOM, FINEST_SECONDS))
    return sorted({round(at) for at in (*coarse, *fine, *finest, last) if first <= at <= last})


def wave(at: float) -> float:
    """How busy a time of day is, 1 in the mean."""
    return 1 + 0.5 * math.sin(2 * math.pi * at / DAY - math.pi / 2)


def grown(at: float, now: float) -> float:
    """How far a counter has come by then, in days of traffic: the wave added up, and 2 % more a day."""
    begun = now - COUNTED_DAYS * DAY
    days = (at - begun) / DAY
    turn = 2 * math.pi / DAY
    bend = (math.cos(turn * begun - math.pi / 2) - math.cos(turn * at - math.pi / 2)) / (2 * math.pi)
    return (days + 0.5 * bend) * (1 + 0.02 * days)


def _counted(text: str, labels: Mapping[str, str], now: float) -> Iterator[str]:
    at = moments(now)
    for family in text_string_to_metric_families(text):
        if family.type != "counter" or not family.name.startswith(COUNTED):
            continue
        yield f"# TYPE {family.name} counter\n"
        for sample in family.samples:
            shown = _shown({**sample.labels, **labels})
            for moment in at:
                yield f"{sample.name}{shown} {sample.value * PER_DAY * grown(moment, now):.6g} {moment}\n"


def _recorded(labels: Mapping[str, str], now: float) -> Iterator[str]:
    first, last = round(now - RECORDED_DAYS * DAY), round(now - ENDS_SECONDS)
    for name, mean in RECORDED.items():
        yield f"# TYPE {name} gauge\n"
        for moment in range(first, last, 300):
            yield f"{name}{_shown(labels)} {mean * wave(moment):.6g} {moment}\n"


def _shown(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
