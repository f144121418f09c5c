"""The chart installs the dashboards as they are."""

from __future__ import annotations

import json

from dashboards.__main__ import FOLDER
from tests.chart.rendering import RELEASE, render


def test_a_configmap_for_each_dashboard_holds_its_file() -> None:
    rendered = render({"dashboards": {"enabled": True, "namespace": "monitoring"}})
    files = sorted(FOLDER.glob("*.json"))
    assert len(files) == 6
    for path in files:
        config = rendered.one("ConfigMap", f"{RELEASE}-weir-dashboard-{path.stem}")
        assert config["data"] == {path.name: path.read_text()}
        assert json.loads(config["data"][path.name])["uid"] == f"weir-{path.stem}"
        assert config["metadata"]["namespace"] == "monitoring"
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert config["metadata"]["annotations"]["grafana_folder"] == "Weir"


def test_no_dashboard_is_installed_unless_it_is_asked_for() -> None:
    names = [o["metadata"]["name"] for o in render().all("ConfigMap")]
    assert not [name for name in names if "dashboard" in name]
