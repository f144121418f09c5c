"""Pods of the traffic run: processes with a pod's name, and the version that their deploy names."""

from __future__ import annotations

from pathlib import Path

from tests.observability.pod import LAST_METRICS, LINGER, VERSION
from tests.running import WeirProcess


class Pod(WeirProcess):
    """`last_metrics` holds its metrics as of its end, which it answers for some seconds more."""

    module = "tests.observability.pod"

    def __init__(
        self, name: str, version: str, directory: Path, linger_seconds: float, **values: str
    ) -> None:
        self.name = name
        self.version = version
        self.last_metrics = directory / f"{name}.metrics"
        super().__init__(
            **values,
            **{VERSION: version, LAST_METRICS: str(self.last_metrics), LINGER: str(linger_seconds)},
        )
