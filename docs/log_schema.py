"""The schema of the log: docs/logs.schema.json and the tables of docs/logs.md, for `docs.generate`."""

from __future__ import annotations

import ast
import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from service.canonical import RequestLine
from service.logging import ExceptionInfo

ROOT: Final = Path(__file__).resolve().parent.parent
LEVELS: Final = ("debug", "info", "warning", "error", "critical")


def _meta(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class EventLine(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Any other line. It may have fields of its own, which are named in docs/logs.md."""

    timestamp: Annotated[datetime, msgspec.Meta(description="When it was logged, UTC.", tz=True)]
    level: Annotated[Literal["debug", "info", "warning", "error", "critical"], _meta("How bad it is.")]
    event: Annotated[
        str, _meta("A name in small letters for Weir's own lines; words for those of libraries.")
    ]
    request_id: Annotated[str | None, _meta("The request in which it was logged.")] = None
    trace_id: Annotated[str | None, _meta("The trace of that request.")] = None
    span_id: Annotated[str | None, _meta("Its span in that trace.")] = None
    logger: Annotated[str | None, _meta("The library that logged it; not there: Weir.")] = None
    exception: Annotated[
        ExceptionInfo | None,
        _meta("The error: `type`, `message`, `frames` (the innermost last), `chain` (what it came from)."),
    ] = None
    stack: Annotated[str | None, _meta("Where it was logged, if a library wants that told.")] = None


def schema() -> dict[str, Any]:
    """A JSON Schema of every line."""
    (request, event), parts = msgspec.json.schema_components(
        (RequestLine, EventLine), ref_template="#/$defs/{name}"
    )
    parts["EventLine"]["properties"]["event"]["not"] = {"const": "request"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of Weir's log",
        "type": "object",
        "required": ["timestamp", "level", "event"],
        "if": {"properties": {"event": {"const": "request"}}},
        "then": request,
        "else": event,
        "$defs": {name: _without_null(part) for name, part in sorted(parts.items())},
    }


def text() -> str:
    return json.dumps(schema(), indent=2) + "\n"


def request_fields() -> str:
    return _table("RequestLine", otel=True)


def event_fields() -> str:
    return _table("EventLine", otel=False)


def events() -> str:
    """Weir's own events, found in the code."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in sorted((ROOT / "service").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            level, logger = node.func.attr, node.func.value
            named = isinstance(logger, ast.Name) and logger.id == "log"
            if not named or level not in (*LEVELS, "exception") or not node.args:
                continue
            event = node.args[0]
            if not isinstance(event, ast.Constant):
                raise TypeError(f"{path}:{node.lineno}: the event's name is not a plain word")
            levels, fields = found.setdefault(str(event.value), (set(), set()))
            levels.add("error" if level == "exception" else level)
            fields |= {k.arg for k in node.keywords if k.arg is not None}
            if level == "exception" or "exc_info" in fields:
                fields.discard("exc_info")
                fields.add("exception")
    rows = ["| event | level | fields |", "|---|---|---|"]
    for name, (levels, fields) in sorted(found.items()):
        told = ", ".join(f"`{field}`" for field in sorted(fields)) or "-"
        rows.append(f"| `{name}` | {', '.join(sorted(levels, key=LEVELS.index))} | {told} |")
    return "\n".join(rows)


def _table(part: str, *, otel: bool) -> str:
    made = schema()["$defs"]
    required = made[part]["required"]
    rows = ["| field | type | in OpenTelemetry | what it is |", "|---|---|---|---|"]
    if not otel:
        rows = ["| field | type | what it is |", "|---|---|---|"]
    for name, field in made[part]["properties"].items():
        kind = _kind(field, made)
        there = "" if name in required else ", or not there"
        known = f" {_code(field.get('x-otel'))} |" if otel else ""
        rows.append(f"| `{name}` | {kind}{there} |{known} {field['description']} |")
    return "\n".join(rows)


def _kind(field: dict[str, Any], parts: dict[str, Any]) -> str:
    if "$ref" in field:
        field = parts[field["$ref"].rpartition("/")[2]]
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in field["enum"])
    return "time" if field.get("format") == "date-time" else str(field["type"])


def _code(name: str | None) -> str:
    return f"`{name}`" if name else "-"


def _without_null(part: dict[str, Any]) -> dict[str, Any]:
    """What is None in the code is not there in the line."""
    for field in part.get("properties", {}).values():
        if field.get("default", ...) is None:
            del field["default"]
        kinds = [kind for kind in field.pop("anyOf", ()) if kind != {"type": "null"}]
        if kinds:
            field.update(*kinds)
        if None in field.get("enum", ()):
            field["enum"] = [value for value in field["enum"] if value is not None]
    return part
