"""The arithmetic of metrics: how much counters rose, and quantiles of histograms. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias


class Series(NamedTuple):
    """What tells one value of the metrics from all others."""

    name: str
    labels: tuple[tuple[str, str], ...]
    """By their names, in order."""

    def label(self, name: str) -> str:
        return next((value for key, value in self.labels if key == name), "")


Values: TypeAlias = Mapping[Series, float]


def increases(before: Values, after: Values) -> dict[Series, float]:
    """How much each counter rose.

    One that fell has begun anew, so all that it counts came since; the same holds for one that was not there.
    """
    risen = {}
    for series, now in after.items():
        then = before.get(series, 0.0)
        risen[series] = now - then if now >= then else now
    return risen


def added(parts: Iterable[Values]) -> dict[Series, float]:
    """Each series' sum over all parts: of pods, or of steps in time."""
    sums: dict[Series, float] = {}
    for part in parts:
        for series, value in part.items():
            sums[series] = sums.get(series, 0.0) + value
    return sums


def total(values: Values, name: str, **labels: str) -> float:
    """The sum of a metric over all its series with these labels."""
    wanted = labels.items()
    return sum(
        value
        for series, value in values.items()
        if series.name == name and all(label in series.labels for label in wanted)
    )


def by(values: Values, name: str, *labels: str, **only: str) -> dict[tuple[str, ...], float]:
    """A metric's sums for each combination of these labels' values, over series with the labels `only`."""
    sums: dict[tuple[str, ...], float] = {}
    wanted = only.items()
    for series, value in values.items():
        if series.name == name and all(label in series.labels for label in wanted):
            key = tuple(map(series.label, labels))
            sums[key] = sums.get(key, 0.0) + value
    return sums


def buckets(values: Values, name: str, **only: str) -> dict[float, float]:
    """A histogram's cumulative buckets by their upper edge, over its series with these labels."""
    found: dict[float, float] = {}
    for (edge,), count in by(values, f"{name}_bucket", "le", **only).items():
        found[float(edge)] = count
    return found


def quantile(share: float, cumulative: Mapping[float, float]) -> float | None:
    """The value below which this share of the observations lies; None without observations.

    As Prometheus reckons it: the observations of a bucket are taken to lie evenly in it, and what is above
    the highest edge to lie at it.
    """
    edges = sorted(cumulative)
    if not edges:
        return None
    count = max(cumulative.values())
    if count <= 0:
        return None
    rank = share * count
    below, below_edge = 0.0, 0.0
    for edge in edges:
        reached = max(cumulative[edge], below)  # pods that were asked at different times may disagree
        if reached >= rank and reached > below:
            if math.isinf(edge):
                return below_edge
            return below_edge + (edge - below_edge) * (rank - below) / (reached - below)
        below, below_edge = reached, edge if math.isfinite(edge) else below_edge
    return below_edge


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
