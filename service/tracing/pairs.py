"""`key=value,key=value`, as OTEL_* settings write it."""

from __future__ import annotations

from urllib.parse import unquote


def pairs(text: str) -> dict[str, str]:
    """The pairs, percent-decoded; what is none is left out."""
    parts = (part.partition("=") for part in text.split(",") if "=" in part)
    return {unquote(name.strip()): unquote(value.strip()) for name, _, value in parts}
