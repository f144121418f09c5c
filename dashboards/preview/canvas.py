"""A picture in pixels, from the top left corner, in the colours of Grafana's dark theme."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

WIDTH: Final = 1600
DPI: Final = 100
POINT: Final = 72 / DPI
"""Points in a pixel: sizes of letters here are pixels, matplotlib's are points."""
BACKGROUND, PANEL, BORDER, GRID = "#111217", "#181B1F", "#2A2D33", "#2C2F36"
TEXT, WEAK = "#D5D5E0", "#9A9AA8"

mpl.use("agg")
mpl.rcParams["font.family"] = "DejaVu Sans"
mpl.rcParams["font.size"] = 11 * POINT
mpl.rcParams["svg.hashsalt"] = "weir"


class Box(NamedTuple):
    """A rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float

    def inner(self, left: float, top: float, right: float | None = None, bottom: float | None = None) -> Box:
        right, bottom = left if right is None else right, top if bottom is None else bottom
        return Box(self.x + left, self.y + top, self.width - left - right, self.height - top - bottom)


class Canvas:
    """One picture."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
        self._ground = self.figure.add_axes((0, 0, 1, 1), zorder=-10)
        self._ground.set_xlim(0, WIDTH)
        self._ground.set_ylim(height, 0)
        self._ground.axis("off")

    def axes(self, box: Box) -> Axes:
        """Axes on a box, with the theme's grid and letters."""
        axes = self.figure.add_axes(
            (
                box.x / WIDTH,
                1 - (box.y + box.height) / self.height,
                box.width / WIDTH,
                box.height / self.height,
            )
        )
        axes.set_facecolor("none")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(colors=WEAK, labelsize=11 * POINT, length=0, pad=4)
        axes.grid(True, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        return axes

    def panel(self, box: Box) -> None:
        self._ground.add_patch(
            FancyBboxPatch(
                (box.x, box.y),
                box.width,
                box.height,
                boxstyle="round,pad=0,rounding_size=3",
                facecolor=PANEL,
                edgecolor=BORDER,
                linewidth=0.8,
            )
        )

    def fill(self, box: Box, color: str, alpha: float = 1.0) -> None:
        self._ground.add_patch(
            Rectangle((box.x, box.y), box.width, box.height, facecolor=color, edgecolor="none", alpha=alpha)
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        color: str = TEXT,
        bold: bool = False,
        align: Any = "left",
        vertical: Any = "center",
        room: float | None = None,
    ) -> None:
        """`room`: as many pixels as there are; what does not fit is cut off with dots."""
        shown = text if room is None else cut(text, size, room, bold=bold)
        self._ground.text(
            x,
            y,
            plain(shown),
            fontsize=size * POINT,
            color=color,
            fontweight="bold" if bold else "normal",
            ha=align,
            va=vertical,
        )

    def save(self, path: Path | BytesIO) -> None:
        # Without the name of the program that wrote it: the same data make the same bytes.
        self.figure.savefig(path, dpi=DPI, facecolor=BACKGROUND, metadata={"Software": None})


def plain(text: str) -> str:
    """As it is: a dollar begins no formula."""
    return text.replace("$", r"\$")


@cache
def width(text: str, size: float, *, bold: bool = False) -> float:
    """Pixels that a text takes."""
    if not text.strip():
        return 0.0
    properties = mpl.font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    found: float = TextPath((0, 0), plain(text), size=size, prop=properties).get_extents().width
    return found


def cut(text: str, size: float, room: float, *, bold: bool = False) -> str:
    """As much of a text as there is room for, with dots in place of the rest."""
    if width(text, size, bold=bold) <= room:
        return text
    fits, most = 0, len(text) - 1
    while fits < most:
        middle = (fits + most + 1) // 2
        if width(_dotted(text, middle), size, bold=bold) <= room:
            fits = middle
        else:
            most = middle - 1
    return _dotted(text, fits) if fits else ""


def _dotted(text: str, letters: int) -> str:
    return text[:letters].rstrip() + "…"


def wrapped(text: str, size: float, room: float) -> list[str]:
    """A text in lines that fit, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
