"""kubectl, helm and the cluster behind KUBECONFIG, whichever it is, as the tests use them."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/weir"
POD_SECURITY = "pod-security.kubernetes.io"

_Found = TypeVar("_Found")


class Images(NamedTuple):
    """References that the cluster's nodes have, or can pull."""

    weir: str
    redis: str
    pull_policy: str

    def values(self) -> list[str]:
        """For `helm install`: one `--set` for each value."""
        weir_name, _, weir_tag = self.weir.rpartition(":")
        redis_name, _, redis_tag = self.redis.rpartition(":")
        pairs = {
            "image.registry": "",
            "image.repository": weir_name,
            "image.tag": weir_tag,
            "image.pullPolicy": self.pull_policy,
            "redis.embedded.image.registry": "",
            "redis.embedded.image.repository": redis_name,
            "redis.embedded.image.pullPolicy": self.pull_policy,
        }
        text = [item for name, value in pairs.items() for item in ("--set", f"{name}={value}")]
        return [*text, "--set-string", f"redis.embedded.image.tag={redis_tag}"]


def run(*command: str, given: str | None = None, seconds: float = 300) -> str:
    """The command's standard output. Its failure shows all that it said."""
    ended = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, check=False)
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


def kubectl(*arguments: str, given: str | None = None, seconds: float = 300) -> str:
    return run("kubectl", *arguments, given=given, seconds=seconds)


def get(*arguments: str) -> Any:
    return json.loads(kubectl("get", *arguments, "-o", "json"))


def until(what: str, look: Callable[[], _Found | None], seconds: float = 120) -> _Found:
    """What `look` finds, asked again and again: for states that `kubectl wait` cannot express."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.25)
    return found


class Release:
    """One installed release in a namespace of its own."""

    root = ROOT

    def __init__(self, namespace: str, images: Images, helm: str = "helm") -> None:
        self.namespace = namespace
        self.name = "weir"
        self._images = images
        self._helm = helm

    def install(self, *values: str, chart: Path = CHART) -> str:
        return self._apply("install", chart, values)

    def upgrade(self, *values: str, chart: Path = CHART) -> str:
        return self._apply("upgrade", chart, values)

    def _apply(self, verb: str, chart: Path, values: tuple[str, ...]) -> str:
        told = run(
            *(self._helm, verb, self.name, str(chart), "-n", self.namespace),
            *(*self._images.values(), *values),
            *("--wait", "--timeout", "180s"),
        )
        self.rolled_out()
        return told

    def rollback(self) -> None:
        run(self._helm, "rollback", self.name, "-n", self.namespace, "--wait", "--timeout", "180s")
        self.rolled_out()

    def rolled_out(self) -> None:
        self.kubectl("rollout", "status", f"deployment/{self.name}", "--timeout=180s")

    def test(self) -> dict[str, str]:
        """What each check said that ended well, by its name; those that were skipped are not there."""
        ended = subprocess.run(
            [self._helm, "test", self.name, "-n", self.namespace, "--timeout", "180s"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        # Helm brings the pods' words on its standard error.
        return dict(re.findall(r"\b(\w+): good: ([^\n\"]+)", ended.stderr))

    def uninstall(self) -> str:
        return run(self._helm, "uninstall", self.name, "-n", self.namespace, "--wait", "--timeout", "240s")

    def kubectl(self, *arguments: str, given: str | None = None, seconds: float = 300) -> str:
        return kubectl("-n", self.namespace, *arguments, given=given, seconds=seconds)

    def get(self, *arguments: str) -> Any:
        return get("-n", self.namespace, *arguments)

    @property
    def key(self) -> str:
        """The generated API key."""
        secret = self.get("secret", f"{self.name}-api-keys")
        return base64.b64decode(secret["data"]["api-key"]).decode()

    @property
    def address(self) -> str:
        """The Service by its number: a lab's single DNS server is not what is tested here."""
        service = self.get("service", self.name)["spec"]
        return f"http://{service['clusterIP']}:{service['ports'][0]['port']}"

    def pods(self, *, ending: bool = False) -> list[Any]:
        """Weir's pods that are not on their way out; or those that are."""
        chosen = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component=server"
        found: list[Any] = self.get("pods", "-l", chosen)["items"]
        return [pod for pod in found if ("deletionTimestamp" in pod["metadata"]) == ending]

    def names(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.pods()]

    def identities(self) -> set[str]:
        """A pod that was replaced has another one, whatever its name is."""
        return {pod["metadata"]["uid"] for pod in self.pods()}

    def restarts(self) -> dict[str, int]:
        """How often containers of the namespace's pods were started again, where it was not never."""
        states = {
            f"{pod['metadata']['name']}/{state['name']}": state["restartCount"]
            for pod in self.get("pods")["items"]
            for state in pod["status"].get("containerStatuses", [])
        }
        return {name: count for name, count in states.items() if count}

    def delete_by_force(self, pod: str) -> None:
        """Kubernetes forgets the pod at once, and its node gives it two seconds."""
        self.kubectl("delete", "pod", pod, "--grace-period=0", "--force")

    def all_pods_gone(self) -> None:
        """Also those that are still draining."""
        self.kubectl(
            "wait", "pods", "-l", f"app.kubernetes.io/instance={self.name}", "--for=delete", "--timeout=240s"
        )

    def status_of(self, pod: str, key: str) -> int:
        """What the pod itself answers to somebody who presents this key."""
        return int(
            self._asked(pod, "8000/v1/models", f"headers={{'Authorization': 'Bearer {key}'}}", "status")
        )

    def upstreams(self) -> dict[str, str]:
        """Names and kinds of the upstreams, as the first pod tells at `/health`."""
        pod = self.pods()[0]["metadata"]["name"]
        parts = json.loads(self._asked(pod, "8000/health", "", "read().decode()"))["parts"]
        prefix = "upstream:"
        return {
            name.removeprefix(prefix): part["detail"]["kind"]
            for name, part in parts.items()
            if name.startswith(prefix)
        }

    def _asked(self, pod: str, path: str, more: str, show: str) -> str:
        script = f"""
import urllib.error, urllib.request as u
try: answer = u.urlopen(u.Request('http://127.0.0.1:{path}', {more}), timeout=5)
except urllib.error.HTTPError as error: answer = error
print(answer.{show})
"""
        return self.kubectl("exec", pod, "-c", "weir", "--", "python3", "-c", script).strip()

    def metric(self, pod: str, name: str) -> float:
        """A metric's samples, summed, as the pod shows them now."""
        return sum(value for _, value in self._samples(pod, name))

    def outcomes(self, pod: str) -> Counter[str]:
        """How the requests to models ended that this process has seen."""
        counted: Counter[str] = Counter()
        for labels, value in self._samples(pod, "weir_requests_total"):
            counted[labels.split('outcome="')[1].split('"')[0]] += int(value)
        return counted

    def _samples(self, pod: str, name: str) -> list[tuple[str, float]]:
        page = self._asked(pod, "9000/metrics", "", "read().decode()")
        found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", page, re.MULTILINE)
        return [(labels, float(value)) for labels, value in found]

    def peak_memory(self, pod: str) -> int:
        """The most bytes that Weir's process has held resident since it began, by the kernel's account."""
        status = self.kubectl(
            *("exec", pod, "-c", "weir", "--"),
            *("python3", "-c", "print(open('/proc/1/status').read())"),
        )
        return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024


KINDS = (
    "deployments,statefulsets,replicasets,pods,services,endpointslices,configmaps,secrets,serviceaccounts,"
    "networkpolicies,poddisruptionbudgets,horizontalpodautoscalers,persistentvolumeclaims,leases"
)


def objects(namespace: str) -> set[str]:
    return set(kubectl("get", KINDS, "-n", namespace, "-o", "name").split())


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A namespace with Pod Security `restricted` enforced; at its end it goes, and nobody waits for that."""
    kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=300s")  # of an earlier run
    kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, *(f"{POD_SECURITY}/{m}=restricted" for m in ("enforce", "warn")))
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")
