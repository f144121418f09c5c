"""The chart with the files of values that `deploy` holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from service.config import Settings
from tests.chart.rendering import KUBERNETES, Rendered, objects, template
from tests.programs import ROOT, need
from tests.running import settings

DEPLOY = ROOT / "deploy"
CHART = ROOT / "helm/weir"
NOT_KUBERNETES_OWN = {"ServiceMonitor", "PrometheusRule"}
FROM_SECRETS = {
    "OPENAI_API_KEY": "sk-of-a-test",
    "REDIS_URL": "rediss://redis:6379/0",
    "REDIS_PASSWORD": "word",
}
"""What stands in the Secrets that the files name."""


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def load_all(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def render(*files: str, sets: Mapping[str, str] | None = None, values: Any = None) -> Rendered:
    """The release `weir` with these files, paths from the root, then `values`, then `sets` over them."""
    command = [need("helm"), "template", "weir", str(CHART), "--namespace", "weir"]
    command += ["--kube-version", KUBERNETES]
    for file in files:
        command += ["--values", str(ROOT / file)]
    command += ["--values", "-"]
    for name, value in (sets or {}).items():
        command += ["--set", f"{name}={value}"]
    text = template(command, yaml.safe_dump(values or {}))
    return Rendered(text, objects(text))


def check_schema(rendered: Rendered) -> None:
    """Each object as the API server would read it, with no field that it does not know."""
    for thing in rendered.objects:
        if thing["kind"] not in NOT_KUBERNETES_OWN:
            kubernetes_validate.validate(thing, ".".join(KUBERNETES.split(".")[:2]), strict=True)


def environment(variables: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names and values as the process gets them: Secrets read, references expanded."""
    given = {
        name: variable["value"] if "value" in variable else FROM_SECRETS[name]
        for name, variable in variables.items()
    }
    return {
        name: re.sub(r"\$\(([A-Z_]+)\)", lambda found: given[found[1]], value)
        for name, value in given.items()
    }


def check_environment(variables: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Weir takes these variables: each is a setting, and its value is right."""
    given = environment(variables)
    known = {name.upper() for name in Settings.model_fields}
    assert set(given) <= known, set(given) - known
    return settings(**{name.lower(): value for name, value in given.items()})


def paths(values: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[str]:
    """Each place in values, as `--set` names it."""
    for name, value in values.items():
        yield ".".join((*before, name))
        if isinstance(value, Mapping):
            yield from paths(value, (*before, name))
