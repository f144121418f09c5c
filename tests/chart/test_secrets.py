"""Secrets are in Secrets, and nowhere else."""

from __future__ import annotations

import base64
import json

import pytest
import yaml

from service.auth import hash_key
from tests.chart.rendering import RELEASE, Object, Rendered, render
from tests.programs import HELMS

KNOWN = {
    "openai": ["sk-known-upstream-key"],
    "redis-external": ["KnownRedisPassword1"],
    "redis-persistent": ["KnownRedisPassword2"],
}


def words(rendered: Rendered) -> set[str]:
    """What the Secrets of the release hold, but for the file of hashes."""
    return {
        value
        for s in rendered.all("Secret")
        for key, value in rendered.secret(s["metadata"]["name"]).items()
        if key != "keys.yaml"
    }


@pytest.mark.parametrize("case", ["default", *KNOWN])
def test_no_secret_word_stands_outside_of_a_secret(case: str) -> None:
    rendered = render(case=case)
    found = words(rendered)
    assert found >= set(KNOWN.get(case, []))
    assert len(found) >= 2 or case == "redis-external"
    others = json.dumps([o for o in rendered.objects if o["kind"] != "Secret"])
    for word in found:
        assert word not in others
        assert base64.b64encode(word.encode()).decode() not in others


def test_the_pods_get_hashes_and_no_key() -> None:
    rendered = render()
    secret = rendered.secret(f"{RELEASE}-weir-api-keys")
    key = secret["api-key"]
    assert len(key) > 40
    assert key not in secret["keys.yaml"]
    entries = yaml.safe_load(secret["keys.yaml"])["keys"]
    assert entries == [{"name": "default", "tenant": "default", "sha256": hash_key(key)}]
    pod = rendered.one("Deployment")["spec"]["template"]["spec"]
    mounts = [v["secret"] for v in pod["volumes"] if "secret" in v]
    assert mounts == [
        {"secretName": f"{RELEASE}-weir-api-keys", "items": [{"key": "keys.yaml", "path": "keys.yaml"}]}
    ]
    assert "api-key" not in json.dumps(rendered.server)


def test_keys_by_hash_stand_beside_the_generated_one() -> None:
    mine = {"name": "shop", "tenant": "shops", "sha256": "c" * 64}
    secret = render({"auth": {"keys": [mine]}}).secret(f"{RELEASE}-weir-api-keys")
    assert [k["name"] for k in yaml.safe_load(secret["keys.yaml"])["keys"]] == ["default", "shop"]
    alone = render(case="openai").secret(f"{RELEASE}-weir-api-keys")
    assert set(alone) == {"keys.yaml"}


@pytest.mark.parametrize("helm", HELMS)
def test_each_install_has_words_of_its_own(helm: str) -> None:
    assert not words(render(helm=helm)) & words(render(helm=helm, release="other"))


def test_with_secrets_of_ones_own_the_chart_makes_none() -> None:
    assert not render(case="full").all("Secret")


def test_there_is_no_default_password() -> None:
    external = {"redis": {"mode": "external", "external": {"host": "h"}}}
    rendered = render(external)
    assert "REDIS_PASSWORD" not in rendered.environment()
    assert rendered.environment()["REDIS_URL"]["value"] == "redis://h:6379/0"
    assert not [s for s in rendered.all("Secret") if "redis" in s["metadata"]["name"]]


@pytest.mark.parametrize("case", ["default", "no-auth", "full", "names"])
def test_no_pod_has_a_service_accounts_token(case: str) -> None:
    rendered = render(case=case)
    accounts: list[Object] = rendered.all("ServiceAccount")
    assert all(account["automountServiceAccountToken"] is False for account in accounts)
    for _, _, spec in rendered.pods():
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
