"""The chart as a package: its versions, its files, and what it renders without any values."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
import yaml

from service import __version__
from tests.chart import renew
from tests.chart.rendering import CHART, Refused, Rendered, render, template
from tests.chart.renew import golden
from tests.programs import HELMS, ROOT, need

ABOUT = yaml.safe_load((CHART / "Chart.yaml").read_text())


@pytest.mark.parametrize("case", renew.CASES)
def test_what_is_rendered_is_as_it_was(case: str) -> None:
    assert renew.rendered_now(case) == renew.path(case).read_text(), (
        "if that is as you mean it: .venv/bin/python -m tests.chart.renew"
    )


def test_the_version_is_no_piece_of_an_address() -> None:
    text = f"weir:{__version__} 192.{__version__}/24 {__version__}.1"
    assert golden(Rendered(text, ())) == f"weir:VERSION 192.{__version__}/24 {__version__}.1\n"


def test_the_chart_is_for_the_service_of_this_version() -> None:
    assert ABOUT["appVersion"] == __version__
    images = {i["name"]: i["image"] for i in yaml.safe_load(ABOUT["annotations"]["artifacthub.io/images"])}
    rendered = render()
    assert images["weir"] == rendered.server["image"]
    assert (
        images["redis"] == rendered.one("StatefulSet")["spec"]["template"]["spec"]["containers"][0]["image"]
    )


def test_the_chart_says_what_it_is() -> None:
    assert ABOUT["apiVersion"] == "v2"
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?", ABOUT["version"])
    assert "dependencies" not in ABOUT
    for key in ("artifacthub.io/changes", "artifacthub.io/links", "artifacthub.io/images"):
        assert yaml.safe_load(ABOUT["annotations"][key])
    for change in yaml.safe_load(ABOUT["annotations"]["artifacthub.io/changes"]):
        assert change["kind"] in ("added", "changed", "deprecated", "removed", "fixed", "security")


@pytest.mark.parametrize("helm", HELMS)
def test_an_older_kubernetes_is_refused(helm: str) -> None:
    assert ABOUT["kubeVersion"] == ">=1.29.0-0"
    with pytest.raises(Refused, match="incompatible with Kubernetes"):
        render(helm=helm, kubernetes="1.28.0")
    assert render(helm=helm, kubernetes="1.29.0-alpha.1").objects


@pytest.mark.parametrize("helm", HELMS)
def test_the_package_holds_what_an_install_needs_and_no_more(helm: str, tmp_path: Path) -> None:
    template([need(helm), "package", str(CHART), "--destination", str(tmp_path)])
    (package,) = tmp_path.glob("*.tgz")
    assert package.name == f"weir-{ABOUT['version']}.tgz"
    with tarfile.open(package) as archive:
        names = set(archive.getnames())
    assert {
        f"weir/{name}" for name in ("Chart.yaml", "README.md", "values.yaml", "values.schema.json")
    } <= names
    assert not [n for n in names if n.startswith("weir/ci/") or n.endswith(".gotmpl")]
    about = template([need(helm), "show", "chart", str(package)])
    assert yaml.safe_load(about)["kubeVersion"] == ABOUT["kubeVersion"]
    assert golden(render(helm=helm, chart=package)) == golden(render(helm=helm))


@pytest.mark.parametrize("helm", HELMS)
def test_helm_needs_no_word_about_kubernetes(helm: str) -> None:
    """`make tools` builds programs that know a version of it, as the released ones do."""
    assert "kind: Deployment" in template([need(helm), "template", str(CHART)])


def test_the_files_of_the_matrix_say_what_they_are_for() -> None:
    for path in (CHART / "ci").iterdir():
        assert path.name.endswith("-values.yaml")
        assert path.read_text().startswith("# ")


def test_the_makefile_pins_each_program() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in ("HELM", "HELM4", "KUBE_SCORE", "HELM_DOCS"):
        assert re.search(rf"^{name} := v\d+\.\d+\.\d+$", makefile, re.MULTILINE)
