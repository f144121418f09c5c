"""Renders the chart as `helm template` does, and answers what is in it."""

from __future__ import annotations

import base64
import functools
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.programs import ROOT, need

CHART = ROOT / "helm/weir"
RELEASE = "rel"
NAMESPACE = "apps"
KUBERNETES = "1.34.0"
CASES = sorted(p.name.removesuffix("-values.yaml") for p in (CHART / "ci").glob("*-values.yaml"))

Object = dict[str, Any]


class Refused(Exception):
    """Helm's own words."""


class _Loader(yaml.CSafeLoader):
    """Refuses what YAML forbids and PyYAML lets through: a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"twice in one mapping: {twice} at {node.start_mark}"
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Rendered:
    text: str
    objects: tuple[Object, ...]

    def all(self, kind: str) -> list[Object]:
        return [o for o in self.objects if o["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Object:
        found = [o for o in self.all(kind) if name in (None, o["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} objects {kind} {name or ''}"
        return found[0]

    @property
    def deployment(self) -> Object:
        """Weir's own, whether the worker has one too or not."""
        name = "app.kubernetes.io/component"
        (found,) = (d for d in self.all("Deployment") if d["metadata"]["labels"][name] == "server")
        return found

    @property
    def server(self) -> Object:
        """The container of Weir."""
        return container(self.deployment, "weir")

    def environment(self) -> dict[str, Object]:
        """The variables of Weir's container by name; none is there twice."""
        variables = self.server["env"]
        by_name = {v["name"]: v for v in variables}
        assert len(by_name) == len(variables)
        return by_name

    def secret(self, name: str) -> dict[str, str]:
        data = self.one("Secret", name)["data"]
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def pods(self) -> Iterator[tuple[Object, Object, Object]]:
        """Each object that has pods or is one, with its pods' metadata and spec."""
        for thing in self.objects:
            if thing["kind"] == "Pod":
                yield thing, thing["metadata"], thing["spec"]
            elif thing["kind"] in ("Deployment", "StatefulSet"):
                template = thing["spec"]["template"]
                yield thing, template["metadata"], template["spec"]


def container(thing: Object, name: str) -> Object:
    spec = thing["spec"] if thing["kind"] == "Pod" else thing["spec"]["template"]["spec"]
    found: list[Object] = [c for c in spec["containers"] if c["name"] == name]
    return found[0]


def render(
    values: Mapping[str, Any] | None = None,
    *,
    case: str = "default",
    helm: str = "helm",
    kubernetes: str = KUBERNETES,
    chart: Path = CHART,
    release: str = RELEASE,
) -> Rendered:
    """A case of the matrix with `values` over it. The same question is answered from memory, secrets too.

    Raises Refused with what Helm said.
    """
    return _render(json.dumps(values or {}), case, need(helm), kubernetes, chart, release)


def refusal(values: Mapping[str, Any], *, helm: str = "helm", release: str = RELEASE) -> str:
    """Why Helm does not render these values, on one line."""
    try:
        render(values, helm=helm, release=release)
    except Refused as refused:
        return " ".join(str(refused).split())
    raise AssertionError("was rendered")


@functools.cache
def _render(values: str, case: str, helm: str, kubernetes: str, chart: Path, release: str) -> Rendered:
    command = [helm, "template", release, str(chart), "--namespace", NAMESPACE, "--kube-version", kubernetes]
    command += ["--values", str(CHART / "ci" / f"{case}-values.yaml"), "--values", "-"]
    text = template(command, values)
    return Rendered(text, objects(text))


def objects(text: str) -> tuple[Object, ...]:
    return tuple(o for o in yaml.load_all(text, Loader=_Loader) if o)


def template(command: list[str], given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout
