"""deploy/gitops: what a controller makes of these files is good, and the same each time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.chart.rendering import Object, Rendered
from tests.deploy.rendering import CHART, DEPLOY, check_environment, check_schema, load, load_all, render
from tests.programs import ROOT

GITOPS = DEPLOY / "gitops"
ARGO: Object = load(GITOPS / "argocd-application.yaml")
SOURCE, FLUX = load_all(GITOPS / "flux-helmrelease.yaml")
SECRETS: list[Object] = load_all(GITOPS / "secrets.yaml")
VERSION = load(CHART / "Chart.yaml")["version"]


def argo() -> Rendered:
    """As Argo CD renders: `helm template`, the file of the other source, then the values here."""
    chart, values = ARGO["spec"]["sources"]
    (file,) = chart["helm"]["valueFiles"]
    reference, _, path = file.partition("/")
    assert reference == f"${values['ref']}"
    return render(path, values=chart["helm"]["valuesObject"])


def flux() -> Rendered:
    return render("deploy/values/production.yaml", values=FLUX["spec"]["values"])


BOTH = pytest.mark.parametrize("controller", [argo, flux])


@BOTH
def test_it_renders_the_same_each_time_and_makes_no_secret(controller: Any) -> None:
    rendered = controller()
    assert rendered.text == controller().text
    assert not rendered.all("Secret")


def test_without_existing_secrets_each_rendering_has_another_key() -> None:
    """The reason for all this; if it ceases to be so, the comments are wrong."""
    first, second = (render().secret("weir-api-keys")["api-key"] for _ in range(2))
    assert first != second


@BOTH
def test_kubernetes_and_weir_take_it(controller: Any) -> None:
    rendered = controller()
    check_schema(rendered)
    check_environment(rendered.environment())


@BOTH
def test_every_secret_that_the_pods_read_is_made(controller: Any) -> None:
    made = {
        (secret["spec"]["target"]["name"], item["secretKey"])
        for secret in SECRETS
        for item in secret["spec"]["data"]
    }
    rendered = controller()
    assert set(_read(rendered)) | {("weir-keys", "api-key")} == made
    # That one is for the pods of `helm test` alone, where there are any.
    assert ("weir-keys", "api-key") not in _read(rendered)
    for pod in rendered.all("Pod"):
        (container,) = pod["spec"]["containers"]
        (key,) = [variable for variable in container["env"] if variable["name"] == "WEIR_API_KEY"]
        reference = {"name": "weir-keys", "key": "api-key", "optional": True}
        assert key["valueFrom"]["secretKeyRef"] == reference


def _read(rendered: Rendered) -> list[tuple[str, str]]:
    """Name and key of each Secret in Weir's pods."""
    spec = rendered.one("Deployment")["spec"]["template"]["spec"]
    references = [v["valueFrom"]["secretKeyRef"] for v in rendered.server["env"] if "valueFrom" in v]
    keys = [(reference["name"], reference["key"]) for reference in references]
    for volume in spec["volumes"]:
        if secret := volume.get("secret"):
            keys += [(secret["secretName"], item["key"]) for item in secret["items"]]
    return keys


def test_secrets_are_in_the_namespace_and_named_as_what_they_make() -> None:
    for secret in SECRETS:
        assert (secret["apiVersion"], secret["kind"]) == ("external-secrets.io/v1", "ExternalSecret")
        assert secret["metadata"] == {"name": secret["spec"]["target"]["name"], "namespace": "weir"}
        assert secret["spec"]["secretStoreRef"] == {"kind": "ClusterSecretStore", "name": "store"}


def test_the_commands_by_hand_make_the_same_secrets() -> None:
    text = (GITOPS / "secrets.yaml").read_text()
    for secret in SECRETS:
        name = secret["metadata"]["name"]
        (command,) = [
            line for line in text.splitlines() if f"kubectl -n weir create secret generic {name} " in line
        ]
        for item in secret["spec"]["data"]:
            key = item["secretKey"]
            assert re.search(rf" --from-(file={key}|literal={key}=.+)( |$)", command)
        assert command.removeprefix("#").strip() in " ".join((ROOT / "docs/deploying.md").read_text().split())


def test_argo_takes_the_released_chart_and_the_values_of_that_release() -> None:
    chart, values = ARGO["spec"]["sources"]
    assert (ARGO["apiVersion"], ARGO["kind"]) == ("argoproj.io/v1alpha1", "Application")
    assert (chart["chart"], chart["targetRevision"]) == ("weir", VERSION)
    assert "://" not in chart["repoURL"]  # so that Argo CD takes it for an OCI registry
    assert values["targetRevision"] == f"v{VERSION}"
    assert chart["helm"]["releaseName"] == "weir"
    assert ARGO["spec"]["destination"]["namespace"] == "weir"
    assert not argo().all("Pod")  # those of `helm test`


def test_flux_takes_the_released_chart() -> None:
    assert (SOURCE["apiVersion"], SOURCE["kind"]) == ("source.toolkit.fluxcd.io/v1", "OCIRepository")
    assert (FLUX["apiVersion"], FLUX["kind"]) == ("helm.toolkit.fluxcd.io/v2", "HelmRelease")
    repository, _, name = SOURCE["spec"]["url"].removeprefix("oci://").rpartition("/")
    assert (repository, name) == (ARGO["spec"]["sources"][0]["repoURL"], "weir")
    assert SOURCE["spec"]["ref"] == {"tag": VERSION}
    assert SOURCE["spec"]["layerSelector"]["mediaType"].startswith("application/vnd.cncf.helm.chart.content")
    assert FLUX["spec"]["chartRef"] == {"kind": SOURCE["kind"], "name": SOURCE["metadata"]["name"]}
    (source,) = FLUX["spec"]["valuesFrom"]
    assert source == {"kind": "ConfigMap", "name": "weir-values"}
    text = (GITOPS / "flux-helmrelease.yaml").read_text()
    assert "create configmap weir-values --from-file=values.yaml=deploy/values/production.yaml" in text


def test_flux_waits_for_the_end_of_the_longest_stream() -> None:
    grace = flux().one("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(FLUX["spec"]["timeout"].removesuffix("m")) * 60 > grace


def test_both_give_the_same_values() -> None:
    ours: Mapping[str, Any] = ARGO["spec"]["sources"][0]["helm"]["valuesObject"]
    assert {k: v for k, v in ours.items() if k != "tests"} == FLUX["spec"]["values"]
