"""Debian's Prometheus on a free port: `with Prometheus(directory, rules) as prometheus:`.

Targets come and go as in a cluster: `targets` rewrites the file that Prometheus watches.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import yaml

from tests.programs import ROOT, need
from tests.running import free_port

RULES: Final = ROOT / "helm" / "weir" / "files" / "rules"
START_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.05
GUARD: Final = 'read -r _; kill -KILL "$1"'
"""What the guarding shell does when its standard input ends: with the process that began this one."""


class PrometheusError(Exception):
    """Prometheus did not do what it should: its own words."""


class Target(NamedTuple):
    """What is scraped, and the labels that the cluster's discovery would give it."""

    address: str
    labels: Mapping[str, str]


class Series(NamedTuple):
    """One series of an answer: its labels, and its points as (time, value)."""

    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def value(self) -> float:
        """The last one."""
        return self.points[-1][1]


class Prometheus:
    """One server; `rules` are groups as a rule file has them. `blocks` is history to begin with."""

    def __init__(
        self, directory: Path, rules: Sequence[dict[str, Any]] = (), blocks: Path | None = None
    ) -> None:
        self._program = need("prometheus")
        self._directory = directory
        self._log = directory / "log"
        self._sd = directory / "targets.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        if blocks is not None:
            shutil.copytree(blocks, directory / "data")
        self._configure(rules)

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        # Before the process is reaped: while the guard lives, nobody else can have got its number.
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def targets(self, targets: Iterable[Target]) -> None:
        """Scrape these from now on."""
        found = [{"targets": [t.address], "labels": dict(t.labels)} for t in targets]
        new = self._sd.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(self._sd)

    # -- the API -------------------------------------------------------------------------------------

    def query(self, expression: str, at: float | None = None) -> list[Series]:
        """An instant vector, or the matrix of a range selector. Raises PrometheusError."""
        data = self._get("query", query=expression, **({"time": at} if at is not None else {}))
        if data["resultType"] in ("scalar", "string"):
            return [Series({}, [_point(data["result"])])]
        return [_series(one) for one in data["result"]]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        data = self._get("query_range", query=expression, start=start, end=end, step=step)
        return [_series(one) for one in data["result"]]

    def value(self, expression: str, at: float | None = None) -> float:
        """The one value that an expression has; 0 where it has none."""
        found = self.query(expression, at)
        assert len(found) <= 1, (expression, found)
        return found[0].value if found else 0.0

    def series(self, selector: str, start: float, end: float) -> list[dict[str, str]]:
        found: list[dict[str, str]] = self._get("series", **{"match[]": selector, "start": start, "end": end})
        return found

    def label_values(self, label: str, start: float, end: float) -> list[str]:
        found: list[str] = self._get(f"label/{label}/values", start=start, end=end)
        return found

    def metadata(self) -> dict[str, list[dict[str, str]]]:
        found: dict[str, list[dict[str, str]]] = self._get("metadata")
        return found

    def exemplars(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("query_exemplars", query=expression, start=start, end=end)
        return found

    def rules(self) -> list[dict[str, Any]]:
        """All rules as Prometheus sees them: with their health and their last error."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def scraped(self) -> dict[str, dict[str, Any]]:
        """The targets that are scraped, by their pods."""
        return {t["labels"].get("pod", t["scrapeUrl"]): t for t in self._get("targets")["activeTargets"]}

    def until(self, condition: Callable[[], bool], complaint: str, seconds: float = START_SECONDS) -> None:
        """Polls until `condition` holds. Raises PrometheusError with the log's end where it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process is not None and self._process.poll() is not None:
                raise PrometheusError(f"Prometheus ended. Its log:\n{self._log_end()}")
            if time.monotonic() > deadline:
                raise PrometheusError(
                    f"{complaint} within {seconds:g} s. Prometheus' log:\n{self._log_end()}"
                )
            time.sleep(POLL_SECONDS)

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise PrometheusError(f"{parameters.get('query', path)}: {error.code} {told}") from None

    # -- the process ---------------------------------------------------------------------------------

    def _configure(self, rules: Sequence[dict[str, Any]]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._sd.write_text("[]")
        rule_file = self._directory / "rules.yaml"
        # Each second instead of each half minute: the whole run takes less than one.
        quick = [{k: v for k, v in group.items() if k != "interval"} for group in rules]
        rule_file.write_text(yaml.safe_dump({"groups": quick}))
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rule_file)],
            "scrape_configs": [
                {
                    "job_name": "pods",
                    "honor_labels": True,
                    "file_sd_configs": [{"files": [str(self._sd)], "refresh_interval": "1s"}],
                }
            ],
        }
        (self._directory / "prometheus.yaml").write_text(yaml.safe_dump(config))

    def _start(self) -> None:
        command = [
            self._program,
            f"--config.file={self._directory / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self._directory / 'data'}",
            "--storage.tsdb.retention.time=60d",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--enable-feature=exemplar-storage",
            "--log.level=warn",
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.until(self._ready, "it was not ready")

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _log_end(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]


def rule_groups(folder: Path = RULES) -> list[dict[str, Any]]:
    """The groups of all rule files."""
    return [
        group
        for path in sorted(folder.glob("*.yaml"))
        for group in yaml.safe_load(path.read_text())["groups"]
    ]


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def _series(one: dict[str, Any]) -> Series:
    return Series(one["metric"], [_point(p) for p in one.get("values") or [one["value"]]])
