"""One dashboard as one picture: its title, its rows and its panels where its JSON puts them."""

from __future__ import annotations

import io
import json
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dashboards.preview.canvas import TEXT, WEAK, WIDTH, Box, Canvas, width
from dashboards.preview.fields import NAMED, Source, color
from dashboards.preview.panels import draw
from tests.observability.dashboards import Dashboard

HEAD: Final = 58
MARGIN: Final = 12
UNIT: Final = 37
"""Pixels of one row of the grid, the gap below it included."""
GAP: Final = 8
COLORS: Final = 256
STAMP: Final = "Dashboard"
"""What the PNG's text with the stamp is called."""
NOT_DRAWN: Final = frozenset({"description", "noValue", "tooltip", "url"})
"""Words and addresses of a dashboard that its picture has not, or hardly ever."""


def picture(dashboard: Dashboard, source: Source, path: Path) -> None:
    """Draw it, and write it as a PNG of few colours, with the stamp of the dashboard."""
    panels = _placed(dashboard.document)
    source = source.marked(dashboard.document)
    bottom = max((panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels), default=1)
    canvas = Canvas(HEAD + bottom * UNIT + MARGIN)
    _head(canvas, dashboard)
    for panel in panels:
        place = panel["gridPos"]
        column = (WIDTH - 2 * MARGIN + GAP) / 24
        box = Box(
            MARGIN + place["x"] * column,
            HEAD + place["y"] * UNIT,
            place["w"] * column - GAP,
            place["h"] * UNIT - GAP,
        )
        if panel["type"] == "row":
            canvas.text(box.x + 4, box.y + box.height / 2, "⌄", size=13, color=WEAK)
            canvas.text(box.x + 22, box.y + box.height / 2, panel.get("title") or "", size=14, bold=True)
        else:
            draw(canvas, panel, box, source)
    whole = io.BytesIO()
    canvas.save(whole)
    stamped = PngInfo()
    stamped.add_text(STAMP, stamp(dashboard))
    of_few_colors(Image.open(whole).convert("RGB")).save(path, optimize=True, pnginfo=stamped)


def stamp(dashboard: Dashboard) -> str:
    """Another one where a picture would be another; a better word in a description leaves it as it is."""
    return sha256(json.dumps(_drawn(dashboard.document), sort_keys=True).encode()).hexdigest()


def _drawn(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drawn(part) for key, part in value.items() if key not in NOT_DRAWN}
    return [_drawn(part) for part in value] if isinstance(value, list) else value


def of_few_colors(image: Image.Image) -> Image.Image:
    """The most frequent ones, and those that have a name: a mark has few pixels, and must keep its own."""
    named = [int(name[i : i + 2], 16) for name in sorted(set(NAMED.values())) for i in (1, 3, 5)]
    frequent = image.quantize(COLORS - len(named) // 3).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*named, *frequent])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def _head(canvas: Canvas, dashboard: Dashboard) -> None:
    document = dashboard.document
    canvas.text(MARGIN + 4, 20, document.get("title") or dashboard.name, size=18, bold=True)
    variables = [v for v in document.get("templating", {}).get("list", []) if v.get("hide") not in (1, 2)]
    x = MARGIN + 4.0
    for variable in variables:
        if variable["type"] == "datasource":
            continue
        name = variable.get("label") or variable["name"]
        canvas.text(x, 44, name, size=11, color=WEAK)
        x += width(name, 11) + 8
        canvas.text(x, 44, "All", size=11, color=TEXT)
        x += 42
    _leading(canvas, [link["title"] for link in document.get("links") or []])
    _marked(canvas, (document.get("annotations") or {}).get("list") or [])


def _leading(canvas: Canvas, names: list[str]) -> None:
    """The links to the other dashboards, in the corner."""
    x = WIDTH - MARGIN - 4.0
    for name in reversed(names):
        canvas.text(x, 20, name, size=12, color="#6E9FFF", align="right")
        x -= width(name, 12) + 22


def _marked(canvas: Canvas, notes: list[dict[str, Any]]) -> None:
    """What the vertical lines on panels are."""
    x = WIDTH - MARGIN - 4.0
    for note in reversed(notes):
        canvas.text(x, 44, note["name"], size=11, color=TEXT, align="right")
        x -= width(note["name"], 11) + 7
        canvas.text(x, 44, "▲", size=11, color=color(note.get("iconColor") or "blue"), align="right")
        x -= 30


def _placed(document: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels where they are when every row is unfolded."""
    found: list[dict[str, Any]] = []
    moved = 0
    for panel in document.get("panels", []):
        panel = {**panel, "gridPos": {**panel["gridPos"], "y": panel["gridPos"]["y"] + moved}}
        found.append(panel)
        folded = panel.get("panels") or []
        if panel["type"] == "row" and panel.get("collapsed") and folded:
            first = min(child["gridPos"]["y"] for child in folded)
            start = panel["gridPos"]["y"] + 1
            for child in folded:
                place = child["gridPos"]
                found.append({**child, "gridPos": {**place, "y": start + place["y"] - first}})
            moved += max(child["gridPos"]["y"] + child["gridPos"]["h"] for child in folded) - first
    return found
