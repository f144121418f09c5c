"""From an earlier chart to this one, and back, under load: with the package itself.

No chart was released yet. Until one is, the package in `previous` is an earlier draft of this one, named
0.1.0. The image is the same on both sides, so it is the chart alone that changes.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.e2e.cluster import Images, Release, namespace
from tests.e2e.conftest import LoadPod, Report

PREVIOUS = Path(__file__).parent / "previous"
LOAD = {"whole": 12, "fresh": 4, "streams": 12, "stream_tokens": 250, "words": 1}
VALUES = ("--set", "settings.SIMULATOR_TOKENS_PER_SECOND=25")


def test_from_an_earlier_chart_and_back_nothing_is_lost(
    images: Images, load: LoadPod, report: Report
) -> None:
    packages = sorted(PREVIOUS.glob("*.tgz"))
    assert len(packages) == 1, f"one package is the earlier one: {packages}"
    (package,) = packages
    with namespace("weir-e2e-previous") as name:
        release = Release(name, images)
        release.install(*VALUES, chart=package)
        key = release.key
        for what, change in (
            (f"upgrade from the draft {package.stem} to this chart", lambda: release.upgrade(*VALUES)),
            (f"rollback to the draft {package.stem}", release.rollback),
        ):
            before = release.identities()
            with load.on(release, **LOAD) as running:
                began = time.monotonic()
                change()
                seconds = time.monotonic() - began
                ended = running.stop()
            report.row(f"{what}, under load", ended, seconds=seconds)
            assert ended.failures() == []
            assert release.key == key
            assert release.identities().isdisjoint(before), "every pod was replaced"
        release.upgrade(*VALUES)
        release.test()
