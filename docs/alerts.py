"""The alerts of the chart's rule files: names for the values' schema, a table for docs/alerts.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).resolve().parent.parent / "helm/weir/files/rules"


def alerts() -> list[dict[str, Any]]:
    """Each alerting rule, in the order of the files and in them."""
    return [
        rule
        for path in sorted(RULES.glob("*.yaml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]


def table() -> str:
    rows = ["| alert | severity | after | what it says |", "|---|---|---|---|"]
    for rule in alerts():
        name = rule["alert"]
        says = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"`\1`", rule["annotations"]["summary"])
        severity, after = rule["labels"]["severity"], rule.get("for", "0")
        rows.append(f"| [{name}](runbooks/{name}.md) | {severity} | {after} | {says} |")
    return "\n".join(rows)
