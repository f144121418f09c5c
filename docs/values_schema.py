"""The parts of the chart's values schema that come from elsewhere: `config`, `settings`, names of alerts.

The rest of `helm/weir/values.schema.json` is written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from docs.alerts import alerts
from service.config import FileConfig, Settings

OF_THE_CHART: Final = frozenset(
    {
        "PORT",
        "ADMIN_PORT",
        "WORKER_COUNT",
        "MAX_REQUESTS_PER_WORKER",
        "DRAIN_TIMEOUT",
        "DRAIN_DELAY",
        "WEIR_CONFIG",
        "WEIR_KEYS_FILE",
        "REDIS_URL",
        "REPLICAS",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "OPENAI_MODEL",
        "AUTH",
    }
)
"""Settings that other values of the chart make: given twice, one of the two would be lost."""

_HTTP: Final = {"type": "string", "pattern": r"^https?://[^/?#\s]+[^\s]*$"}
_DECIMAL: Final = r"^[0-9]+(\.[0-9]+)?$"
_URLS: Final = ("BASE_URL", "OTLP_ENDPOINT", "OTLP_TRACES_ENDPOINT")


def with_parts(text: str) -> str:
    """`text`, the schema's file, with these parts made anew."""
    schema = json.loads(text)
    schema["definitions"]["config"] = config()
    schema["definitions"]["settings"] = settings()
    schema["definitions"]["alert"] = {"enum": [rule["alert"] for rule in alerts()]}
    return written(schema)


def written(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def stale(path: Path) -> bool:
    return with_parts(path.read_text()) != path.read_text()


def config() -> dict[str, Any]:
    """The YAML file, and what an upstream of each kind needs."""
    schema = FileConfig.model_json_schema(ref_template="#/definitions/config/definitions/{model}")
    schema["definitions"] = schema.pop("$defs")
    upstream = schema["definitions"]["UpstreamConfig"]
    upstream["properties"]["base_url"]["anyOf"][0] = _HTTP
    upstream["allOf"] = [
        {
            "if": {"required": ["kind"], "properties": {"kind": {"const": "simulator"}}},
            "else": {"required": ["base_url"], "properties": {"base_url": {"type": "string"}}},
        },
        {
            "if": {"required": ["kind"], "properties": {"kind": {"const": "azure"}}},
            "then": {"required": ["api_version"], "properties": {"api_version": {"type": "string"}}},
        },
    ]
    defined = schema["definitions"]
    defined["ModelConfig"]["oneOf"] = [{"required": ["upstream"]}, {"required": ["upstreams"]}]
    defined["KeySource"]["oneOf"] = [{"required": ["env"]}, {"required": ["file"]}]
    defined["LimitConfig"]["anyOf"] = [{"required": [what]} for what in ("requests", "tokens", "concurrent")]
    plain: dict[str, Any] = _plain(schema)
    return plain


def settings() -> dict[str, Any]:
    """The environment's settings by name, each with what it takes. Secrets have no place in values."""
    properties = {}
    for name, field in Settings.model_json_schema()["properties"].items():
        variable = name.upper()
        if variable not in OF_THE_CHART and not _is_secret(name):
            properties[variable] = _variable(variable, _plain(field))
    return {
        "description": "Weir's settings by name, without secrets and those that other values make.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _is_secret(name: str) -> bool:
    return "SecretStr" in str(Settings.model_fields[name].annotation)


def _variable(name: str, field: dict[str, Any]) -> dict[str, Any]:
    """As YAML writes it. Null takes back what an earlier values file said."""
    kind = dict(field)
    if "items" in kind:  # separated by commas
        del kind["items"]
        kind["type"] = "string"
    if name.endswith(_URLS):
        kind["pattern"] = _HTTP["pattern"]
    types = {kind["type"]} if isinstance(kind["type"], str) else set(kind["type"])
    if "number" in types:  # `--set` makes text of what has a decimal point
        types.add("string")
        kind["pattern"] = _DECIMAL
    kind["type"] = sorted(types | {"null"})
    if "enum" in kind:
        kind["enum"] = [*kind["enum"], None]
    return kind


def _plain(schema: Any) -> Any:
    """Without what only a form or pydantic needs, and `null` as one of two types."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "definitions"):
            kept[key] = {name: _plain(field) for name, field in value.items()}
        elif key not in ("title", "default", "format", "writeOnly"):
            kept[key] = _plain(value)
    match kept.get("anyOf"):
        case [{"type": str(kind)} as known, {"type": "null"}]:
            del kept["anyOf"]
            kept |= known | {"type": [kind, "null"]}
    return kept
