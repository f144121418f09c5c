"""Pictures of the dashboards: numbers as Grafana writes them, texts that fit, and one file for each."""

from __future__ import annotations

import copy
import math
from typing import cast

import pytest
from PIL import Image

from dashboards.preview.canvas import WIDTH, Box, Canvas, cut, width, wrapped
from dashboards.preview.fields import Field, Source
from dashboards.preview.page import STAMP, of_few_colors, stamp
from dashboards.preview.series import draw_times
from dashboards.preview.tables import table_of
from dashboards.preview.units import shown, size_of
from tests.observability.dashboards import dashboards
from tests.observability.prometheus import Prometheus
from tests.programs import ROOT

PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 400_000


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.98765, "percentunit", "98.8%"),
        (1.0, "percentunit", "100%"),
        (0.0004271, "s", "427 µs"),
        (0.2, "s", "200 ms"),
        (93.0, "s", "1.55 min"),
        (0, "s", "0 s"),
        (12345.0, "currencyUSD", "$12.3 K"),
        (-0.5, "currencyUSD", "-$0.5"),
        (36900.0, "suffix: tok/s", "36.9 K tok/s"),
        (26.84, "reqps", "26.8 req/s"),
        (3 * 2**20, "bytes", "3 MiB"),
        (1500.0, "short", "1.5 K"),
        (2.0, "none", "2"),
        (math.nan, "s", ""),
        (math.inf, "short", "∞"),
    ],
)
def test_numbers_with_their_unit(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


@pytest.mark.parametrize(
    ("value", "unit", "size"),
    [
        (90.0, "s", 60.0),
        (0.2, "s", 1e-3),
        (0.0, "s", 1.0),
        (150 * 2**20, "bytes", 2.0**20),
        (90.0, "short", 1.0),
    ],
)
def test_axes_count_in_what_is_written_beside_them(value: float, unit: str, size: float) -> None:
    assert size_of(value, unit) == size


LINE = "stream_truncated 200 model=gpt-4o-mini upstream=openai trace_id=2e4d7c9f00aa"


@pytest.mark.parametrize("room", range(0, 600, 20))
def test_a_text_is_cut_where_no_letter_more_fits(room: int) -> None:
    shown_part = cut(LINE, 11, room)
    if width(LINE, 11) <= room:
        assert shown_part == LINE
        return
    assert width(shown_part, 11) <= room
    letters = len(shown_part.removesuffix("…"))
    assert shown_part in ("", LINE[:letters] + "…")
    assert width(LINE[: letters + 1].rstrip() + "…", 11) > room or LINE[letters] == " "


def test_a_line_of_the_log_is_shown_whole() -> None:
    lines = wrapped(LINE, 11, 200)
    assert len(lines) > 2
    assert " ".join(lines) == LINE
    assert all(width(line, 11) <= 200 for line in lines)
    assert wrapped("", 11, 200) == []


def test_numbers_stand_on_the_right_and_what_looks_like_one_does_not() -> None:
    config = {"unit": "currencyUSD", "custom": {}}
    field = Field("left", {"version": "2.4.0"}, [(0.0, -759.0)], config, "A", "#000000")
    table = table_of({}, [field])
    assert table.names == ["version", "Value"]
    assert [[text for text, _ in row] for row in table.rows] == [["2.4.0", "-$759"]]
    assert table.numeric == [False, True]


def test_a_mark_of_few_pixels_keeps_its_color() -> None:
    whole = Image.effect_noise((300, 300), 90).convert("RGB")
    purple = (0xB8, 0x77, 0xD9)
    for at in range(4):
        whole.putpixel((at, 0), purple)
    few = of_few_colors(whole)
    assert few.mode == "P"
    assert few.convert("RGB").getpixel((2, 0)) == purple


@pytest.mark.parametrize("hours", [0.05, 1, 6, 8, 12, 30, 24 * 7])
@pytest.mark.parametrize("pixels", [900, 60])
def test_an_axis_has_times_wherever_a_day_begins(hours: float, pixels: int) -> None:
    axes = Canvas(400).axes(Box(10, 10, pixels, 300))
    began = 1_700_000_000 // 86400 * 86400 + 3600.0
    draw_times(axes, Source(cast("Prometheus", None), (), began, began + hours * 3600, 1.0, {}))
    told = [label.get_text() for label in axes.get_xticklabels()]
    assert len(told) < 9
    if pixels > 100:
        assert any(told)


def test_a_stamp_is_of_what_is_drawn() -> None:
    board = dashboards()[0]
    changed = copy.deepcopy(board)
    panel = next(panel for panel in changed.document["panels"] if panel["type"] == "stat")
    panel["description"] = "In better words."
    assert stamp(changed) == stamp(board)
    panel["targets"][0]["expr"] += " * 2"
    assert stamp(changed) != stamp(board)


def test_each_dashboard_has_its_picture() -> None:
    assert {path.stem for path in PICTURES.glob("*.png")} == {board.name for board in dashboards()}
    page = (ROOT / "docs/dashboards.md").read_text()
    stamps = {board.name: stamp(board) for board in dashboards()}
    for path in PICTURES.glob("*.png"):
        assert f"](pictures/{path.name})](pictures/{path.name})" in page
        assert path.stat().st_size < MOST_BYTES, path.name
        with Image.open(path) as picture:
            assert picture.width == WIDTH
            assert picture.info.get(STAMP) == stamps[path.stem], "stale: run `make dashboards-preview`"
