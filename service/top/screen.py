"""A report as text, for a terminal of any size from 80 columns and 24 lines on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from service.domain import CALLERS_FAULTS, FAULTS
from service.top.watch import Quantiles, Report

LINES_OF_FRAME: Final = 11
"""Title, figures, two rules, headings, the last line."""
LEAST_ROWS: Final = (4, 3)
"""Of the upper and the lower tables, however small the terminal is."""
BAR: Final = 5
SLOW_LAG_SECONDS: Final = 0.1
BAD_RATIO: Final = 0.01
NEARLY_USED: Final = 0.8
NOTHING: Final = "-"


def screen(report: Report, height: int | None = None, hint: str = "") -> RenderableType:
    """`height` lines at the most, as far as that is possible; None: as many as there are.

    `hint` is the last line.
    """
    away = [_away(pod.url, pod.away) for pod in report.pods if pod.away is not None]
    shown_away = _first(away, None if height is None else max(height - 22, 1), "pods are away, too")
    upper, lower = _room(height, len(shown_away))
    parts: list[RenderableType] = [
        _title(report),
        *shown_away,
        _figures(report),
        Rule(style="dim"),
        _beside(_outcomes(report, upper), _models(report, upper)),
        Rule(style="dim"),
        _beside(_tenants(report, lower), _state(report, lower)),
    ]
    if hint:
        parts.append(Text(hint, style="dim"))
    return Group(*parts)


def _room(height: int | None, taken: int) -> tuple[int | None, int | None]:
    """Rows of the upper and the lower tables."""
    if height is None:
        return None, None
    rows = max(height - LINES_OF_FRAME - taken, sum(LEAST_ROWS))
    upper = max(rows * 3 // 5, LEAST_ROWS[0])
    return upper, max(rows - upper, LEAST_ROWS[1])


def _title(report: Report) -> RenderableType:
    away = sum(pod.away is not None for pod in report.pods)
    several = len(report.versions) > 1
    versions = ", ".join(f"{_plain(v)} ({n})" if several else _plain(v) for v, n in report.versions.items())
    pods = (
        f"{len(report.pods) - away} of {len(report.pods)} pods"
        if away
        else _number_of(len(report.pods), "pod")
    )
    title = Text.assemble(
        ("Weir ", "bold"), (versions or NOTHING, "yellow" if several else "bold"), "  ", pods
    )
    window = f"last {report.seconds:.0f} s  " if report.seconds else "measuring  "
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(title, window + f"{datetime.fromtimestamp(report.at).astimezone():%H:%M:%S}")
    return line


def _away(url: str, why: str | None) -> Text:
    return Text(f"{_plain(url)}: {_plain(why or '')}", style="red", no_wrap=True, overflow="ellipsis")


def _figures(report: Report) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(4):
        grid.add_column(ratio=1, no_wrap=True)
    places = f" of {report.places:.0f}" if report.places else ""
    errors = report.error_ratio
    cells = (
        ("requests/s", rate(report.requests_per_second), ""),
        (
            "errors",
            share(errors),
            "red" if errors and errors >= BAD_RATIO else "green" if errors == 0 else "",
        ),
        ("first token p50/p95", both(report.time_to_first_token_seconds), ""),
        ("whole answer p50/p95", both(report.duration_seconds), ""),
        (
            "tokens/s in / out",
            f"{rate(report.input_tokens_per_second)} / {rate(report.output_tokens_per_second)}",
            "",
        ),
        ("cost", dollars(report.usd_per_hour), ""),
        ("cache hits", share(report.cache_hit_ratio), ""),
        (
            "running (queued)",
            f"{report.running:.0f}{places} ({report.queued:.0f})",
            "yellow" if report.queued else "",
        ),
    )
    for row in (cells[:4], cells[4:]):
        grid.add_row(*(Text(label, style="dim") for label, _, _ in row))
        grid.add_row(*(Text(value, style=f"bold {style}".strip()) for _, value, style in row))
    return grid


def _outcomes(report: Report, rows: int | None) -> RenderableType:
    table = _table("outcome", "per s", "share", "")
    for each in report.outcomes[:rows]:
        style = _style_of(each.outcome)
        bar = "█" * max(round(each.share * BAR), 1)
        table.add_row(
            Text(_plain(each.outcome), style=style),
            rate(each.per_second),
            share(each.share),
            Text(bar, style=style),
        )
    return table


def _models(report: Report, rows: int | None) -> RenderableType:
    table = _table("model", "req/s", "tok/s", "$/h")
    for each in report.models[:rows]:
        table.add_row(
            _name(each.model),
            rate(each.requests_per_second),
            rate(each.tokens_per_second),
            money(each.usd_per_hour),
        )
    return table


def _tenants(report: Report, rows: int | None) -> RenderableType:
    table = _table("tenant", "$/h")
    for each in report.tenants[:rows]:
        table.add_row(_name(each.tenant), money(each.usd_per_hour))
    return table


def _state(report: Report, rows: int | None) -> RenderableType:
    """What is not as it should be, then budgets and the loop."""
    lines = (
        [Text(f"degraded: {', '.join(map(_plain, report.degraded))}", style="red")] if report.degraded else []
    )
    lines += [
        Text(f"circuit {c.state}: {_plain(c.model) or NOTHING} at {_plain(c.upstream)}", style="red")
        for c in report.circuits
    ]
    if report.unpriced_per_second:
        lines.append(Text(f"unpriced: {rate(report.unpriced_per_second)} requests/s", style="yellow"))
    slow = report.loop_lag_seconds >= SLOW_LAG_SECONDS
    lines.append(Text(f"event loop lag: {seconds(report.loop_lag_seconds)}", style="red" if slow else ""))
    for budget in report.budgets:
        used = budget.used_ratio
        whose = _plain("/".join(filter(None, (budget.tenant, budget.key))))
        style = "red" if used >= 1 else "yellow" if used >= NEARLY_USED else ""
        lines.append(Text(f"budget {_plain(budget.budget)} of {whose}: {share(used)} used", style=style))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    heading = Text("state", style="dim")
    return Group(heading, *_first(lines, rows, "more"))


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, header_style="dim", pad_edge=False)
    first, *others = headings
    table.add_column(first, ratio=1, no_wrap=True, overflow="ellipsis")
    for heading in others:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


def _beside(left: RenderableType, right: RenderableType) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid


def _first(lines: Sequence[Text], most: int | None, more: str) -> list[Text]:
    if most is None or len(lines) <= most:
        return list(lines)
    kept = list(lines[: max(most - 1, 0)])
    return [*kept, Text(f"{len(lines) - len(kept)} {more}", style="dim")]


def _style_of(outcome: str) -> str:
    if outcome in FAULTS:
        return "red"
    return "yellow" if outcome in CALLERS_FAULTS else "green"


def _name(text: str) -> Text:
    return Text(_plain(text) or NOTHING)


def _plain(text: str) -> str:
    """Without what a terminal would obey: names of models come from callers."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def rate(value: float) -> str:
    """Three digits that count, and a letter for thousands."""
    for letter in ("", "k", "M", "G"):
        if value < 999.5 or letter == "G":
            break
        value /= 1000
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}{letter}"


def share(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 100:.1f} %"


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.1f} s"


def both(quantiles: Quantiles) -> str:
    return f"{seconds(quantiles.p50)} / {seconds(quantiles.p95)}"


def money(usd: float) -> str:
    return f"{usd:.{2 if usd >= 1 or usd == 0 else 4}f}"


def dollars(usd_per_hour: float) -> str:
    return f"${money(usd_per_hour)}/h"
