"""One pod of the run, in a process: `python -m service` with another version, which lingers at its end.

What a process counts between its last scrape and its end is lost to Prometheus, by the nature of scraping. So
this one writes its last state into a file and goes on answering /metrics until it is let go: the run compares
to the last request.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

import service

VERSION: Final = "WEIR_RUN_VERSION"
LAST_METRICS: Final = "WEIR_RUN_LAST_METRICS"
LET_GO: Final = "WEIR_RUN_LET_GO"
"""A file that is there once the process may end."""
MOST_SECONDS: Final = 120.0
"""After which it ends in any case: whoever began it may be gone."""


def main() -> int:
    service.__version__ = os.environ[VERSION]  # before any other module of it reads the version

    from service import serve
    from service.__main__ import main as run
    from service.adminport import AdminServer, listen
    from service.api.admin import AdminApp
    from service.lifecycle import Lifecycle
    from service.telemetry import exposition

    renders: list[Callable[[str], tuple[bytes, str]]] = []

    def kept(registry: CollectorRegistry) -> Callable[[str], tuple[bytes, str]]:
        renders.append(exposition(registry))
        return renders[-1]

    setattr(serve, "exposition", kept)  # noqa: B010  # mypy: serve itself has it from elsewhere
    code = run([])
    if renders:
        last = Path(os.environ[LAST_METRICS])
        new = last.with_suffix(".new")
        new.write_bytes(renders[0]("")[0])
        new.replace(last)
        listener = listen("ADMIN_PORT", "127.0.0.1", int(os.environ["ADMIN_PORT"]))
        admin = AdminServer(AdminApp(Lifecycle(), renders[0]), listener)
        admin.start()
        let_go, until = Path(os.environ[LET_GO]), time.monotonic() + MOST_SECONDS
        while not let_go.exists() and time.monotonic() < until:
            time.sleep(0.02)
        admin.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
