"""A dashboard: its panels in sections, and where each comes to lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from dashboards.panels import Grid, Panel
from dashboards.queries import variables

COLUMNS: Final = 24


class Section(NamedTuple):
    """Panels below a heading, or without one: the first row of a dashboard needs none."""

    title: str
    panels: Sequence[Panel]


class Heading(NamedTuple):
    title: str
    id: int
    grid: Grid


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    description: str
    sections: Sequence[Section]
    hours: int = 6
    """The time that it shows at first."""
    refresh: str = "1m"

    @property
    def name(self) -> str:
        """Of its file."""
        return self.uid.removeprefix("weir-")

    def items(self) -> Iterator[Heading | Panel]:
        """Headings and panels from top to bottom, each in its place: panels fill lines of 24 columns."""
        number, y = 0, 0
        for section in self.sections:
            if section.title:
                number += 1
                yield Heading(section.title, number, Grid(0, y, COLUMNS, 1))
                y += 1
            x = tallest = 0
            for panel in section.panels:
                if x + panel.width > COLUMNS:
                    x, y, tallest = 0, y + tallest, 0
                number += 1
                grid = Grid(x, y, panel.width, panel.height)
                yield replace(panel, id=number, dashboard=self.uid, grid=grid)
                x, tallest = x + panel.width, max(tallest, panel.height)
            y += tallest

    def panels(self) -> list[Panel]:
        return [item for item in self.items() if isinstance(item, Panel)]

    def variables(self) -> set[str]:
        """Those that its queries and links know."""
        found = {"datasource"}
        for panel in self.panels():
            texts = [target.expr for target in panel.targets] + [link.url for link in panel.links]
            found |= {name for text in texts for name in variables(text) if not name.startswith("__")}
            found |= {"loki" for target in panel.targets if target.source == "loki"}
        return found
