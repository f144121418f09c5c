"""The chart installs the dashboards as they are."""

from __future__ import annotations

import base64
import gzip
import json

from dashboards.__main__ import FOLDER
from tests.chart.rendering import CHART, RELEASE, render


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


def test_a_release_with_them_fits_into_its_secret() -> None:
    """Helm keeps the chart and what it made of it there, packed: 1 MiB at most, of which we take half."""
    everything = {"dashboards": {"enabled": True}, "metrics": {"prometheusRule": {"enabled": True}}}
    release = {
        "manifest": render(everything).text,
        "files": [
            base64.b64encode(path.read_bytes()).decode() for path in CHART.rglob("*") if path.is_file()
        ],
    }
    packed = base64.b64encode(gzip.compress(json.dumps(release).encode()))
    assert FOLDER.is_relative_to(CHART)
    assert len(packed) < 512 * 1024
