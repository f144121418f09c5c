"""A panel's series with all that its JSON says of each: name, unit, colour, thresholds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dashboards.preview.units import shown
from tests.observability.dashboards import fill
from tests.observability.logql import matching
from tests.observability.prometheus import Prometheus, PrometheusError, Series

PALETTE: Final = (
    *("#73BF69", "#F2CC0C", "#8AB8FF", "#FF780A", "#F2495C", "#5794F2", "#B877D9"),
    *("#705DA0", "#37872D", "#FADE2A", "#447EBC", "#C15C17", "#890F02", "#0A437C"),
)
"""Colours of series that have none of their own, in their order."""
NAMED: Final = {
    "green": "#73BF69",
    "dark-green": "#37872D",
    "semi-dark-green": "#56A64B",
    "light-green": "#96D98D",
    "super-light-green": "#C8F2C2",
    "yellow": "#FADE2A",
    "dark-yellow": "#E0B400",
    "semi-dark-yellow": "#F2CC0C",
    "light-yellow": "#FFEE52",
    "orange": "#FF9830",
    "dark-orange": "#FA6400",
    "semi-dark-orange": "#FF780A",
    "light-orange": "#FFB357",
    "red": "#F2495C",
    "dark-red": "#C4162A",
    "semi-dark-red": "#E02F44",
    "light-red": "#FF7383",
    "blue": "#5794F2",
    "dark-blue": "#1F60C4",
    "semi-dark-blue": "#3274D9",
    "light-blue": "#8AB8FF",
    "super-light-blue": "#C0D8FF",
    "purple": "#B877D9",
    "dark-purple": "#8F3BB8",
    "semi-dark-purple": "#A352CC",
    "light-purple": "#CA95E5",
    "text": "#CCCCDC",
    "transparent": "#181B1F",
    "gray": "#8E8E9A",
    "white": "#FFFFFF",
}
EXEMPLARS: Final = 60
_PLACE: Final = re.compile(r"\{\{\s*(\w+)\s*\}\}")


class Field(NamedTuple):
    """One series as it is to be drawn."""

    name: str
    labels: dict[str, str]
    points: list[tuple[float, float]]
    config: dict[str, Any]
    """`unit`, `decimals`, `color`, `thresholds`, `mappings`, `custom`: defaults with overrides."""
    ref: str
    color: str

    @property
    def last(self) -> float:
        return self.points[-1][1] if self.points else math.nan

    @property
    def finite(self) -> list[float]:
        return [v for _, v in self.points if math.isfinite(v)]

    def calculated(self, calc: str) -> float:
        values = self.finite
        if not values:
            return math.nan
        function = _CALCS.get(calc)
        return function(values) if function else values[-1]

    def text(self, value: float) -> str:
        """A value with its unit, or the word that it is mapped to."""
        mapped = self.mapping(value)
        if mapped is not None and mapped.get("text"):
            return str(mapped["text"])
        if not math.isfinite(value) and math.isnan(value):
            return str(self.config.get("noValue") or "no data")
        return shown(value, self.config.get("unit") or "", self.config.get("decimals"))

    def mapping(self, value: float) -> dict[str, Any] | None:
        for mapping in self.config.get("mappings") or []:
            options = mapping.get("options") or {}
            if mapping["type"] == "value":
                for key in (f"{value:g}", str(value)):
                    if key in options:
                        found: dict[str, Any] = options[key]
                        return found
            elif mapping["type"] == "range" and (
                _or(options.get("from"), -math.inf) <= value <= _or(options.get("to"), math.inf)
            ):
                result: dict[str, Any] = options["result"]
                return result
            elif mapping["type"] == "special" and math.isnan(value) and "nan" in str(options.get("match")):
                special: dict[str, Any] = options["result"]
                return special
        return None

    def color_of(self, value: float) -> str:
        """By its mapping, else by the thresholds where these give the colour, else the series' own."""
        mapped = self.mapping(value)
        if mapped is not None and mapped.get("color"):
            return color(mapped["color"])
        if (self.config.get("color") or {}).get("mode") == "thresholds":
            return self.threshold_color(value)
        return self.color

    def threshold_color(self, value: float) -> str:
        found = NAMED["green"]
        for at, name in self.thresholds:
            if at is None or value >= at:
                found = color(name)
        return found

    @property
    def thresholds(self) -> list[tuple[float | None, str]]:
        """Steps; those of percent are of the range from `min` to `max`."""
        told = self.config.get("thresholds") or {}
        steps = [(step.get("value"), step["color"]) for step in told.get("steps") or []]
        if told.get("mode") != "percentage":
            return steps
        low, high = self.config.get("min") or 0.0, self.config.get("max") or 100.0
        return [(None if at is None else low + (high - low) * at / 100, name) for at, name in steps]


_CALCS: Final[Mapping[str, Callable[[list[float]], float]]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
    "sum": sum,
    "first": lambda values: values[0],
    "firstNotNull": lambda values: values[0],
    "last": lambda values: values[-1],
    "lastNotNull": lambda values: values[-1],
    "count": lambda values: float(len(values)),
    "range": lambda values: max(values) - min(values),
    "delta": lambda values: values[-1] - values[0],
}
CALC_NAMES: Final = {
    "lastNotNull": "Last",
    "last": "Last",
    "mean": "Mean",
    "max": "Max",
    "min": "Min",
    "sum": "Total",
}


class LogLine(NamedTuple):
    """A line of the log as a panel shows it."""

    time: str
    level: str
    text: str


class Mark(NamedTuple):
    """A moment that an annotation tells of."""

    at: float
    text: str
    color: str


class Source(NamedTuple):
    """Where the data are, and the variables with which the queries are filled."""

    prometheus: Prometheus
    lines: Sequence[Mapping[str, Any]]
    began: float
    ended: float
    step: float
    variables: Mapping[str, str]
    marks: Sequence[Mark] = ()

    def marked(self, document: Mapping[str, Any]) -> Source:
        """With the annotations of a dashboard; what held at the beginning already is no news."""
        found: list[Mark] = []
        for note in (document.get("annotations") or {}).get("list") or []:
            expression = note.get("expr") or (note.get("target") or {}).get("expr")
            if not expression:
                continue
            filled = fill(expression, self.variables)
            for series in self.prometheus.query_range(filled, self.began, self.ended, self.step):
                at = series.points[0][0]
                if at > self.began + 5 * self.step:
                    text = _PLACE.sub(
                        lambda m, s=series: s.labels.get(m[1], ""), note.get("titleFormat") or ""
                    )
                    found.append(Mark(at, text or note["name"], color(note.get("iconColor") or "blue")))
        return self._replace(marks=found)

    def exemplars(self, panel: dict[str, Any]) -> list[tuple[float, float]]:
        """Of the queries of a panel that ask for them, not more than the eye can tell apart."""
        found: list[tuple[float, float]] = []
        for target in panel.get("targets", []):
            if target.get("exemplar"):
                expression = fill(target["expr"], self.variables)
                for series in self.prometheus.exemplars(expression, self.began, self.ended):
                    found += [(float(e["timestamp"]), float(e["value"])) for e in series["exemplars"]]
        unique = sorted(set(found))
        return unique[:: max(1, len(unique) // EXEMPLARS)]

    def lines_of(self, panel: dict[str, Any]) -> list[LogLine]:
        found: list[LogLine] = []
        for target in panel.get("targets", []):
            for line, text in matching(fill(target["expr"], self.variables), self.lines):
                at = str(line["timestamp"]).replace("T", " ")[:23]
                found.append(LogLine(at, str(line["level"]), text or str(line["event"])))
        return sorted(found, reverse=True)

    def fields(self, panel: dict[str, Any]) -> list[Field]:
        """All series of a panel; those of a query that fails are told of and left out."""
        found: list[tuple[str, str, Series]] = []
        for target in panel.get("targets", []):
            if not target.get("expr") or target.get("hide"):
                continue
            expression = fill(target["expr"], self.variables)
            try:
                if target.get("instant") and not target.get("range"):
                    series = self.prometheus.query(expression, self.ended)
                else:
                    series = self.prometheus.query_range(expression, self.began, self.ended, self.step)
            except PrometheusError as error:
                print(f"{panel.get('title')}: {error}")
                continue
            if not target.get("instant"):  # else their order is the query's
                series.sort(key=lambda one: sorted(one.labels.items()))
            found += [(_name(target, one), target.get("refId", ""), one) for one in series]
        return [self._field(panel, name, ref, series, n) for n, (name, ref, series) in enumerate(found)]

    def _field(self, panel: dict[str, Any], name: str, ref: str, series: Series, number: int) -> Field:
        config = _config(panel, name, ref)
        shown_name = config.get("displayName") or name
        told = config.get("color") or {}
        own = (
            color(told["fixedColor"])
            if told.get("mode") in ("fixed", "shades") and told.get("fixedColor")
            else ""
        )
        labels = {k: v for k, v in series.labels.items() if k != "__name__"}
        return Field(
            _labelled(shown_name, labels),
            labels,
            series.points,
            config,
            ref,
            own or PALETTE[number % len(PALETTE)],
        )


def _config(panel: dict[str, Any], name: str, ref: str) -> dict[str, Any]:
    told = panel.get("fieldConfig") or {}
    config = dict(told.get("defaults") or {})
    config["custom"] = dict(config.get("custom") or {})
    for override in told.get("overrides") or []:
        if not _matches(override["matcher"], name, ref):
            continue
        for change in override["properties"]:
            key, value = change["id"], change.get("value")
            if key.startswith("custom."):
                config["custom"][key.removeprefix("custom.")] = value
            else:
                config[key] = value
    return config


def _matches(matcher: dict[str, Any], name: str, ref: str) -> bool:
    options = matcher.get("options")
    kind = matcher["id"]
    if kind == "byName":
        return bool(options == name)
    if kind == "byFrameRefID":
        return bool(options == ref)
    if kind == "byRegexp":
        return re.search(str(options).strip("/"), name) is not None
    return False


def _name(target: dict[str, Any], series: Series) -> str:
    legend = target.get("legendFormat") or ""
    if legend and legend != "__auto":
        return _PLACE.sub(lambda m: series.labels.get(m[1], ""), legend)
    labels = {k: v for k, v in series.labels.items() if k != "__name__"}
    if not labels:
        return "Value"
    if len(labels) == 1:
        return next(iter(labels.values()))
    return "{" + ", ".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}"


def _labelled(text: str, labels: Mapping[str, str]) -> str:
    """`${__field.labels.x}` in a display name."""
    return re.sub(r"\$\{__field\.labels\.(\w+)\}", lambda m: labels.get(m[1], ""), text)


def color(name: str) -> str:
    return NAMED.get(name, name if name.startswith("#") else NAMED["text"])


def columns(fields: Sequence[Field]) -> list[str]:
    """Names of labels of table rows, in order."""
    seen: dict[str, None] = {}
    for field in fields:
        seen.update(dict.fromkeys(field.labels))
    return list(seen)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
