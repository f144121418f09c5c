"""What the kubelet makes of a pod: its environment and its files, Secrets read."""

from __future__ import annotations

import re

import yaml

from tests.chart.rendering import RELEASE, Object, Rendered
from tests.programs import ROOT

# What Secrets hold that are there already, by name and key.
GIVEN = {
    ("openai", "key"): "sk-of-a-secret",
    ("azure", "OPENAI_API_KEY"): "azurekey",
    ("azure", "key"): "azurekey",
    ("redis", "redis-password"): "SecretWord1",
    ("redis", "password"): "SecretWord1",
    ("redis", "word"): "SecretWord1",
    ("sentinels", "sentinel-password"): "SecretWord2",
    ("redis-url", "url"): "rediss://:word@redis.example.com:6379/0",
    ("ledger-app", "uri"): "postgresql://app:word@ledger-rw.databases:5432/app",
    ("weir.ledger.credentials", "password"): "p@ss/w:rd",
    ("weir-keys", "production.yaml"): yaml.safe_dump({"keys": [{"name": "app", "sha256": "b" * 64}]}),
}


def of_the_image() -> dict[str, str]:
    """What the Dockerfile sets for its production target."""
    block = re.search(r"AS runtime\nENV ((?:.*\\\n)*.*)", (ROOT / "Dockerfile").read_text())
    assert block
    return dict(re.findall(r"([A-Z_]+)=(\S+)", block[1]))


def of_the_pod(rendered: Rendered) -> dict[str, str]:
    """The environment as the kubelet would make it: Secrets read, `$(NAME)` put into other values."""
    return of_the_image() | of_the_container(rendered, rendered.server)


def of_the_container(rendered: Rendered, one: Object) -> dict[str, str]:
    made: dict[str, str] = {}
    for variable in one["env"]:
        value = variable.get("value")
        if value is None:
            reference = variable["valueFrom"]["secretKeyRef"]
            made[variable["name"]] = secret(rendered, reference["name"], reference["key"])
        else:
            made[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: made[name[1]], value)
    return made


def secret(rendered: Rendered, name: str, key: str) -> str:
    ours = {o["metadata"]["name"] for o in rendered.all("Secret")}
    return rendered.secret(name)[key] if name in ours else GIVEN[name, key]


def mounted(rendered: Rendered) -> dict[str, str]:
    """The files of Weir's container by path."""
    spec = rendered.deployment["spec"]["template"]["spec"]
    volumes = {v["name"]: v for v in spec["volumes"]}
    files = {}
    for mount in rendered.server["volumeMounts"]:
        volume = volumes[mount["name"]]
        if "secret" in volume:
            for item in volume["secret"]["items"]:
                text = secret(rendered, volume["secret"]["secretName"], item["key"])
                files[f"{mount['mountPath']}/{item['path']}"] = text
        elif volume.get("configMap", {}).get("name", "").startswith(RELEASE):
            for name, text in rendered.one("ConfigMap", volume["configMap"]["name"])["data"].items():
                files[f"{mount['mountPath']}/{name}"] = text
    return files
