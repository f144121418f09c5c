"""Pictures of the dashboards: numbers as Grafana writes them, and one file for each."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from dashboards.preview.canvas import WIDTH
from dashboards.preview.units import shown
from tests.observability.dashboards import dashboards
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


def test_each_dashboard_has_its_picture() -> None:
    assert {path.stem for path in PICTURES.glob("*.png")} == {board.name for board in dashboards()}
    for path in PICTURES.glob("*.png"):
        assert path.stat().st_size < MOST_BYTES, path.name
        with Image.open(path) as picture:
            assert picture.width == WIDTH
