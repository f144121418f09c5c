"""`helm test`: each of its pods asks what there is to ask, and a Weir of the same release answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.__main__ import main
from service.smoke import CHECKS
from tests.chart.kubelet import mounted, of_the_container, of_the_pod
from tests.chart.rendering import CASES, NAMESPACE, Object, Rendered, render
from tests.running import WeirProcess

# With no Redis and no upstream from outside, so that one process is the whole release.
ALONE = ("default", "redis-none")


def pods(rendered: Rendered) -> dict[str, Object]:
    """Their containers by the check, in the order in which they run."""
    found = {}
    for pod in sorted(rendered.all("Pod"), key=lambda p: p["metadata"]["annotations"]["helm.sh/hook-weight"]):
        (container,) = pod["spec"]["containers"]
        assert container["command"][:-1] == ["python3", "-m", "service", "smoke"]
        found[container["command"][-1]] = container
    return found


def variables(rendered: Rendered, container: Object) -> dict[str, str]:
    """Without those whose Secret, which may lack, is none of ours."""
    ours = {o["metadata"]["name"] for o in rendered.all("Secret")}

    def there(variable: Object) -> bool:
        reference = variable.get("valueFrom", {}).get("secretKeyRef", {})
        return not reference.get("optional") or reference["name"] in ours

    return of_the_container(rendered, {"env": [v for v in container["env"] if there(v)]})


@pytest.mark.parametrize("case", [c for c in CASES if c != "no-auth"])
def test_each_pod_asks_services_that_are_there(case: str) -> None:
    rendered = render(case=case)
    found = pods(rendered)
    assert set(found) <= set(CHECKS)
    assert "limit" not in list(found)[:-1], "it uses up what others need"
    services = {
        f"{s['metadata']['name']}.{s['metadata']['namespace']}": s["spec"] for s in rendered.all("Service")
    }
    for container in found.values():
        given = variables(rendered, container)
        api, admin, each = (urlsplit(given[n]) for n in ("WEIR_URL", "WEIR_ADMIN_URL", "WEIR_PODS_URL"))
        assert api.port in {port["port"] for port in services[str(api.hostname)]["ports"]}
        for url, name in ((admin, "admin"), (each, "http")):
            # Addresses of pods, so the port is theirs.
            assert services[str(url.hostname)]["clusterIP"] == "None"
            assert url.port in {p["containerPort"] for p in rendered.server["ports"] if p["name"] == name}


@pytest.mark.parametrize(
    ("values", "there"),
    [
        ({}, True),
        ({"autoscaling": {"enabled": True}}, True),
        ({"redis": {"mode": "cluster", "cluster": {"nodes": ["h:7000"]}}}, True),
        ({"redis": {"mode": "none"}, "replicaCount": 1}, True),
        ({"redis": {"mode": "none"}}, False),
        ({"redis": {"mode": "none"}, "autoscaling": {"enabled": True, "minReplicas": 1}}, False),
        ({"redis": {"mode": "none"}, "keda": {"enabled": True, "minReplicaCount": 1}}, False),
    ],
)
def test_a_conversation_is_held_where_the_pods_share_it(values: dict[str, Any], there: bool) -> None:
    assert ("conversation" in pods(render(values))) is there


@pytest.mark.parametrize(
    ("values", "model"),
    [
        ({}, "simulator"),
        ({"upstream": {"existingSecret": "mine"}}, "gpt-4o-mini"),
        ({"upstream": {"baseUrl": "http://vllm/v1", "model": "llama"}}, "llama"),
        ({"upstream": {"baseUrl": "http://vllm/v1"}}, None),
        (
            {
                "upstream": {"baseUrl": "http://vllm/v1"},
                "config": {"models": [{"name": "m", "upstream": "openai"}]},
            },
            "m",
        ),
        ({"config": {"models": [{"name": n, "upstream": "simulator"} for n in ("s*", "m")]}}, "m"),
        ({"config": {"models": [{"name": "s*", "upstream": "simulator"}]}}, None),
    ],
)
def test_a_model_is_named_where_one_is_known(values: dict[str, Any], model: str | None) -> None:
    """Else the first of the list is asked."""
    rendered = render(values)
    for container in pods(rendered).values():
        assert variables(rendered, container).get("WEIR_MODEL") == model


@pytest.fixture(scope="module", params=ALONE)
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, WeirProcess]]:
    """A case, and Weir with the environment and the files of its pod."""
    rendered = render(case=request.param)
    folder: Path = tmp_path_factory.mktemp(request.param)
    given = of_the_pod(rendered)
    for path, text in mounted(rendered).items():
        place = folder / Path(path).name
        place.write_text(text)
        given = {name: str(place) if value == path else value for name, value in given.items()}
    left_out = ("PATH", "HOME", "PORT", "ADMIN_PORT", "REDIS_URL", "REDIS_PASSWORD", "PYTHONPATH")
    given = {name: value for name, value in given.items() if name not in left_out}
    given |= {"HOST": "127.0.0.1", "ADMIN_HOST": "127.0.0.1", "DRAIN_DELAY": "0"}
    with WeirProcess(**given, SIMULATOR_TOKENS_PER_SECOND="10000") as weir:
        weir.wait_until_ready()
        yield request.param, weir


def test_a_release_that_is_well_passes(
    release: tuple[str, WeirProcess], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, weir = release
    rendered = render(case=case)
    here = {"WEIR_URL": weir.url, "WEIR_ADMIN_URL": weir.admin_url, "WEIR_PODS_URL": weir.url}
    for check, container in pods(rendered).items():
        with monkeypatch.context() as pod:
            given = variables(rendered, container)
            assert all(NAMESPACE in given[name] for name in here)
            for name, value in (given | here).items():
                pod.setenv(name, value)
            assert main(["smoke", check]) == 0, capsys.readouterr().out
        assert capsys.readouterr().out.startswith(f"{check}: good")
