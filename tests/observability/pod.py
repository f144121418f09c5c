"""One pod of the run, in a process: `python -m service` with another version, which lingers at its end.

What a process counts between its last scrape and its end is lost to Prometheus, by the nature of scraping. So
this one goes on answering /metrics for a moment, and writes its last state into a file: the run compares to
the last request.
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
LINGER: Final = "WEIR_RUN_LINGER_SECONDS"


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
        Path(os.environ[LAST_METRICS]).write_bytes(renders[0]("")[0])
        listener = listen("ADMIN_PORT", "127.0.0.1", int(os.environ["ADMIN_PORT"]))
        admin = AdminServer(AdminApp(Lifecycle(), renders[0]), listener)
        admin.start()
        time.sleep(float(os.environ[LINGER]))
        admin.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
