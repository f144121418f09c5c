"""Writes `golden/` anew: `python -m tests.chart.renew`. Read the difference first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from service import __version__
from tests.chart.rendering import Rendered, render

CASES: Final = ("default", "full", "keda", "nodeport")
"""Of the matrix, those that together use what the templates have."""
_FILES: Final = {"dashboards": {"enabled": False}, "metrics": {"prometheusRule": {"enabled": False}}}
"""Left out: what the chart has from its files has tests of its own, and changes with them."""


def golden(rendered: Rendered) -> str:
    """What is rendered, without words made at random, the version, and empty lines."""
    random = re.compile(r"^( +(?:api-key|keys\.yaml|redis-password): ).+$", re.MULTILINE)
    text = random.sub(r"\1RANDOM", rendered.text)
    # No piece of an address is taken for the version.
    text = re.sub(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])", "VERSION", text)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines() if line.strip())


def path(case: str) -> Path:
    return Path(__file__).parent / f"golden/{case}.yaml"


def rendered_now(case: str) -> str:
    return golden(render(_FILES, case=case))


if __name__ == "__main__":
    for case in CASES:
        path(case).write_text(rendered_now(case))
