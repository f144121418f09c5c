"""Lines of the log against docs/logs.schema.json."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

from jsonschema import Draft202012Validator, FormatChecker

from tests.running import ROOT

_formats: Final = FormatChecker(formats=())


@_formats.checks("date-time", raises=ValueError)
def _is_a_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


LINES: Final = Draft202012Validator(
    json.loads((ROOT / "docs/logs.schema.json").read_text()), format_checker=_formats
)


def line_of(text: str | bytes) -> dict[str, Any]:
    """The line, which is one of the schema."""
    line: dict[str, Any] = json.loads(text)
    LINES.validate(line)
    return line
