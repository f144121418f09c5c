"""Tables, and lines of the log."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from dashboards.preview.canvas import GRID, TEXT, WEAK, Box, Canvas, width, wrapped
from dashboards.preview.fields import Field, LogLine, Source

LINE: Final = 24
LOG_LINE: Final = 19
LEVELS: Final = {"error": "#F2495C", "warning": "#FADE2A", "info": "#73BF69"}


class Table(NamedTuple):
    """Names of columns, rows of (text, colour), and which columns are numbers: those stand on the right."""

    names: list[str]
    rows: list[list[tuple[str, str]]]
    numeric: list[bool]


def draw_table(canvas: Canvas, panel: dict[str, Any], box: Box, fields: list[Field], source: Source) -> None:
    names, rows, numeric = table_of(panel, fields)
    if not names:
        return
    line = LINE
    room = int(box.height // line) - 1
    cells = [[text for text, _ in row] for row in rows[:room]]
    wanted = [
        max([width(n, 11.5, bold=True), *(width(row[i], 12) for row in cells)]) + 22
        for i, n in enumerate(names)
    ]
    scale = box.width / sum(wanted)
    widths = [w * scale for w in wanted]
    x = box.x
    for name, wide, number in zip(names, widths, numeric, strict=True):
        at = x + wide - 10 if number else x + 6
        canvas.text(
            at,
            box.y + line / 2,
            name,
            size=11.5,
            bold=True,
            color="#6E9FFF",
            align="right" if number else "left",
            room=wide - 12,
        )
        x += wide
    for index, row in enumerate(rows[:room]):
        y = box.y + (index + 1) * line
        canvas.fill(Box(box.x, y, box.width, 1), GRID, 0.8)
        x = box.x
        for (text, painted), wide, number in zip(row, widths, numeric, strict=True):
            at = x + wide - 10 if number else x + 6
            canvas.text(
                at,
                y + line / 2,
                text,
                size=12,
                color=painted,
                align="right" if number else "left",
                room=wide - 12,
            )
            x += wide


def table_of(panel: dict[str, Any], fields: Sequence[Field]) -> Table:
    """Labels first, then a value for each query."""
    hidden, renamed, order, sort = _transformed(panel)
    refs = list(dict.fromkeys(f.ref for f in fields))
    label_names = list(dict.fromkeys(k for f in fields for k in sorted(f.labels)))
    label_names = [n for n in label_names if n not in hidden]
    merged: dict[tuple[str, ...], dict[str, Field]] = {}
    for field in fields:
        key = tuple(field.labels.get(n, "") for n in label_names)
        merged.setdefault(key, {})[field.ref] = field
    value_names = {ref: f"Value #{ref}" if len(refs) > 1 else "Value" for ref in refs}
    columns = [*label_names, *(value_names[ref] for ref in refs if value_names[ref] not in hidden)]
    columns.sort(key=lambda name: order.get(name, 1_000))
    rows: list[tuple[dict[str, float], list[tuple[str, str]]]] = []
    for key, by_ref in merged.items():
        labels = dict(zip(label_names, key, strict=True))
        cells: list[tuple[str, str]] = []
        numbers: dict[str, float] = {}
        for name in columns:
            if name in labels:
                cells.append((labels[name] or "-", TEXT))
                continue
            ref = next(r for r in refs if value_names[r] == name)
            found = by_ref.get(ref)
            if found is None:
                cells.append(("-", WEAK))
                continue
            config = _column_config(panel, renamed.get(name, name), found)
            numbers[name] = config.last
            colored = (config.config["custom"].get("cellOptions") or {}).get("type", "auto") != "auto"
            cells.append((config.text(config.last), config.threshold_color(config.last) if colored else TEXT))
        rows.append((numbers, cells))
    if sort is not None:
        by, descending = sort
        name = next((n for n in columns if n == by or renamed.get(n, n) == by), "")
        rows.sort(key=lambda row: row[0].get(name, -math.inf), reverse=descending)
    return Table(
        [renamed.get(name, name) for name in columns],
        [cells for _, cells in rows],
        [name in value_names.values() for name in columns],
    )


def _column_config(panel: dict[str, Any], name: str, field: Field) -> Field:
    """Overrides of a table go by the name of its column."""
    config = dict(field.config)
    config["custom"] = dict(config["custom"])
    for override in (panel.get("fieldConfig") or {}).get("overrides") or []:
        matcher = override["matcher"]
        told = matcher.get("options")
        hit = (matcher["id"] == "byName" and told == name) or (
            matcher["id"] == "byRegexp" and re.search(str(told).strip("/"), name)
        )
        if hit:
            for change in override["properties"]:
                if change["id"].startswith("custom."):
                    config["custom"][change["id"].removeprefix("custom.")] = change.get("value")
                else:
                    config[change["id"]] = change.get("value")
    return field._replace(config=config)


def _transformed(
    panel: dict[str, Any],
) -> tuple[set[str], dict[str, str], dict[str, int], tuple[str, bool] | None]:
    """Columns that are hidden, their names and order, and what rows are sorted by."""
    hidden = {"Time"}
    renamed: dict[str, str] = {}
    order: dict[str, int] = {}
    sort: tuple[str, bool] | None = None
    for step in panel.get("transformations") or []:
        options = step.get("options") or {}
        if step["id"] == "organize":
            hidden |= {name for name, yes in (options.get("excludeByName") or {}).items() if yes}
            renamed |= options.get("renameByName") or {}
            order |= options.get("indexByName") or {}
        elif step["id"] == "sortBy":
            told = (options.get("sort") or [{}])[0]
            if told.get("field"):
                sort = (told["field"], bool(told.get("desc")))
    for told in (panel.get("options") or {}).get("sortBy") or []:
        sort = (told["displayName"], bool(told.get("desc")))
    return hidden, renamed, order, sort


def draw_lines(canvas: Canvas, box: Box, lines: Sequence[LogLine]) -> None:
    """The newest first, as many as there is room for, and each whole."""
    y = box.y + 10
    for line in lines:
        parts = wrapped(line.text, 11, box.width - 194)
        tall = LOG_LINE * len(parts)
        if y + tall - LOG_LINE > box.y + box.height - 8:
            break
        canvas.fill(Box(box.x, y - 7, 3, tall - 5), LEVELS.get(line.level, WEAK))
        canvas.text(box.x + 12, y, line.time, size=11, color=WEAK)
        for number, part in enumerate(parts):
            canvas.text(box.x + 190, y + number * LOG_LINE, part, size=11, room=box.width - 194)
        y += tall
