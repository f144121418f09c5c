"""What a panel is, and how each kind is made: none without unit, description and a text for "no data"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from dashboards.queries import unseen

Kind = Literal["stat", "timeseries", "heatmap", "table", "bargauge", "state-timeline", "logs"]
Source = Literal["prometheus", "loki"]

SECONDS: Final = "s"
USD: Final = "currencyUSD"
SHARE: Final = "percentunit"
TOKENS_PER_SECOND: Final = "suffix: tok/s"
REQUESTS_PER_SECOND: Final = "reqps"
PER_SECOND: Final = "cps"
NUMBER: Final = "short"
BYTES: Final = "bytes"
NONE: Final = "none"


class Limit(NamedTuple):
    """From `value` on a number has this colour."""

    value: float
    color: str


@dataclass(frozen=True)
class Thresholds:
    """Colours of numbers, and why they change where they do."""

    base: str
    limits: tuple[Limit, ...] = ()
    reason: str = ""


PLAIN: Final = Thresholds("blue")
"""For numbers that are neither good nor bad by themselves."""


def above(bad: float, *, warn: float | None = None, reason: str) -> Thresholds:
    """Good below; red from `bad` on."""
    limits = (() if warn is None else (Limit(warn, "orange"),)) + (Limit(bad, "red"),)
    return Thresholds("green", limits, reason)


def below(bad: float, *, good: float | None = None, reason: str) -> Thresholds:
    """Red below `bad`, green from `good` on."""
    if good is None:
        return Thresholds("red", (Limit(bad, "green"),), reason)
    return Thresholds("red", (Limit(bad, "orange"), Limit(good, "green")), reason)


@dataclass(frozen=True)
class Target:
    """One query of a panel. In a table it is a column, with its legend as the column's name."""

    expr: str
    legend: str = ""
    exemplars: bool = False
    instant: bool = False
    source: Source = "prometheus"
    unit: str = ""
    """Of a column; else the panel's."""
    thresholds: Thresholds | None = None
    """Of a column."""


class Grid(NamedTuple):
    """Where a panel is: 24 columns, rows of about 38 pixels."""

    x: int
    y: int
    w: int
    h: int


class Link(NamedTuple):
    """Where a click on a value leads."""

    title: str
    url: str


class State(NamedTuple):
    """What a number of a state timeline means."""

    text: str
    color: str


@dataclass(frozen=True)
class Panel:
    """One panel, whole: what Grafana draws, and what its reader should make of it."""

    title: str
    kind: Kind
    unit: str
    targets: tuple[Target, ...]
    shows: str
    """What it shows."""
    good: str
    """What is good."""
    act: str
    """What to do where it is not."""
    empty: str
    """Why there may be no data."""
    short: str
    """The same in few words, where Grafana writes it in the place of a number."""
    width: int
    height: int
    thresholds: Thresholds = PLAIN
    stacked: bool = False
    minimum: float | None = None
    maximum: float | None = None
    decimals: int | None = None
    colors: tuple[tuple[str, str], ...] = ()
    """Of series by name."""
    states: tuple[tuple[int, State], ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    """Of a table: labels and what their columns are called, in this order."""
    sort: str = ""
    """Of a table: the column that it is sorted by, largest first."""
    links: tuple[Link, ...] = ()
    column_links: tuple[tuple[str, Link], ...] = ()
    id: int = 0
    dashboard: str = ""
    """The UID of the dashboard that it is on; set with `id` and `grid` when the dashboard is laid out."""
    grid: Grid = field(default=Grid(0, 0, 0, 0))

    @property
    def description(self) -> str:
        parts = [self.shows, f"**Good:** {self.good}", f"**If not:** {self.act}"]
        reasons = [self.thresholds.reason] if self.thresholds.reason else []
        reasons += [f"{t.legend}: {t.thresholds.reason}" for t in self.targets if t.thresholds is not None]
        if reasons:
            parts.insert(2, f"**Colours:** {' '.join(reasons)}")
        if self.short:
            parts.append(f"**No data:** {self.empty}")
        parts += self._unseen()
        return "\n\n".join(parts)

    def _unseen(self) -> list[str]:
        found = {what for target in self.targets for what in unseen(target.expr)}
        if not found:
            return []
        text = (
            "**Not seen:** a pod's first {} of each set of labels, which come together with their series; "
            "sums are lower bounds."
        ).format(" and ".join(sorted(found)))
        books = " The books are at `/api/v1/usage`." if found & {"dollars", "tokens"} else ""
        return [text + books]


class Words(NamedTuple):
    """What every panel says of itself; see Panel."""

    shows: str
    good: str
    act: str
    empty: str
    short: str = ""


def stat(
    title: str,
    expr: str,
    words: Words,
    *,
    unit: str,
    thresholds: Thresholds = PLAIN,
    width: int = 3,
    height: int = 4,
    instant: bool = False,
    decimals: int | None = None,
    states: tuple[tuple[int, State], ...] = (),
    links: tuple[Link, ...] = (),
) -> Panel:
    """One large number: of now with its course behind it, or of the whole range (`instant`)."""
    return Panel(
        title,
        "stat",
        unit,
        (Target(expr, title, instant=instant),),
        *words,
        width=width,
        height=height,
        thresholds=thresholds,
        decimals=decimals,
        states=states,
        links=links,
    )


def timeseries(
    title: str,
    targets: list[tuple[str, str]],
    words: Words,
    *,
    unit: str,
    thresholds: Thresholds = PLAIN,
    width: int = 12,
    height: int = 8,
    stacked: bool = False,
    exemplars: bool = False,
    minimum: float | None = 0,
    maximum: float | None = None,
    colors: tuple[tuple[str, str], ...] = (),
    links: tuple[Link, ...] = (),
) -> Panel:
    """Courses over time; targets are pairs of query and legend."""
    return Panel(
        title,
        "timeseries",
        unit,
        tuple(Target(expr, legend, exemplars=exemplars) for expr, legend in targets),
        *words,
        width=width,
        height=height,
        thresholds=thresholds,
        stacked=stacked,
        minimum=minimum,
        maximum=maximum,
        colors=colors,
        links=links,
    )


def heatmap(
    title: str,
    expr: str,
    words: Words,
    *,
    unit: str,
    width: int = 12,
    height: int = 8,
    links: tuple[Link, ...] = (),
) -> Panel:
    """The buckets of a histogram over time, with exemplars; `expr` keeps `le` alone."""
    target = Target(expr, "{{le}}", exemplars=True)
    return Panel(title, "heatmap", unit, (target,), *words, width=width, height=height, links=links)


def bargauge(
    title: str,
    targets: list[tuple[str, str]],
    words: Words,
    *,
    unit: str,
    thresholds: Thresholds = PLAIN,
    width: int = 6,
    height: int = 8,
    minimum: float | None = 0,
    maximum: float | None = None,
    decimals: int | None = None,
) -> Panel:
    """Numbers of now, or of the range, as bars beside each other."""
    return Panel(
        title,
        "bargauge",
        unit,
        tuple(Target(expr, legend, instant=True) for expr, legend in targets),
        *words,
        width=width,
        height=height,
        thresholds=thresholds,
        minimum=minimum,
        maximum=maximum,
        decimals=decimals,
    )


def table(
    title: str,
    columns: list[Target],
    names: list[tuple[str, str]],
    words: Words,
    *,
    sort: str = "",
    unit: str = NUMBER,
    width: int = 12,
    height: int = 8,
    column_links: tuple[tuple[str, Link], ...] = (),
) -> Panel:
    """A row for each combination of the labels in `names`, joined over all columns."""
    return Panel(
        title,
        "table",
        unit,
        tuple(columns),
        *words,
        width=width,
        height=height,
        names=tuple(names),
        sort=sort,
        column_links=column_links,
    )


def column(expr: str, name: str, unit: str, thresholds: Thresholds | None = None) -> Target:
    return Target(expr, name, instant=True, unit=unit, thresholds=thresholds)


def timeline(
    title: str,
    targets: list[tuple[str, str]],
    words: Words,
    *,
    states: tuple[tuple[int, State], ...],
    width: int = 12,
    height: int = 8,
) -> Panel:
    """States over time, one line for each series."""
    return Panel(
        title,
        "state-timeline",
        NONE,
        tuple(Target(expr, legend) for expr, legend in targets),
        *words,
        width=width,
        height=height,
        states=states,
    )


def log_lines(title: str, query: str, words: Words, *, width: int = 24, height: int = 8) -> Panel:
    """Lines of Weir's log."""
    return Panel(title, "logs", NONE, (Target(query, source="loki"),), *words, width=width, height=height)
