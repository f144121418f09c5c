"""`python -m dashboards.preview [--again] [NAME ...]`: the run, then a picture of each dashboard.

The run takes about three minutes. Its Prometheus' data stay in build/preview, so that `--again` draws from
them at once, for whoever works on a dashboard.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from dashboards.preview.fields import Source
from dashboards.preview.page import picture
from tests.observability.dashboards import dashboards, usual
from tests.observability.prometheus import Prometheus
from tests.observability.run import LONG, run
from tests.programs import ROOT

PICTURES: Final = ROOT / "docs" / "pictures"
KEPT: Final = ROOT / "build" / "preview"
STEP_SECONDS: Final = 2.0
RATE_SECONDS: Final = 15


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dashboards.preview", description=__doc__)
    parser.add_argument("--again", action="store_true", help="draw from the data of the last run")
    parser.add_argument("names", nargs="*", help="dashboards; all if none")
    options = parser.parse_args()
    if not options.again:
        _traffic()
    moments = json.loads((KEPT / "moments.json").read_text())
    ended = moments["ended"]
    # From when on rates have all of their window, and in whole steps up to the end.
    seconds = (ended - moments["began"] - RATE_SECONDS) // STEP_SECONDS * STEP_SECONDS
    with Prometheus(KEPT / "prometheus") as prometheus:
        source = Source(
            prometheus,
            json.loads((KEPT / "lines.json").read_text()),
            ended - seconds,
            ended,
            STEP_SECONDS,
            usual(
                range_seconds=seconds,
                interval_seconds=int(STEP_SECONDS),
                rate_seconds=RATE_SECONDS,
            ),
        )
        PICTURES.mkdir(parents=True, exist_ok=True)
        for dashboard in dashboards():
            if not options.names or dashboard.name in options.names:
                path = PICTURES / f"{dashboard.name}.png"
                picture(dashboard, source, path)
                print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} kB")
    return 0


def _traffic() -> None:
    """The run; what Prometheus has of it is kept."""
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    with ExitStack() as stack:
        done = asyncio.run(run(KEPT, LONG, stack))
    for surprise in done.truth.surprises:
        print(f"not as it was written: {surprise}", file=sys.stderr)
    (KEPT / "moments.json").write_text(json.dumps({"began": done.began, "ended": done.ended}))
    lines = [line for pod in done.lines for line in (*pod.requests, *pod.others)]
    (KEPT / "lines.json").write_text(json.dumps(lines))
    _tidy(KEPT)


def _tidy(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name not in ("prometheus", "moments.json", "lines.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    sys.exit(main())
