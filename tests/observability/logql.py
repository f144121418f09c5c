"""As much of LogQL as the dashboards' log panels use, on the lines that the run's pods wrote.

A query is a selector and stages: `json`, comparisons of fields, and a `line_format`. Anything else raises
ValueError: then it is time for a real Loki.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

_STAGES: Final = re.compile(r'\s*\|\s*(?=(?:[^"]*"[^"]*")*[^"]*$)')
_FILTER: Final = re.compile(r'(\w+)\s*(=~|!~|!=|>=|<=|==|=|>|<)\s*(?:"([^"]*)"|([\d.]+))')
_FIELD: Final = re.compile(r"\{\{\s*\.(\w+)\s*\}\}")
_IF: Final = re.compile(r"\{\{if \.(\w+)\}\}((?:(?!\{\{(?:if|end)).)*)\{\{end\}\}")
_COMPARE: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
}


def matching(query: str, lines: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """The lines that a query finds, each with the text that it makes of it."""
    found = [(line, "") for line in lines]
    for stage in stages(query):
        if stage == "json":
            continue
        if stage.startswith("line_format"):
            template = stage.removeprefix("line_format").strip().strip('"')
            found = [(line, formatted(template, line)) for line, _ in found]
        else:
            found = [(line, text) for line, text in found if _holds(stage, line)]
    return found


def fields(query: str) -> set[str]:
    """Those that a query reads."""
    named: set[str] = set()
    for stage in stages(query):
        if stage.startswith("line_format"):
            named.update(_FIELD.findall(stage))
        else:
            named.update(match[1] for match in _FILTER.finditer(stage))
    return named


def stages(query: str) -> list[str]:
    """All but the selector."""
    selector, _, rest = query.partition("}")
    if not selector.lstrip().startswith("{"):
        raise ValueError(f"a query begins with a selector: {query}")
    return [stage.strip() for stage in _STAGES.split(rest) if stage.strip()]


def _holds(stage: str, line: Mapping[str, Any]) -> bool:
    parts = re.split(r"\s+(and|or)\s+", stage)
    result = _one(parts[0], line)
    for word, part in zip(parts[1::2], parts[2::2], strict=True):
        result = (result and _one(part, line)) if word == "and" else (result or _one(part, line))
    return result


def _one(text: str, line: Mapping[str, Any]) -> bool:
    match = _FILTER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a filter that is known here: {text}")
    name, operator, word, number = match.groups()
    value = line.get(name)
    if number is not None:
        compare = _COMPARE["==" if operator == "=" else operator]
        return value is not None and compare(float(value), float(number))
    shown = _shown(value)
    if operator in ("=", "!="):
        return (shown == word) is (operator == "=")
    return (re.fullmatch(word, shown) is not None) is (operator == "=~")


def formatted(template: str, line: Mapping[str, Any]) -> str:
    """What a template makes of a line: `{{.field}}`, and `{{if .field}}...{{end}}` with no `if` inside."""
    known = _IF.sub(lambda match: match[2] if _shown(line.get(match[1])) else "", template)
    text = _FIELD.sub(lambda match: _shown(line.get(match[1])), known)
    if "{{" in text:
        raise ValueError(f"not a template that is known here: {template}")
    return text


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
