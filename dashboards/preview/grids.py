"""Heatmaps and timelines of states."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from dashboards.preview.canvas import PANEL, TEXT, Box, Canvas, cut, plain, width
from dashboards.preview.fields import Field, Source
from dashboards.preview.series import draw_marks, draw_times
from dashboards.preview.units import shown

MOST_LINE: Final = 56.0
"""Pixels of a line of states."""
CELL: Final = 9.0
"""Pixels of a cell, about."""
POINTS: Final = "#FF40FF"
"""Of exemplars on a heatmap, as the dashboards colour them."""
HEAT: Final = LinearSegmentedColormap.from_list(
    "heat", ["#2B2420", "#5E3417", "#A04D0F", "#E0752D", "#FF9830", "#FFCB7D", "#FFF3E0"]
)


def draw_heatmap(
    canvas: Canvas, panel: dict[str, Any], box: Box, fields: list[Field], source: Source
) -> None:
    """Of series with `le`, or with ready buckets as names."""
    buckets = sorted(
        ((float(f.labels.get("le", f.name).replace("+Inf", "inf")), f) for f in fields if _is_edge(f)),
        key=lambda pair: pair[0],
    )
    columns = round((source.ended - source.began) / source.step) + 1
    table = np.zeros((len(buckets), columns))
    for row, (_, field) in enumerate(buckets):
        for at, value in field.points:
            index = round((at - source.began) / source.step)
            if 0 <= index < columns and math.isfinite(value):
                table[row, index] = value
    table = np.maximum(np.diff(table, axis=0, prepend=0.0), 0.0)
    together = max(1, round(columns / (box.width / CELL)))
    columns //= together
    table = table[:, : columns * together].reshape(len(buckets), columns, together).mean(axis=2)
    used = [i for i in range(len(buckets)) if table[i].max(initial=0.0) > 0] or [0, len(buckets) - 1]
    low, high = max(used[0] - 1, 0), min(used[-1] + 1, len(buckets) - 1)
    table, edges = table[low : high + 1], [edge for edge, _ in buckets[low : high + 1]]
    told = (panel.get("options") or {}).get("yAxis") or {}
    unit = told.get("unit") or fields[0].config.get("unit") or ""
    labels = [("≤ " + shown(edge, unit)) if math.isfinite(edge) else "more" for edge in edges]
    room = max(width(label, 11) for label in labels) + 14
    axes = canvas.axes(Box(box.x + room, box.y + 4, box.width - room - 8, box.height - 26))
    axes.grid(False)
    shades = np.ma.masked_less_equal(np.sqrt(table), 0)
    axes.pcolormesh(
        np.linspace(source.began - source.step / 2, source.ended + source.step / 2, columns + 1),
        np.arange(len(edges) + 1),
        shades,
        cmap=HEAT,
        edgecolors=PANEL,
        linewidth=0.4,
    )
    axes.set_ylim(0, len(edges))
    every = max(1, math.ceil(len(edges) * 15 / max(box.height - 26, 1)))
    axes.set_yticks([i + 0.5 for i in range(0, len(edges), every)])
    axes.set_yticklabels([plain(labels[i]) for i in range(0, len(edges), every)])
    draw_times(axes, source)
    _exemplars(axes, panel, edges, source)
    draw_marks(axes, source)


def _exemplars(axes: Axes, panel: dict[str, Any], edges: list[float], source: Source) -> None:
    """Each in its cell: as far up as its value is between the edges of its bucket."""
    for at, value in source.exemplars(panel):
        row = bisect_left(edges, value)
        if row < len(edges):
            low = edges[row - 1] if row else 0.0
            part = (value - low) / (edges[row] - low) if math.isfinite(edges[row]) else 0.5
            axes.plot([at], [row + part], "D", color=POINTS, markersize=2.5, markeredgewidth=0)


def _is_edge(field: Field) -> bool:
    return re.fullmatch(r"\+Inf|[0-9.e+-]+", field.labels.get("le", field.name)) is not None


def draw_states(canvas: Canvas, panel: dict[str, Any], box: Box, fields: list[Field], source: Source) -> None:
    """A line for each series: how long it was in which state."""
    room = min(max(width(f.name, 11) for f in fields) + 14, box.width * 0.35)
    tall = min(box.height - 26, len(fields) * MOST_LINE)
    axes = canvas.axes(Box(box.x + room, box.y + 4, box.width - room - 8, tall))
    axes.grid(False)
    pixels = (box.width - room - 8) / (source.ended - source.began)
    for row, field in enumerate(reversed(fields)):
        for begin, end, value in _runs(field, source.step):
            axes.barh(row, end - begin, left=begin, height=0.72, color=field.color_of(value), alpha=0.85)
            text = field.text(value)
            if width(text, 11) < (end - begin) * pixels - 10:
                axes.text((begin + end) / 2, row, plain(text), color=TEXT, ha="center", va="center")
    axes.set_ylim(-0.6, len(fields) - 0.4)
    axes.set_yticks(range(len(fields)))
    axes.set_yticklabels([plain(cut(f.name, 11, room - 12)) for f in reversed(fields)])
    draw_times(axes, source)
    draw_marks(axes, source)


def _runs(field: Field, step: float) -> list[tuple[float, float, float]]:
    """From when until when a series had which value."""
    found: list[tuple[float, float, float]] = []
    for at, value in field.points:
        if not math.isfinite(value):
            continue
        if found and found[-1][2] == value and at - found[-1][1] < step / 2:
            found[-1] = (found[-1][0], at + step, value)
        else:
            found.append((at, at + step, value))
    return found
