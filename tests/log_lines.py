"""Lines of the log against docs/logs.schema.json, and the table of events in docs/logs.md."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any, Final

from jsonschema import Draft202012Validator, FormatChecker

from tests.running import ROOT

_formats: Final = FormatChecker(formats=())


@_formats.checks("date-time", raises=ValueError)
def _is_a_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


SCHEMA: Final[dict[str, Any]] = json.loads((ROOT / "docs/logs.schema.json").read_text())
LINES: Final = Draft202012Validator(SCHEMA, format_checker=_formats)


def _events() -> dict[str, set[str]]:
    """Weir's own events, each with the fields that the documentation names."""
    told = (ROOT / "docs/logs.md").read_text()
    table = told.partition("<!-- log_events -->")[2].partition("<!-- end -->")[0]
    rows = (row.split("|")[1:4] for row in table.splitlines() if row.startswith("| `"))
    return {event.strip(" `"): set(re.findall(r"`(\w+)`", fields)) for event, _, fields in rows}


EVENTS: Final = _events()
_COMMON: Final = set(SCHEMA["$defs"]["EventLine"]["properties"])


def line_of(text: str | bytes) -> dict[str, Any]:
    """The line, which is one of the schema, and if it is an event of Weir's own, one that is documented."""
    line: dict[str, Any] = json.loads(text)
    LINES.validate(line)
    if "logger" not in line and line["event"] != "request":
        assert set(line) - _COMMON <= EVENTS[line["event"]], line
    return line
