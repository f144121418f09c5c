"""Links from panels into Explore: to the traces and log lines of what a panel shows."""

from __future__ import annotations

import json
import re
from typing import Any, Final
from urllib.parse import quote

from dashboards.panels import Link
from dashboards.queries import logs

_ENCODED: Final = re.compile(r"%24%7B(\w+)(?:%3A(\w+))?%7D")
_PLAIN: Final = re.compile(r"\$(\w+)")
_OF_MODEL: Final = 'span.gen_ai.request.model =~ "${model:pipe}"'


def _explore(datasource: str, query: dict[str, Any]) -> str:
    """Explore with one query, over the time of the dashboard. Grafana fills in its variables."""
    uid = f"${{{datasource}}}"
    pane = {
        "datasource": uid,
        "queries": [{"refId": "A", "datasource": {"type": datasource, "uid": uid}, **query}],
        "range": {"from": "${__from}", "to": "${__to}"},
    }
    encoded = quote(json.dumps({"weir": pane}, separators=(",", ":")), safe="")
    variables = _ENCODED.sub(
        lambda found: f"${{{found[1]}:{found[2]}}}" if found[2] else f"${{{found[1]}}}", encoded
    )
    return f"/explore?schemaVersion=1&panes={variables}"


def traces(title: str, *conditions: str) -> Link:
    """Traces in Tempo; conditions are those of TraceQL."""
    query = " && ".join(('resource.service.name = "weir"', *conditions))
    return Link(title, _explore("tempo", {"queryType": "traceql", "query": f"{{ {query} }}", "limit": 50}))


def lines(title: str, *stages: str) -> Link:
    """Log lines in Loki; stages are those of LogQL after `json`."""
    query = _PLAIN.sub(r"${\1:pipe}", logs(*stages))
    return Link(title, _explore("loki", {"queryType": "range", "expr": query}))


SLOW_TRACES: Final = traces("Traces above 2.5 s", _OF_MODEL, "trace:duration > 2500ms")
FAILED_TRACES: Final = traces("Traces of failed requests", _OF_MODEL, "status = error")
FAILED_LINES: Final = lines(
    "Log lines of failed requests",
    'event="request"',
    'outcome!~"success|client_error|client_disconnected"',
)
SLOW_LINES: Final = lines("Log lines of slow requests", 'event="request"', "duration_seconds > 2.5")
