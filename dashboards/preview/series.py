"""Time series, and the legends below or beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from dashboards.preview.canvas import POINT, WEAK, Box, Canvas, plain, width
from dashboards.preview.fields import CALC_NAMES, Field, Source, color
from dashboards.preview.units import shown, size_of

LEGEND_LINE: Final = 18
STEPS: Final = (10, 15, 30, 60, 120, 300, 900, 3600, 3 * 3600, 6 * 3600, 86400)
"""Seconds between the times on an axis."""
TIME_ROOM: Final = 72
"""Pixels that a time on an axis takes, with its distance from the next one."""


def draw_series(canvas: Canvas, panel: dict[str, Any], box: Box, fields: list[Field], source: Source) -> None:
    legend = (panel.get("options") or {}).get("legend") or {}
    plot, named = _beside(box, legend, fields)
    unit_room = max(_tick_room(fields), 34)
    axes = canvas.axes(Box(plot.x + unit_room, plot.y + 4, plot.width - unit_room - 8, plot.height - 26))
    right = None
    stacks: dict[str, np.ndarray[Any, Any]] = {}
    for field in fields:
        custom = field.config["custom"]
        target = axes
        if custom.get("axisPlacement") == "right":
            right = right or _second(axes)
            target = right
        _line(target, field, stacks, source)
    _scale(axes, [f for f in fields if f.config["custom"].get("axisPlacement") != "right"], stacks)
    if right is not None:
        _scale(right, [f for f in fields if f.config["custom"].get("axisPlacement") == "right"], {})
    draw_times(axes, source)
    _threshold_lines(axes, fields)
    _exemplars(axes, panel, source)
    draw_marks(axes, source)
    if named is not None:
        _legend(canvas, named, legend, fields)


def _exemplars(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """Requests with a trace, as Grafana draws them: a click leads to it."""
    low, high = axes.get_ylim()
    shown_at = [(at, min(max(value, low), high)) for at, value in source.exemplars(panel)]
    if shown_at:
        axes.plot(
            [at for at, _ in shown_at],
            [value for _, value in shown_at],
            "D",
            color="#B4C7FF",
            markersize=3,
            markeredgecolor="#3D71D9",
            markeredgewidth=0.5,
            alpha=0.8,
            clip_on=True,
        )


def draw_marks(axes: Axes, source: Source) -> None:
    """The dashboard's annotations: a deploy, a new configuration."""
    for mark in source.marks:
        axes.axvline(mark.at, color=mark.color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        axes.plot(
            [mark.at],
            [0],
            "^",
            color=mark.color,
            markersize=5,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _second(axes: Axes) -> Axes:
    right = axes.twinx()
    for side in right.spines.values():
        side.set_visible(False)
    right.grid(False)
    right.tick_params(colors=WEAK, labelsize=11 * POINT, length=0, pad=4)
    return right


def _line(axes: Axes, field: Field, stacks: dict[str, np.ndarray[Any, Any]], source: Source) -> None:
    custom = field.config["custom"]
    moments = np.arange(source.began, source.ended + source.step / 2, source.step)
    values = np.full(len(moments), math.nan)
    for at, value in field.points:
        index = round((at - source.began) / source.step)
        if 0 <= index < len(values):
            values[index] = value
    values[~np.isfinite(values)] = math.nan
    drawn_color = field.color
    stacking = (custom.get("stacking") or {}).get("mode", "none")
    base: np.ndarray[Any, Any] = np.zeros(len(values))
    if stacking in ("normal", "percent"):
        base = stacks.get("", base)
        values = base + np.nan_to_num(values)
        stacks[""] = values
    opacity = (custom.get("fillOpacity") or 0) / 100
    style = custom.get("drawStyle") or "line"
    line = custom.get("lineWidth", 1) or 0
    dashed = (custom.get("lineStyle") or {}).get("fill") in ("dash", "dot")
    if style == "bars":
        axes.bar(
            moments,
            values - base,
            bottom=base,
            width=source.step * 0.9,
            color=drawn_color,
            alpha=max(opacity, 0.6),
        )
        return
    step = custom.get("lineInterpolation") in ("stepAfter", "stepBefore")
    if style == "points":
        axes.plot(moments, values, "o", color=drawn_color, markersize=3)
        return
    axes.plot(
        moments,
        values,
        color=drawn_color,
        linewidth=line * 1.1,
        linestyle="--" if dashed else "-",
        drawstyle="steps-post" if step else "default",
        solid_joinstyle="round",
    )
    if opacity:
        axes.fill_between(
            moments,
            base,
            values,
            color=drawn_color,
            alpha=min(opacity, 0.75),
            linewidth=0,
            step="post" if step else None,
        )


def _scale(axes: Axes, fields: Sequence[Field], stacks: dict[str, np.ndarray[Any, Any]]) -> None:
    if not fields:
        return
    first = fields[0]
    values = [v for field in fields for v in field.finite]
    values += [float(v) for stack in stacks.values() for v in stack if math.isfinite(v)]
    high, low = max(values, default=1.0), min(values, default=0.0)
    log = (first.config["custom"].get("scaleDistribution") or {}).get("type") == "log"
    least, most = first.config.get("min"), first.config.get("max")
    least = least if least is not None else (min(low, 0.0) if not log else None)
    soft = first.config["custom"].get("axisSoftMax")
    top = most if most is not None else max(high * 1.08, soft or 0.0)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(max(low * 0.8, 1e-9), max(high * 1.2, 1e-8))
    else:
        low, high = least or 0.0, top if top > (least or 0.0) else (least or 0.0) + 1
        axes.set_ylim(low, high)
        size = size_of(high, first.config.get("unit") or "")
        # Quarters want one digit more than a number of fixed digits may have.
        steps = [1, 2, 5, 10] if first.config.get("decimals") else [1, 2, 2.5, 5, 10]
        ticks = MaxNLocator(nbins=5, steps=steps).tick_values(low / size, high / size)
        axes.yaxis.set_major_locator(FixedLocator([t * size for t in ticks if low <= t * size <= high]))
    unit, decimals = first.config.get("unit") or "", first.config.get("decimals")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(shown(round(v, 10), unit, decimals))))


def _tick_room(fields: Sequence[Field]) -> float:
    left = [f for f in fields if f.config["custom"].get("axisPlacement") != "right"] or list(fields)
    values = [v for field in left for v in field.finite] or [0.0]
    unit, decimals = left[0].config.get("unit") or "", left[0].config.get("decimals")
    top = max(values) * 1.08
    return 12 + max(width(shown(top * part, unit, decimals), 11) for part in (1.0, 0.75, 0.5, 0.25))


def draw_times(axes: Axes, source: Source) -> None:
    axes.set_xlim(source.began, source.ended)
    span, pixels = source.ended - source.began, axes.get_window_extent().width
    most = min(7.0, pixels / TIME_ROOM)
    step = next((s for s in STEPS if span / s <= most), STEPS[-1])
    first = math.ceil(source.began / step) * step
    ticks = [first + i * step for i in range(int((source.ended - first) // step) + 1)]
    if not ticks:
        axes.set_xticks([])
        return
    form = "%H:%M:%S" if step % 60 else "%H:%M"
    labels = [datetime.fromtimestamp(t, tz=UTC).strftime(form) for t in ticks]
    # The last one would stand over the edge where it has not half of its width.
    half = width(labels[-1], 11) / 2 * span / pixels
    axes.set_xticks(ticks)
    axes.set_xticklabels(
        [text if at + half < source.ended else "" for at, text in zip(ticks, labels, strict=True)]
    )


def _threshold_lines(axes: Axes, fields: Sequence[Field]) -> None:
    field = fields[0]
    style = (field.config["custom"].get("thresholdsStyle") or {}).get("mode", "off")
    if style == "off":
        return
    low, high = axes.get_ylim()
    for at, name in field.thresholds:
        if at is not None and low < at < high:
            axes.axhline(at, color=color(name), linewidth=1, linestyle="--", alpha=0.8)


def _beside(box: Box, legend: dict[str, Any], fields: Sequence[Field]) -> tuple[Box, Box | None]:
    """The plot's box and the legend's."""
    if legend.get("showLegend") is False or legend.get("displayMode") == "hidden":
        return box, None
    if legend.get("placement") == "right":
        room = min(box.width * 0.42, 330)
        return (
            Box(box.x, box.y, box.width - room, box.height),
            Box(box.x + box.width - room + 8, box.y, room - 8, box.height),
        )
    if legend.get("displayMode") == "table":
        lines = min(len(fields) + 1, max(int(box.height * 0.4 // LEGEND_LINE), 2))
    else:
        lines = min(_lines_needed(fields, box.width), max(int(box.height * 0.3 // LEGEND_LINE), 1))
    tall = lines * LEGEND_LINE + 2
    return Box(box.x, box.y, box.width, box.height - tall), Box(
        box.x, box.y + box.height - tall, box.width, tall
    )


def _lines_needed(fields: Sequence[Field], room: float) -> int:
    lines, used = 1, 0.0
    for field in fields:
        needed = 34 + width(field.name, 11)
        if used and used + needed > room:
            lines, used = lines + 1, 0.0
        used += needed
    return lines


def _legend(canvas: Canvas, box: Box, legend: dict[str, Any], fields: Sequence[Field]) -> None:
    if legend.get("displayMode") == "table":
        _legend_table(canvas, box, legend, fields)
        return
    x, y = box.x + 4, box.y + LEGEND_LINE / 2
    for field in fields:
        needed = 34 + width(field.name, 11)
        if x > box.x + 4 and x + needed > box.x + box.width:
            x, y = box.x + 4, y + LEGEND_LINE
        if y > box.y + box.height:
            break
        canvas.fill(Box(x, y - 1.5, 14, 3), field.color)
        canvas.text(x + 20, y, field.name, size=11, color=WEAK, room=box.x + box.width - x - 20)
        x += needed


def _ordered(fields: Sequence[Field], legend: dict[str, Any]) -> list[Field]:
    """As the dashboard sorts its legend: by the name of a column."""
    by = next((calc for calc in legend["calcs"] if CALC_NAMES.get(calc) == legend.get("sortBy")), None)
    if by is None:
        return list(fields)
    return sorted(
        fields, key=lambda f: f.calculated(by) if f.finite else 0.0, reverse=bool(legend["sortDesc"])
    )


def _legend_table(canvas: Canvas, box: Box, legend: dict[str, Any], fields: Sequence[Field]) -> None:
    calcs = legend["calcs"]
    told = [[field.text(field.calculated(calc)) for calc in calcs] for field in fields]
    wide = [
        max([width(CALC_NAMES.get(calc, calc), 10.5), *(width(texts[i], 11) for texts in told)]) + 22
        for i, calc in enumerate(calcs)
    ]
    rights = [box.x + box.width - 4 - sum(wide[i + 1 :]) for i in range(len(calcs))]
    names_room = box.width - sum(wide) - 28
    y = box.y + LEGEND_LINE / 2
    for right, calc in zip(rights, calcs, strict=True):
        canvas.text(right, y, CALC_NAMES.get(calc, calc), size=10.5, color="#6E9FFF", align="right")
    lines = int(box.height // LEGEND_LINE) - 1
    ordered = _ordered(fields, legend)
    if len(ordered) > lines:  # a reader of the picture cannot scroll
        more = f"{len(ordered) - lines} more below"
        canvas.text(box.x + 22, box.y + LEGEND_LINE / 2, more, size=10.5, color=WEAK)
    for field in ordered[:lines]:
        y += LEGEND_LINE
        canvas.fill(Box(box.x + 2, y - 1.5, 14, 3), field.color)
        canvas.text(box.x + 22, y, field.name, size=11, room=names_room)
        for right, calc in zip(rights, calcs, strict=True):
            canvas.text(right, y, field.text(field.calculated(calc)), size=11, color=WEAK, align="right")
