"""The run can be drawn."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageColor

from dashboards.preview.fields import PALETTE, Source
from dashboards.preview.page import picture
from tests.observability.dashboards import dashboards, usual
from tests.observability.run import Run

SERIES = [ImageColor.getrgb(name) for name in PALETTE[:3]]
"""The colours of each panel's first series."""
SHADE = 8
"""Of 255: a picture of few colours has the nearest of them."""


def test_a_dashboard_can_be_drawn(traffic_run: Run, tmp_path: Path) -> None:
    """The one with panels of nearly all kinds. Without data it has hardly a pixel in these colours."""
    board = next(board for board in dashboards() if board.name == "pods")
    seconds = traffic_run.ended - traffic_run.began
    lines = [line for pod in traffic_run.lines for line in (*pod.requests, *pod.others)]
    source = Source(
        traffic_run.prometheus,
        lines,
        traffic_run.began,
        traffic_run.ended,
        1.0,
        usual(range_seconds=seconds),
    )
    picture(board, source, tmp_path / "pods.png")
    with Image.open(tmp_path / "pods.png") as drawn:
        colors = drawn.convert("RGB").getcolors(drawn.width * drawn.height) or []
    assert sum(count for count, color in colors if isinstance(color, tuple) and of_a_series(color)) > 1_000
    assert any(mark.text == "Version 2.4.0" for mark in source.marked(board.document).marks)


def of_a_series(color: tuple[int, ...]) -> bool:
    return any(max(abs(a - b) for a, b in zip(color, known, strict=True)) <= SHADE for known in SERIES)
