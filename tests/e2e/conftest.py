"""What the tests on a cluster share: images, the load generator's pod and the report."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service import __version__
from tests.e2e.cluster import ROOT, Images, Release, get, kubectl, namespace, run
from tests.e2e.load import Failure, Tally

LOAD_NAMESPACE = "weir-e2e-load"
REPORT = ROOT / "build/e2e-report.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rollouts", type=int, default=2, help="rollouts under load, for each kind of change")


@pytest.fixture(scope="session")
def rollouts(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--rollouts")
    return number


@pytest.fixture(scope="session")
def images() -> Images:
    """E2E_IMAGE and E2E_REDIS_IMAGE; by default those that `make e2e` builds for the lab's cluster."""
    return Images(
        weir=os.environ.get("E2E_IMAGE", "localhost/weir:e2e"),
        redis=os.environ.get("E2E_REDIS_IMAGE", "localhost/redis:8"),
        pull_policy=os.environ.get("E2E_PULL_POLICY", "Never"),
    )


class Report:
    """The figures, a row each, written as they come so that a run that breaks off leaves what it saw."""

    def __init__(self, path: Path, restricted: str) -> None:
        self._path = path
        self._restricted = restricted
        self._head = ""
        self._rows: list[str] = []

    def head(self, image: str, *, same_sources: bool) -> None:
        version = json.loads(kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
        nodes = len(get("nodes")["items"])
        sources = "the checkout's sources" if same_sources else "OTHER SOURCES THAN THE CHECKOUT'S"
        self._head = (
            f"Weir {__version__}, Kubernetes {version}, {nodes} nodes, {time.strftime('%Y-%m-%d')}. "
            f"Image {image}, with {sources}.\n"
        )
        if self._restricted:
            self._head += f"\nNot the whole suite: {self._restricted}.\n"
        self._write()

    def row(
        self,
        what: str,
        ended: Ended | None = None,
        *,
        seconds: float | None = None,
        more: str = "",
    ) -> None:
        figures = ended.figures() if ended is not None else ["", "", "", ""]
        cells = [what, *figures, f"{seconds:.1f}" if seconds is not None else "", more]
        self._rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n")
        self._write()

    def _write(self) -> None:
        table = (
            "| what | requests sent | failed | streams | cut | seconds | more |\n"
            "|---|--:|--:|--:|--:|--:|---|\n"
        )
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text(f"{self._head}\n{table}{''.join(self._rows)}")


REPORT_KEY = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT_KEY] = Report(REPORT, _restricted(config))


def _restricted(config: pytest.Config) -> str:
    """How this run was told to leave tests out."""
    options = [("-k", config.getoption("keyword")), ("-m", config.getoption("markexpr"))]
    told = [f"`{flag} {value}`" for flag, value in options if value]
    here = (str(Path(__file__).parent), "tests/e2e", "tests/e2e/")
    told += [f"`{argument}`" for argument in config.args if argument not in here]
    return " ".join(told)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A test that was skipped or that failed has a row too."""
    ended: pytest.TestReport = yield  # type: ignore[assignment]
    if ended.outcome != "passed":
        reason = (
            ended.longrepr[2]
            if isinstance(ended.longrepr, tuple)
            else str(call.excinfo and call.excinfo.value)
        )
        words = (reason.splitlines() or [""])[0].removeprefix("Skipped: ")[:200]
        item.config.stash[REPORT_KEY].row(f"{ended.outcome.upper()}: {item.name}", more=words)
    return ended  # type: ignore[return-value]


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config, load: LoadPod) -> Report:
    """Its head tells what the load generator's pod runs, which is the image of all the others."""
    report = pytestconfig.stash[REPORT_KEY]
    report.head(load.image, same_sources=load.sources() == sources(ROOT))
    version = load.run("python3", "-m", "service", "--version").strip()
    if version != __version__:
        pytest.exit(f"the image is Weir {version}, and this checkout {__version__}: build it, load it", 1)
    return report


SOURCES = """
import hashlib, pathlib, sys
digest = hashlib.sha256()
for path in sorted(pathlib.Path(sys.argv[1], "service").rglob("*")):
    if path.suffix in (".py", ".lua"):
        digest.update(path.as_posix().removeprefix(sys.argv[1]).encode() + path.read_bytes())
print(digest.hexdigest())
"""


def sources(root: Path) -> str:
    """A digest of the service's source files below `root`."""
    return run("python3", "-c", SOURCES, str(root)).strip()


class Ended:
    """What a load saw, all told."""

    def __init__(self, tallies: dict[str, Any]) -> None:
        self.tallies = {
            kind: Tally(**{**tally, "failures": [Failure(**f) for f in tally["failures"]]})
            for kind, tally in tallies.items()
        }

    def sent(self, *kinds: str) -> int:
        return sum(t.sent for k, t in self.tallies.items() if k in kinds or not kinds)

    def failures(self, *kinds: str) -> list[Failure]:
        return [f for k, t in self.tallies.items() if k in kinds or not kinds for f in t.failures]

    def figures(self) -> list[str]:
        whole, streams = ("whole", "fresh", "sdk_retrying", "conversation"), ("stream", "sdk_stream")
        return [
            f"{number:,}"
            for kinds in (whole, streams)
            for number in (self.sent(*kinds), len(self.failures(*kinds)))
        ]

    def hidden(self) -> str:
        """What the retrying SDK kept from its caller."""
        return f"the SDK tried again {self.tallies['sdk_retrying'].retries} times"

    def milliseconds(self, kind: str, share: float) -> float:
        ordered = sorted(self.tallies[kind].milliseconds)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


class Running:
    """A load that runs in its pod until `stop`."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [
                *("kubectl", "-n", LOAD_NAMESPACE, "exec", "-i", "load", "--"),
                *("python3", "/load/load.py", json.dumps(job)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._next()["event"] == "going"
        self.since = time.time()

    def stop(self) -> Ended:
        """Tell it to end; returns when all that ran has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write("stop\n")
        self._process.stdin.flush()
        ended = self._next()
        self._process.communicate(timeout=60)
        return Ended(ended["tallies"])

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _next(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the load generator ended without a word; its error is above"
        return json.loads(line)


class LoadPod:
    """Starts loads against a release; several may run at once."""

    node: str
    image: str

    def __init__(self) -> None:
        pod = get("pod", "load", "-n", LOAD_NAMESPACE)
        (status,) = pod["status"]["containerStatuses"]
        self.node = pod["spec"]["nodeName"]
        self.image = f"{status['image']} ({status['imageID']})"

    @contextmanager
    def on(self, release: Release, **job: Any) -> Iterator[Running]:
        running = Running({"url": release.address, "key": release.key, **job})
        try:
            yield running
        finally:
            running.kill()

    def run(self, *command: str) -> str:
        return kubectl("-n", LOAD_NAMESPACE, "exec", "load", "--", *command)

    def sources(self) -> str:
        return self.run("python3", "-c", SOURCES, "/app").strip()

    def ask(
        self, url: str, key: str, body: dict[str, Any] | None = None, *, times: int = 1
    ) -> Sequence[tuple[int, Any]]:
        """Statuses and JSON of so many answers, one after the other, each on a connection of its own."""
        said = json.dumps(body) if body is not None else ""
        told: list[tuple[int, Any]] = json.loads(self.run("python3", "-c", ASK, url, key, said, str(times)))
        return told


ASK = """
import json, sys, urllib.error, urllib.request
url, key, body, times = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
told = []
for _ in range(int(times)):
    request = urllib.request.Request(url, body.encode() or None, headers)
    try: answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error: answer = error
    told.append((answer.status, json.load(answer)))
print(json.dumps(told))
"""


@pytest.fixture(scope="session")
def load(images: Images) -> Iterator[LoadPod]:
    with namespace(LOAD_NAMESPACE):
        script = Path(__file__).with_name("load.py")
        run("kubectl", "-n", LOAD_NAMESPACE, "create", "configmap", "load", f"--from-file={script}")
        kubectl("apply", "-n", LOAD_NAMESPACE, "-f", "-", given=json.dumps(_load_pod(images)))
        kubectl("wait", "-n", LOAD_NAMESPACE, "pod/load", "--for=condition=Ready", "--timeout=120s")
        yield LoadPod()


def _load_pod(images: Images) -> dict[str, Any]:
    container = {
        "name": "load",
        "image": images.weir,
        "imagePullPolicy": images.pull_policy,
        "command": ["python3", "-c", "import signal; signal.sigwait({signal.SIGTERM})"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": "load", "mountPath": "/load"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "load"},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 5,
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": [{"name": "load", "configMap": {"name": "load"}}],
        },
    }
