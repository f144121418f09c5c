"""Which numbers a request adds to the sums of its hour and day, and how sums are added up.

A sum has a name, `KEY|MODEL|WHAT`: the API key's name and the model, percent-encoded, and what is counted.
Both books, in memory and in Redis, are made of the same increments, so they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, TypeAlias
from urllib.parse import quote, unquote

from service.domain import CacheUse, Outcome, RequestRecord, UsageSource
from service.ports import UsageRow
from service.rules import NANO

HOUR: Final = 3_600
DAY: Final = 24 * HOUR
HOURS_KEPT: Final = 35 * 24
DAYS_KEPT: Final = 400
SUMS: Final = (
    "requests",
    "errors",
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "reasoning_tokens",
    "cost_nano_usd",
    "unpriced",
    "cache_hits",
)
OTHER: Final = "_other"
SUMS_MOST: Final = 20_000
"""Sums of one hour or day and tenant; above it models that have none yet are counted together as `_other`."""
_NO_ERRORS: Final = (Outcome.SUCCESS, Outcome.CLIENT_DISCONNECTED)
"""A caller who leaves is no fault of anybody's."""


def increments(record: RequestRecord) -> tuple[tuple[str, int], ...]:
    """The names of the sums to which the record adds, and the numbers; none of them is 0.

    The model has no name where no answer and no provider's count says that there is such a model:
    callers may send any name, and each would be kept for the whole day.
    """
    usage, outcome = record.usage, record.outcome
    known = (
        outcome is Outcome.SUCCESS
        or record.time_to_first_token_seconds is not None
        or (usage is not None and usage.source is UsageSource.PROVIDER)
    )
    name = _names(record.principal.name, record.request_model if known else "")
    made = [(name[0], 1)]
    if outcome not in _NO_ERRORS:
        made.append((name[1], 1))
    if usage is not None:
        if usage.input_tokens:
            made.append((name[2], usage.input_tokens))
        if usage.output_tokens:
            made.append((name[3], usage.output_tokens))
        if usage.cached_input_tokens:
            made.append((name[4], usage.cached_input_tokens))
        if usage.reasoning_tokens:
            made.append((name[5], usage.reasoning_tokens))
        usd = record.cost.usd
        if usd is None:
            if usage.input_tokens or usage.output_tokens:
                made.append((name[7], 1))
        elif nano := round(usd * NANO):
            made.append((name[6], nano))
    if record.cache is CacheUse.HIT:
        made.append((name[8], 1))
    return tuple(made)


@lru_cache(maxsize=4_096)
def _names(key: str, model: str) -> tuple[str, ...]:
    """The names of all sums of a key and a model, in the order of `SUMS`."""
    prefix = f"{quote(key, safe='')}|{quote(model, safe='')}|"
    return tuple(prefix + what for what in SUMS)


def rows_of(tenant: str, at: int, sums: Iterable[tuple[str, int]]) -> list[UsageRow]:
    """The sums of an hour or day, by their names, as rows: one for each key and model."""
    found: dict[str, dict[str, int]] = {}
    for name, number in sums:
        prefix, _, what = name.rpartition("|")
        if what in _KNOWN:  # a later version may count more
            found.setdefault(prefix, {})[what] = number
    rows = []
    for prefix, numbers in found.items():
        key, _, model = prefix.partition("|")
        rows.append(UsageRow(at=at, tenant=tenant, key=_plain(key), model=_plain(model), **numbers))
    return rows


_KNOWN: Final = frozenset(SUMS)
_plain = lru_cache(maxsize=4_096)(unquote)

# -- adding up -----------------------------------------------------------------------------------

Total: TypeAlias = list[int]
"""Numbers in the order of `SUMS`."""


def _day(row: UsageRow) -> str:
    return f"{datetime.fromtimestamp(row.at, tz=UTC):%Y-%m-%d}"


def _hour(row: UsageRow) -> str:
    return f"{datetime.fromtimestamp(row.at, tz=UTC):%Y-%m-%dT%H:00:00Z}"


DIMENSIONS: Final[dict[str, Callable[[UsageRow], str]]] = {
    "tenant": lambda row: row.tenant,
    "key": lambda row: row.key,
    "model": lambda row: row.model,
    "day": _day,
    "hour": _hour,
}
"""By what rows may be grouped, and how each names its group."""


class Table:
    """Rows added up by some dimensions, in the order in which they are named."""

    def __init__(self, by: Sequence[str]) -> None:
        self._named = [DIMENSIONS[name] for name in by]
        self._groups: dict[tuple[str, ...], Total] = {}
        self.total: Total = [0] * len(SUMS)

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, row: UsageRow) -> None:
        group = tuple(named(row) for named in self._named)
        sums = self._groups.get(group)
        if sums is None:
            sums = self._groups[group] = [0] * len(SUMS)
        for place, what in enumerate(SUMS):
            number = getattr(row, what)
            sums[place] += number
            self.total[place] += number

    def groups(self) -> list[tuple[tuple[str, ...], Total]]:
        """Each group's names and sums, sorted by the names."""
        return sorted(self._groups.items())


def dollars(nano_usd: int) -> str:
    """Billionths of a dollar as a decimal number, exact and without an exponent."""
    whole, part = divmod(abs(nano_usd), NANO)
    digits = f".{part:09d}".rstrip("0").rstrip(".")
    return f"{'-' if nano_usd < 0 else ''}{whole}{digits}"
