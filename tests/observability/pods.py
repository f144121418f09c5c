"""Pods of the traffic run: processes with a pod's name, and the version that their deploy names."""

from __future__ import annotations

from pathlib import Path

from tests.observability.pod import LAST_METRICS, LET_GO, VERSION
from tests.running import WeirProcess


class Pod(WeirProcess):
    """`last_metrics` holds its metrics as of its end, which it goes on answering until it is let go."""

    module = "tests.observability.pod"

    def __init__(self, name: str, version: str, directory: Path, **values: str) -> None:
        self.name = name
        self.version = version
        self.last_metrics = directory / f"{name}.metrics"
        self._let_go = directory / f"{name}.let-go"
        super().__init__(
            **values,
            **{VERSION: version, LAST_METRICS: str(self.last_metrics), LET_GO: str(self._let_go)},
        )

    @property
    def is_at_its_end(self) -> bool:
        """It serves no more, and `last_metrics` is there."""
        return self.last_metrics.exists() or self.process.poll() is not None

    def let_go(self) -> None:
        self._let_go.touch()
