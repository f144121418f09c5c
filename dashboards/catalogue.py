"""The six dashboards and their panels, for whoever wants them as Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dashboards import cost, latency, overview, pods, tokens, upstreams
from dashboards.board import Board
from dashboards.panels import Panel

BOARDS: Final[tuple[Board, ...]] = (
    overview.BOARD,
    latency.BOARD,
    tokens.BOARD,
    cost.BOARD,
    upstreams.BOARD,
    pods.BOARD,
)


def panels() -> Iterator[Panel]:
    """Every panel of every dashboard, in its place, with its queries as Grafana has them."""
    for board in BOARDS:
        yield from board.panels()
