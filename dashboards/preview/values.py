"""Single numbers: large ones, and bars."""

from __future__ import annotations

import math
from typing import Any

from dashboards.preview.canvas import GRID, TEXT, Box, Canvas, width
from dashboards.preview.fields import Field, Source


def draw_numbers(
    canvas: Canvas, panel: dict[str, Any], box: Box, fields: list[Field], source: Source
) -> None:
    options = panel.get("options") or {}
    calc = ((options.get("reduceOptions") or {}).get("calcs") or ["lastNotNull"])[0]
    fields = [f for f in fields if f.points][:12]
    for part, field in zip(_tiles(box, len(fields), options.get("orientation", "auto")), fields, strict=True):
        value = field.calculated(calc)
        painted = field.color_of(value)
        background = options.get("colorMode") in ("background", "background_solid")
        if background:
            canvas.fill(part, painted, 0.85)
        spark = options.get("graphMode") == "area" and len(field.points) > 2 and part.height > 50
        _big(
            canvas,
            part,
            field,
            value,
            TEXT if background else painted,
            several=len(fields) > 1,
            spark=spark,
            options=options,
        )
        if spark:
            axes = canvas.axes(Box(part.x, part.y + part.height * 0.66, part.width, part.height * 0.34))
            axes.axis("off")
            at, values = [p[0] for p in field.points], [p[1] for p in field.points]
            line = TEXT if background else painted
            axes.plot(at, values, color=line, linewidth=1.2)
            finite = field.finite
            low, high = min(finite, default=0.0), max(finite, default=1.0)
            floor = low - (high - low) * 0.1 - 1e-12
            axes.fill_between(at, floor, values, color=line, alpha=0.18, linewidth=0)
            axes.set_xlim(source.began, source.ended)
            axes.set_ylim(floor, high + (high - low) * 0.15 + 1e-12)


def _big(
    canvas: Canvas,
    box: Box,
    field: Field,
    value: float,
    painted: str,
    *,
    several: bool,
    spark: bool,
    options: dict[str, Any],
) -> None:
    text = field.text(value)
    named = several or options.get("textMode") in ("name", "value_and_name")
    middle = box.y + box.height * (0.36 if spark else 0.5)
    size = min(box.height * (0.42 if not named else 0.36), 46)
    while size > 11 and width(text, size, bold=True) > box.width * 0.92:
        size -= 1
    if named:
        canvas.text(
            box.x + box.width / 2,
            box.y + 10,
            field.name,
            size=11,
            color=TEXT,
            align="center",
            room=box.width - 8,
        )
        middle += 7
    canvas.text(
        box.x + box.width / 2,
        middle,
        text,
        size=size,
        bold=True,
        color=painted,
        align="center",
        room=box.width,
    )


def _tiles(box: Box, count: int, orientation: str) -> list[Box]:
    if count <= 1:
        return [box] * count
    across = count
    if orientation == "horizontal":
        across = 1
    elif orientation == "auto":
        across = max(1, min(count, int(box.width // 105)))
        if box.height > box.width:
            across = 1
    down = math.ceil(count / across)
    wide, tall = box.width / across, box.height / down
    return [
        Box(box.x + (i % across) * wide, box.y + (i // across) * tall, wide - 4, tall - 4)
        for i in range(count)
    ]


def draw_bars(canvas: Canvas, panel: dict[str, Any], box: Box, fields: list[Field], source: Source) -> None:
    options = panel.get("options") or {}
    calc = ((options.get("reduceOptions") or {}).get("calcs") or ["lastNotNull"])[0]
    rows = [(f, f.calculated(calc)) for f in fields if f.points]
    tall = min(box.height / max(len(rows), 1), 46)
    rows = rows[: int(box.height // max(tall, 20))]
    high = max((f.config.get("max") or 0.0) or v for f, v in rows if math.isfinite(v)) or 1.0
    label = min(max(width(f.name, 12) for f, _ in rows) + 14, box.width * 0.5)
    number = max(width(f.text(v), 13, bold=True) for f, v in rows) + 14
    for index, (field, value) in enumerate(rows):
        y = box.y + index * tall
        bar = Box(box.x + label, y + tall * 0.16, box.width - label - number, tall * 0.68)
        painted = field.color_of(value)
        canvas.text(box.x + label - 10, y + tall / 2, field.name, size=12, align="right", room=label - 12)
        canvas.fill(bar, GRID, 0.7)
        if math.isfinite(value):
            canvas.fill(
                Box(bar.x, bar.y, bar.width * min(max(value / high, 0.0), 1.0), bar.height), painted, 0.8
            )
        canvas.text(
            box.x + box.width - 4,
            y + tall / 2,
            field.text(value),
            size=13,
            bold=True,
            color=painted,
            align="right",
        )
