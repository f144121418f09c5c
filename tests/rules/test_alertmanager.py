"""The example of Alertmanager's routes: who is told of each alert, and what is held back."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import ROOT, need
from tests.rules.files import ALERTS
from tests.running import free_port

FILE = ROOT / "deploy/compose/alertmanager/alertmanager.yml"
CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text())
INSTALLATION = {"cluster": "c", "namespace": "apps", "job": "weir", "upstream": "u"}
OF_KUBERNETES = ("WeirNoPodReady", "WeirPodsNotReady")


def amtool(*arguments: str) -> str:
    done = subprocess.run(
        [need("amtool"), *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_amtool_takes_it() -> None:
    amtool("check-config", str(FILE))


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_each_alert_goes_where_its_severity_says(name: str) -> None:
    severity = ALERTS[name]["labels"]["severity"]
    told = amtool(
        "config", "routes", "test", f"--config.file={FILE}", f"alertname={name}", f"severity={severity}"
    )
    assert told == {"page": "on-call", "ticket": "tickets"}[severity]


def test_alerts_of_one_installation_come_together() -> None:
    assert CONFIG["route"]["group_by"] == ["cluster", "namespace", "alertname"]


# -- what is held back, by a real Alertmanager -----------------------------------------------------


def labels(name: str, **others: str) -> dict[str, str]:
    own: dict[str, str] = ALERTS[name]["labels"]
    place = {"cluster": "c", "namespace": "apps"} if name in OF_KUBERNETES else INSTALLATION
    return place | own | {"alertname": name} | others


class Alertmanager:
    """Debian's, with the example's configuration. Nobody is told: its receivers are empty."""

    def __init__(self, folder: Path) -> None:
        self._url = f"http://127.0.0.1:{(port := free_port())}"
        self.process = subprocess.Popen(
            [
                *(need("prometheus-alertmanager"), f"--config.file={FILE}", f"--storage.path={folder}"),
                *(f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._ready, "Alertmanager did not start")

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def fire(self, *alerts: dict[str, str]) -> None:
        body = json.dumps([{"labels": alert} for alert in alerts]).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/api/v2/alerts", body, headers)
        urllib.request.urlopen(request, timeout=10).close()

    def held_back(self, namespace: str) -> dict[str, bool]:
        """By name, of each alert that fires in a namespace."""
        query = urllib.parse.urlencode({"filter": f'namespace="{namespace}"'})
        with urllib.request.urlopen(f"{self._url}/api/v2/alerts?{query}", timeout=10) as answer:
            found = json.load(answer)
        return {a["labels"]["alertname"]: bool(a["status"]["inhibitedBy"]) for a in found}


def until(done: Callable[[], Any], otherwise: str) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError(otherwise)


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alertmanager]:
    running = Alertmanager(tmp_path_factory.mktemp("alertmanager"))
    yield running
    running.process.terminate()
    running.process.wait(20)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *[(f"Weir{slo}BurnFast", f"Weir{slo}BurnSlow") for slo in ("Availability", "Ttft", "Streams")],
        ("WeirUpstreamDown", "WeirAvailabilityBurnSlow"),
        ("WeirPodsNotReady", "WeirAvailabilityBurnSlow"),
        ("WeirNoPodReady", "WeirAvailabilityBurnSlow"),
        ("WeirUpstreamDown", "WeirCircuitOpen"),
        ("WeirNoPodReady", "WeirPodsNotReady"),
        ("WeirMetricsAbsent", "WeirPodsNotReady"),
    ],
)
def test_the_echo_of_an_alert_is_held_back_in_the_same_place_alone(
    alertmanager: Alertmanager, source: str, target: str
) -> None:
    here, there = f"{source}-{target}".lower(), f"{source}-{target}-beside".lower()
    alertmanager.fire(labels(target, namespace=here), labels(target, namespace=there))
    alertmanager.fire(labels(source, namespace=here))
    until(lambda: alertmanager.held_back(here).get(target), "it is not held back")
    assert alertmanager.held_back(here) == {source: False, target: True}
    assert alertmanager.held_back(there) == {target: False}


def test_when_everything_fires_each_page_is_told_and_what_nothing_explains(
    alertmanager: Alertmanager,
) -> None:
    everything = "everything"
    alertmanager.fire(*(labels(name, namespace=everything) for name in ALERTS))
    echoes = {name for name in ALERTS if name.endswith("BurnSlow")} | {"WeirCircuitOpen", "WeirPodsNotReady"}

    def held() -> set[str]:
        return {name for name, back in alertmanager.held_back(everything).items() if back}

    until(lambda: held() >= echoes, "an echo is told")
    assert held() == echoes


@pytest.mark.parametrize("cause", ["WeirUpstreamDown", "WeirPodsNotReady", "WeirNoPodReady"])
def test_a_cause_explains_failed_requests_and_neither_late_tokens_nor_broken_streams(
    alertmanager: Alertmanager, cause: str
) -> None:
    here, explained = f"explained-{cause}".lower(), "WeirAvailabilityBurnSlow"
    told = ("WeirTtftBurnSlow", "WeirStreamsBurnSlow")
    alertmanager.fire(*(labels(name, namespace=here) for name in (*told, explained, cause)))
    until(lambda: alertmanager.held_back(here).get(explained), "the echo is told")
    assert alertmanager.held_back(here) == {cause: False, explained: True} | dict.fromkeys(told, False)


def test_an_upstream_of_another_job_explains_nothing(alertmanager: Alertmanager) -> None:
    jobs, same = "jobs", "WeirCircuitOpen"
    alertmanager.fire(
        labels("WeirAvailabilityBurnSlow", namespace=jobs),
        labels(same, namespace=jobs, job="beside"),
        labels("WeirUpstreamDown", namespace=jobs, job="beside"),
    )
    until(lambda: alertmanager.held_back(jobs).get(same), "the echo is told")
    assert not alertmanager.held_back(jobs)["WeirAvailabilityBurnSlow"]


def test_another_objective_and_another_upstream_are_told(alertmanager: Alertmanager) -> None:
    apart = "apart"
    alertmanager.fire(
        labels("WeirAvailabilityBurnFast", namespace=apart), labels("WeirTtftBurnSlow", namespace=apart)
    )
    alertmanager.fire(labels("WeirAvailabilityBurnSlow", namespace=apart))
    until(lambda: alertmanager.held_back(apart).get("WeirAvailabilityBurnSlow"), "the echo is told")
    assert not alertmanager.held_back(apart)["WeirTtftBurnSlow"]
    upstreams = "upstreams"
    alertmanager.fire(labels("WeirUpstreamDown", namespace=upstreams, upstream="other"))
    alertmanager.fire(labels("WeirCircuitOpen", namespace=upstreams))
    alertmanager.fire(labels("WeirAvailabilityBurnSlow", namespace=upstreams))
    until(lambda: alertmanager.held_back(upstreams).get("WeirAvailabilityBurnSlow"), "the echo is told")
    assert not alertmanager.held_back(upstreams)["WeirCircuitOpen"]
