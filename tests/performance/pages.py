"""Puts what was measured into a page of docs/, between its marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
END: Final = "<!-- /measured -->"


def put(page: str, name: str, text: str) -> None:
    """`text` between `<!-- measured: NAME -->` and the next end mark of the page."""
    path = DOCS / page
    before, begin, rest = path.read_text().partition(f"<!-- measured: {name} -->\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"docs/{page} has no place for {name}")
    path.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
