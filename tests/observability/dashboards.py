"""The dashboards as they are committed: their panels, queries and variables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.programs import ROOT

FOLDER: Final = ROOT / "helm" / "weir" / "files" / "dashboards"
_LABEL: Final = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_VARIABLE: Final = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)|\[\[(\w+)(?::\w+)?\]\]")


class Query(NamedTuple):
    """One query of a panel."""

    dashboard: str
    panel: str
    kind: str
    ref: str
    expression: str
    instant: bool
    legend: str
    columns: frozenset[str] = frozenset()
    """Labels that are columns of its table."""

    @property
    def named(self) -> frozenset[str]:
        """Labels that are shown: in its legend or text, or as columns."""
        return frozenset(_LABEL.findall(self.legend)) | self.columns

    @property
    def name(self) -> str:
        return f"{self.dashboard}/{self.panel} ({self.kind})/{self.ref}"


class Dashboard(NamedTuple):
    """One JSON file."""

    name: str
    document: dict[str, Any]

    @property
    def panels(self) -> list[dict[str, Any]]:
        """All but the rows, those of folded rows too."""
        return list(_panels(self.document.get("panels", [])))

    @property
    def queries(self) -> list[Query]:
        """Those that go to Prometheus: of panels and of annotations."""
        found = [
            Query(
                self.name,
                panel.get("title", ""),
                panel["type"],
                target.get("refId", ""),
                target["expr"],
                bool(target.get("instant")),
                target.get("legendFormat", ""),
                _columns(panel),
            )
            for panel in self.panels
            for target in panel.get("targets", [])
            if target.get("expr") and _is_prometheus(target, panel)
        ]
        for note in self.document.get("annotations", {}).get("list", []):
            expression = note.get("expr") or note.get("target", {}).get("expr")
            if expression:
                text = f"{note.get('titleFormat', '')} {note.get('textFormat', '')}"
                found.append(Query(self.name, note["name"], "annotation", "", expression, False, text))
        return found

    @property
    def log_queries(self) -> list[Query]:
        """Those that go to Loki."""
        return [
            Query(
                self.name, panel.get("title", ""), "logs", target.get("refId", ""), target["expr"], False, ""
            )
            for panel in self.panels
            for target in panel.get("targets", [])
            if target.get("expr") and not _is_prometheus(target, panel)
        ]

    @property
    def variable_queries(self) -> dict[str, str]:
        """Of each variable that Prometheus fills, its query, such as label_values(metric, label)."""
        return {
            v["name"]: v["query"]["query"] if isinstance(v["query"], dict) else v["query"]
            for v in self.document.get("templating", {}).get("list", [])
            if v["type"] == "query" and (v.get("datasource") or {}).get("type", "prometheus") == "prometheus"
        }


def dashboards(folder: Path = FOLDER) -> list[Dashboard]:
    return [Dashboard(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with its variables filled in. Raises KeyError for one without a value."""
    return _VARIABLE.sub(lambda match: values[match[1] or match[2] or match[3]], text)


def usual(*, range_seconds: float, interval_seconds: int = 5, rate_seconds: int = 20) -> dict[str, str]:
    """Grafana's own variables, and `All` for those of the dashboards: of jobs, those that there are."""
    everything = dict.fromkeys(("cluster", "namespace", "provider", "model", "tenant"), ".*")
    return everything | {
        "job": "weir",
        "__interval": f"{interval_seconds}s",
        "__interval_ms": str(interval_seconds * 1000),
        "__rate_interval": f"{rate_seconds}s",
        "__range": f"{range_seconds:.0f}s",
        "__range_s": f"{range_seconds:.0f}",
        "__range_ms": f"{range_seconds * 1000:.0f}",
    }


def _panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        if panel.get("type") == "row":
            yield from _panels(panel.get("panels") or [])
        else:
            yield panel


def _columns(panel: dict[str, Any]) -> frozenset[str]:
    renamed = (t.get("options", {}).get("renameByName", {}) for t in panel.get("transformations", []))
    return frozenset(name for names in renamed for name in names if not name.startswith(("Value", "Time")))


def _is_prometheus(target: dict[str, Any], panel: dict[str, Any]) -> bool:
    source = target.get("datasource") or panel.get("datasource") or {}
    return bool(source.get("type", "prometheus") == "prometheus")
