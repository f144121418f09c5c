"""A panel: its frame, its title, and what its kind draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from dashboards.preview.canvas import WEAK, Box, Canvas
from dashboards.preview.fields import Field, Source
from dashboards.preview.grids import draw_heatmap, draw_states
from dashboards.preview.series import draw_series
from dashboards.preview.tables import draw_lines, draw_table
from dashboards.preview.values import draw_bars, draw_numbers

TITLE: Final = 32
"""Pixels of a panel's title."""


def draw(canvas: Canvas, panel: dict[str, Any], box: Box, source: Source) -> None:
    """A panel with its frame and its title."""
    canvas.panel(box)
    canvas.text(box.x + 10, box.y + 17, panel.get("title") or "", size=13, bold=True, room=box.width - 20)
    inner = Box(box.x + 8, box.y + TITLE, box.width - 16, box.height - TITLE - 8)
    if panel["type"] == "logs":
        lines = source.lines_of(panel)
        if lines:
            draw_lines(canvas, inner, lines)
            return
    else:
        fields = source.fields(panel)
        if any(field.points for field in fields):
            _KINDS[panel["type"]](canvas, panel, inner, fields, source)
            return
    note = (panel.get("fieldConfig", {}).get("defaults") or {}).get("noValue") or "No data"
    middle = inner.x + inner.width / 2, inner.y + inner.height / 2
    canvas.text(*middle, note, size=12, color=WEAK, align="center", room=inner.width)


_Draw = Callable[[Canvas, dict[str, Any], Box, list[Field], Source], None]
_KINDS: Final[dict[str, _Draw]] = {
    "timeseries": draw_series,
    "stat": draw_numbers,
    "bargauge": draw_bars,
    "heatmap": draw_heatmap,
    "table": draw_table,
    "state-timeline": draw_states,
}
