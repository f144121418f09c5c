"""Every pod passes the Pod Security Standard `restricted` and our rules; a field that is gone is noticed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.chart.podsecurity import faults
from tests.chart.rendering import CASES, CHART, Rendered, render
from tests.programs import HELMS

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def all_faults(rendered: Rendered, *kinds: str) -> dict[str, list[str]]:
    """The faults of each pod of these kinds, by the name of what it is of."""
    return {
        thing["metadata"]["name"]: faults(spec)
        for thing, _, spec in rendered.pods()
        if not kinds or thing["kind"] in kinds
    }


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_restricted(case: str) -> None:
    found = all_faults(render(case=case))
    assert found
    assert not any(found.values()), found


def removals() -> list[tuple[str, str, str]]:
    """Each field of each security context of the values: whose, where, which."""
    whose = {"weir": VALUES, "redis": VALUES["redis"]["embedded"]}
    return [
        (owner, context, field)
        for owner, values in whose.items()
        for context in ("podSecurityContext", "securityContext")
        for field in values[context]
    ]


@pytest.mark.parametrize(("owner", "context", "field"), removals())
def test_a_field_that_is_gone_is_noticed(owner: str, context: str, field: str) -> None:
    change: dict[str, Any] = {context: {field: None}}
    rendered = render(change if owner == "weir" else {"redis": {"embedded": change}})
    if owner == "redis":
        noticed = all_faults(rendered, "StatefulSet")
        assert all(noticed.values())
        assert not any(all_faults(rendered, "Deployment", "Pod").values())
    else:
        noticed = all_faults(rendered, "Deployment", "Pod")
        assert len(noticed) > 3, "the pods of `helm test` are among them"
        assert all(noticed.values()), noticed
        assert not any(all_faults(rendered, "StatefulSet").values())


def test_every_field_that_is_there_was_removed() -> None:
    """So that a field which a later version adds is looked at too."""
    fields = {(context, field) for _, context, field in removals()}
    assert ("securityContext", "readOnlyRootFilesystem") in fields
    assert ("podSecurityContext", "seccompProfile") in fields
    assert len(removals()) == 20


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}}, "capabilities.add"),
        ({"securityContext": {"capabilities": {"drop": []}}}, "capabilities.drop"),
        ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
        ({"securityContext": {"privileged": True}}, "privileged"),
        ({"podSecurityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile"),
        ({"extraVolumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "volume host"),
        ({"extraContainers": [{"name": "bare", "image": "bare"}]}, "container bare: readOnlyRootFilesystem"),
    ],
)
def test_a_wrong_value_is_noticed_too(change: dict[str, Any], word: str) -> None:
    (found,) = all_faults(render(change), "Deployment").values()
    assert any(word in fault for fault in found)


@pytest.mark.parametrize("helm", HELMS)
def test_without_users_and_groups_another_one_chooses_them(helm: str) -> None:
    """As the chart's README says for OpenShift: nothing is left that its `restricted-v2` would refuse."""
    nobody = {"podSecurityContext": dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"))}
    example = re.search(r"## OpenShift.*?```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
    assert example
    assert yaml.safe_load(example[1]) == nobody | {"redis": {"embedded": nobody}}
    rendered = render(yaml.safe_load(example[1]), helm=helm)
    assert len(list(rendered.pods())) > 5
    for thing, _, spec in rendered.pods():
        assert set(spec["securityContext"]) == {"runAsNonRoot", "fsGroupChangePolicy", "seccompProfile"}
        container = spec["containers"][0]["name"]
        chosen = {
            "fsGroup: who owns volumes",
            *(f"container {container}: {f}" for f in ("runAsUser", "runAsGroup")),
        }
        assert set(faults(spec)) == chosen, thing["metadata"]["name"]


def test_what_is_written_to_is_a_volume() -> None:
    """The root is read-only, so the places that the programs write to are mounted."""
    rendered = render()
    assert {"name": "tmp", "mountPath": "/tmp"} in rendered.server["volumeMounts"]
    (redis,) = rendered.one("StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert {"name": "data", "mountPath": "/data"} in redis["volumeMounts"]
    assert redis["workingDir"] == "/data"
