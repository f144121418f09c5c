"""Writes `golden/default.yaml` anew: `python -m tests.chart.renew`. Read the difference first."""

from __future__ import annotations

import re
from pathlib import Path

from service import __version__
from tests.chart.rendering import Rendered, render

GOLDEN = Path(__file__).parent / "golden/default.yaml"


def golden(rendered: Rendered) -> str:
    """What is rendered, without words made at random, the version, and empty lines."""
    random = re.compile(r"^( +(?:api-key|keys\.yaml|redis-password): ).+$", re.MULTILINE)
    text = random.sub(r"\1RANDOM", rendered.text)
    lines = text.replace(__version__, "VERSION").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden(render()))
