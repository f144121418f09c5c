"""A provider's own books beside Weir's: `python -m service reconcile FILE`.

It reads what the provider exports, asks a running Weir for the same days, and says where they differ. It
knows an address and a key, and nothing of the service that answers there.
"""

from __future__ import annotations

import csv
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

SECONDS: Final = 60.0
WHATS: Final = ("requests", "input_tokens", "output_tokens", "cached_input_tokens", "cost_usd")
"""What is compared, where the file has it."""
COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "day": (
        *("date", "day", "start_time_iso", "start_time", "usage_date", "usagedate", "start_date"),
        *("bucket_start", "timestamp", "time"),
    ),
    "model": ("model", "model_name", "model_id", "snapshot_id", "line_item"),
    "requests": ("requests", "num_model_requests", "num_requests", "n_requests", "request_count"),
    "input_tokens": ("input_tokens", "prompt_tokens", "n_context_tokens_total", "context_tokens"),
    "output_tokens": (
        *("output_tokens", "completion_tokens", "n_generated_tokens_total", "generated_tokens"),
    ),
    "cached_input_tokens": (
        *("cached_input_tokens", "input_cached_tokens", "cached_tokens", "cached_prompt_tokens"),
        "n_cached_context_tokens_total",
    ),
    "cost_usd": (
        *("cost_usd", "costusd", "cost_in_usd", "costinusd", "usd", "cost", "amount", "amount_value"),
        *("cost_in_billing_currency", "costinbillingcurrency", "pretaxcost", "pre_tax_cost"),
    ),
    "currency": (
        *("currency", "amount_currency", "billing_currency", "billingcurrency", "billing_currency_code"),
        "billingcurrencycode",
    ),
}
"""The names that a column may have, in lower case and with _ for spaces; the first that is there counts."""
_SURELY_USD: Final = 5
"""So many names of the cost's column say themselves that it is in US dollars."""
_NUMBERS_OF_JSON: Final = {
    "requests": "num_model_requests",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cached_input_tokens": "input_cached_tokens",
}
_DATED: Final = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8})$")
_THOUSANDS: Final = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_HALF_A_CENT: Final = Decimal("0.005")
"""Dashboards round to cents."""


class Unreadable(Exception):
    """A file, an option or an answer that cannot be understood; the message says where and why."""


class Entry(NamedTuple):
    """What one side says of a model (empty: of all) on a day."""

    day: str
    model: str
    numbers: dict[str, Decimal]


class Export(NamedTuple):
    """What a file holds."""

    kind: str
    entries: list[Entry]

    @property
    def whats(self) -> list[str]:
        """What it tells, in a fixed order."""
        return [what for what in WHATS if any(what in entry.numbers for entry in self.entries)]

    @property
    def has_models(self) -> bool:
        return any(entry.model for entry in self.entries)


class Target(NamedTuple):
    """Which Weir to ask, and for whom."""

    url: str
    key: str | None = None
    tenant: str | None = None


class Difference(NamedTuple):
    """One number of both sides."""

    weir: Decimal
    provider: Decimal
    within: bool

    @property
    def absolute(self) -> Decimal:
        return self.weir - self.provider

    @property
    def percent(self) -> Decimal | None:
        """Of the provider's number; None where that is 0 and Weir's is not."""
        if self.provider:
            return self.absolute / abs(self.provider) * 100
        return None if self.weir else Decimal(0)


class Compared(NamedTuple):
    """A day and model, as far as they are told apart, with all numbers of both sides."""

    place: tuple[str, ...]
    numbers: dict[str, Difference]
    only: str | None
    """`Weir` or `provider`, where the other has nothing of it at all."""

    @property
    def within(self) -> bool:
        return all(difference.within for difference in self.numbers.values())


class Report(NamedTuple):
    """All that was found; `within` says whether all of it is."""

    by: tuple[str, ...]
    compared: list[Compared]
    total: Compared
    joined: list[str]

    @property
    def within(self) -> bool:
        return all(one.within for one in self.compared)


# -- reading a file ------------------------------------------------------------------------------


def read(path: Path) -> Export:
    """Raises Unreadable, with the line and the column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Unreadable(f"{path}: {why}") from None
    export = _read_json(text, path) if text.lstrip()[:1] in ("{", "[") else _read_csv(text, path)
    if not export.entries:
        raise Unreadable(f"{path}: it holds no usage")
    return export


def _read_json(text: str, path: Path) -> Export:
    try:
        pages = json.loads(text, parse_float=Decimal)
    except RecursionError:
        raise Unreadable(f"{path}: it is nested too deeply") from None
    except ValueError as error:
        where = (
            f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        )
        raise Unreadable(f"{path}: {where}: it is not JSON") from None
    pages = pages if isinstance(pages, list) else [pages]
    if pages and isinstance(pages[-1], dict) and pages[-1].get("has_more"):
        raise Unreadable(f"{path}: it is not whole: its last page says `has_more`; add the pages that follow")
    entries = []
    for place, bucket in _buckets(pages, path):
        try:
            day = _day_of_number(int(bucket["start_time"]))
            entries += [_entry_of_json(day, result) for result in bucket["results"]]
        except (KeyError, TypeError, ValueError, AttributeError, InvalidOperation, OverflowError) as error:
            raise Unreadable(f"{path}: {place}: {type(error).__name__}: {error}") from None
    return Export("OpenAI's usage or costs", entries)


def _buckets(pages: Sequence[Any], path: Path) -> Iterator[tuple[str, Any]]:
    for number, page in enumerate(pages):
        if isinstance(page, dict) and "results" in page:
            yield f"bucket {number}", page
        elif isinstance(page, dict) and isinstance(page.get("data"), list):
            for at, bucket in enumerate(page["data"]):
                yield f"page {number}, bucket {at}", bucket
        else:
            raise Unreadable(f"{path}: page {number} has neither `data` nor `results`")


def _entry_of_json(day: str, result: dict[str, Any]) -> Entry:
    amount = result.get("amount")
    if amount is not None:
        if str(amount.get("currency", "usd")).lower() != "usd":
            raise ValueError(f"a cost in {amount['currency']}, not in US dollars")
        # "gpt-4o-2024-08-06, input"
        model = str(result.get("line_item") or "").partition(",")[0].strip()
        return Entry(day, model, {"cost_usd": _finite(amount["value"])})
    numbers = {
        what: _finite(result[name]) for what, name in _NUMBERS_OF_JSON.items() if result.get(name) is not None
    }
    if not numbers:
        raise ValueError("a result with neither tokens nor an amount")
    return Entry(day, str(result.get("model") or ""), numbers)


def _read_csv(text: str, path: Path) -> Export:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in next(lines, [])]
        places = _places(header, path)
        entries = [
            _entry_of_csv(cells, places, header, f"{path}: line {lines.line_num}")
            for cells in lines
            if any(cell.strip() for cell in cells)
        ]
    except csv.Error as error:
        raise Unreadable(f"{path}: line {lines.line_num}: {error}") from None
    return Export("CSV", entries)


def _places(header: Sequence[str], path: Path) -> dict[str, int]:
    """In which column what is found."""
    places = {}
    for what, names in COLUMNS.items():
        known = [name for name in names if name in header]
        if known:
            places[what] = header.index(known[0])
    if "day" not in places:
        raise Unreadable(f"{path}: line 1: no column is named {', '.join(COLUMNS['day'])}")
    if not set(places) & set(WHATS):
        raise Unreadable(f"{path}: line 1: no column of requests, tokens or cost: {', '.join(header)[:200]}")
    return places


def _entry_of_csv(cells: Sequence[str], places: Mapping[str, int], header: Sequence[str], line: str) -> Entry:
    def cell(what: str) -> str:
        place = places[what]
        if place >= len(cells):
            raise Unreadable(f"{line}: it has no column {header[place]!r}: it ends after {len(cells)}")
        return cells[place].strip()

    day = _day(cell("day"))
    if day is None:
        raise Unreadable(f"{line}, column {header[places['day']]!r}: {cell('day')!r} is no date")
    numbers = {}
    for what in WHATS:
        if what in places:
            number = _number(cell(what))
            if number is None:
                raise Unreadable(f"{line}, column {header[places[what]]!r}: {cell(what)!r} is no number")
            numbers[what] = number
    usd = "cost_usd" in places and header[places["cost_usd"]] in COLUMNS["cost_usd"][:_SURELY_USD]
    if "cost_usd" in places and "currency" in places and not usd and cell("currency").upper() != "USD":
        where = f"{line}, column {header[places['currency']]!r}"
        raise Unreadable(f"{where}: a cost in {cell('currency')!r}, not in USD")
    model = cell("model") if "model" in places else ""
    if "model" in places and header[places["model"]] == "line_item":
        model = model.partition(",")[0].strip()
    return Entry(day, model, numbers)


def _day(text: str) -> str | None:
    """The day (UTC) of a date or time in one of the forms that exports have."""
    try:
        if re.fullmatch(r"\d{9,11}(\.\d+)?", text):
            return _day_of_number(int(float(text)))
        if found := re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})(\s.*)?", text):  # Azure: the month first
            month, day, year = (int(found[n]) for n in (1, 2, 3))
            return f"{datetime(year, month, day, tzinfo=UTC):%Y-%m-%d}"
        at = datetime.fromisoformat(text)
        return f"{at.astimezone(UTC) if at.tzinfo is not None else at:%Y-%m-%d}"
    except (ValueError, OverflowError):
        return None


def _day_of_number(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%d}"


def _number(text: str) -> Decimal | None:
    """Empty is 0; a dollar sign and commas between thousands are left out."""
    text = text.removeprefix("$").strip()
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    try:
        return _finite(text or "0")
    except (InvalidOperation, ValueError):
        return None


def _finite(value: Any) -> Decimal:
    number = Decimal(str(value))
    if not number.is_finite():
        raise ValueError(f"{value} is no number")
    return number


# -- asking Weir ---------------------------------------------------------------------------------


def ask(target: Target, since: str, until: str) -> list[Entry]:
    """Weir's sums of these days by day and model. Raises Unreadable."""
    query = {"from": since, "to": until, "group_by": "day,model", "unit": "day", "format": "json"}
    if target.tenant is not None:
        query["tenant"] = target.tenant
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    request = urllib.request.Request(  # noqa: S310  # the address is the caller's
        f"{target.url}/api/v1/usage?{urlencode(query)}", headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            rows = json.load(answer, parse_float=Decimal)["rows"]
        # Requests without a model reached none, so no provider knows them.
        return [_entry_of_weir(row) for row in rows if row["model"]]
    except urllib.error.HTTPError as error:
        raise Unreadable(f"{target.url}: {error.code}: {_told(error)}") from None
    except OSError as error:
        raise Unreadable(f"{target.url}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Unreadable(f"{target.url}: an answer of another form: {type(error).__name__} {error}") from None


def _entry_of_weir(row: dict[str, Any]) -> Entry:
    numbers = {what: Decimal(row[what]) for what in WHATS}
    # What a provider counts are the calls that it answered.
    numbers["requests"] -= Decimal(row["errors"] + row["cache_hits"])
    return Entry(row["day"], row["model"], numbers)


def _told(error: urllib.error.HTTPError) -> str:
    body = error.read().decode(errors="replace")
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]


# -- comparing -----------------------------------------------------------------------------------


def compare(
    export: Export,
    weir: Sequence[Entry],
    *,
    by: tuple[str, ...] = ("day", "model"),
    tolerance: Decimal = Decimal("0.005"),
    names: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Both sides, line by line; `names` are Weir's for each of the provider's models, the first for all."""
    if not export.has_models:
        by = tuple(name for name in by if name != "model") or ("day",)
    join = _Join({e.model for e in export.entries}, {e.model for e in weir}, names or {})
    theirs = _added(export.entries, by, join.theirs)
    ours = _added(weir, by, join.ours)
    whats = export.whats
    compared = []
    for place in sorted({*theirs, *ours}):
        only = None if place in theirs and place in ours else "provider" if place in theirs else "Weir"
        one = _compared(place, ours.get(place, {}), theirs.get(place, {}), whats, tolerance, only)
        if only is None or any(d.weir or d.provider for d in one.numbers.values()):
            compared.append(one)
    all_ours, all_theirs = (_added(side, (), str).get((), {}) for side in (weir, export.entries))
    total = _compared((), all_ours, all_theirs, whats, tolerance, None)
    return Report(by, compared, total, join.told if "model" in by else [])


class _Join:
    """One name for what both sides call differently: as it is, as mapped, or without its date."""

    def __init__(self, theirs: set[str], ours: set[str], names: Mapping[str, Sequence[str]]) -> None:
        self._theirs: dict[str, str] = {}
        self._ours: dict[str, str] = {}
        self.told: list[str] = []
        for model in sorted(theirs):
            plain = _DATED.sub("", model)
            if model in names and (model not in ours or model in names[model]):
                first = self._theirs[model] = names[model][0]
                self._ours |= dict.fromkeys(names[model], first)
                self.told.append(f"{model} -> {' + '.join(names[model])} (mapped)")
            elif plain != model and plain in ours and plain not in theirs:
                # Callers may have named it in both ways.
                self._theirs[model] = self._ours[model] = plain
                both = f"{plain} + {model}" if model in ours else plain
                self.told.append(f"{model} -> {both} (its date left out)")

    def theirs(self, model: str) -> str:
        return self._theirs.get(model, model)

    def ours(self, model: str) -> str:
        return self._ours.get(model, model)


def _added(
    entries: Iterable[Entry], by: Sequence[str], named: Any
) -> dict[tuple[str, ...], dict[str, Decimal]]:
    found: dict[tuple[str, ...], dict[str, Decimal]] = {}
    for entry in entries:
        place = tuple(entry.day if name == "day" else named(entry.model) for name in by)
        sums = found.setdefault(place, {})
        for what, number in entry.numbers.items():
            sums[what] = sums.get(what, Decimal(0)) + number
    return found


def _compared(
    place: tuple[str, ...],
    ours: Mapping[str, Decimal],
    theirs: Mapping[str, Decimal],
    whats: Sequence[str],
    tolerance: Decimal,
    only: str | None,
) -> Compared:
    numbers = {}
    for what in whats:
        weir, provider = ours.get(what, Decimal(0)), theirs.get(what, Decimal(0))
        allowed = abs(provider) * tolerance
        if what == "cost_usd" and only is None:
            allowed = max(allowed, _HALF_A_CENT)
        numbers[what] = Difference(weir, provider, abs(weir - provider) <= allowed)
    return Compared(place, numbers, only)


# -- telling -------------------------------------------------------------------------------------


def tell(report: Report, tolerance: Decimal) -> Iterator[str]:
    """Lines for people, none wider than 100 letters but for long names."""
    for joined in report.joined:
        yield f"joined: {joined}"
    yield f"{'':20}{'Weir':>22}{'provider':>22}{'difference':>20}{'%':>12}"
    for one in report.compared:
        only = f"  (only {'Weir' if one.only == 'Weir' else 'the provider'} has it)" if one.only else ""
        yield "  ".join(name or "(no model)" for name in one.place) + only
        yield from _rows(one)
    yield "all"
    yield from _rows(report.total)
    beyond = [one for one in report.compared if not one.within]
    ours, theirs = (sum(one.only == side for one in report.compared) for side in ("Weir", "provider"))
    allowed = _figure(tolerance * 100)
    yield (
        f"{len(report.compared)} compared, {len(beyond)} differ by more than {allowed} % (!); "
        f"only Weir has {ours}, only the provider {theirs}"
    )


def _rows(one: Compared) -> Iterator[str]:
    for what, difference in one.numbers.items():
        percent = difference.percent
        yield (
            f"  {what:18}{_figure(difference.weir):>22}{_figure(difference.provider):>22}"
            f"{_figure(difference.absolute, '+'):>20}{'new' if percent is None else f'{percent:+.2f}':>12}"
            f"{'' if difference.within else ' !'}"
        )


def _figure(number: Decimal, sign: str = "") -> str:
    """Whole numbers as they are, others with at most 9 decimals."""
    text = format(round(number, 9), f"{sign if number else ''},f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def as_json(report: Report) -> dict[str, Any]:
    def numbers(one: Compared) -> dict[str, Any]:
        return {
            what: {
                "weir": float(d.weir),
                "provider": float(d.provider),
                "difference": float(d.absolute),
                "percent": None if d.percent is None else round(float(d.percent), 4),
                "within": d.within,
            }
            for what, d in one.numbers.items()
        }

    return {
        "within": report.within,
        "joined": report.joined,
        "compared": [
            {
                **dict(zip(report.by, one.place, strict=True)),
                "only": one.only.lower() if one.only else None,
                "within": one.within,
                "numbers": numbers(one),
            }
            for one in report.compared
        ],
        "total": numbers(report.total),
    }


def run(
    path: Path,
    target: Target,
    *,
    since: str | None = None,
    until: str | None = None,
    by: tuple[str, ...] = ("day", "model"),
    tolerance: Decimal = Decimal("0.005"),
    names: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Export, Report]:
    """Read, ask and compare the days of the file, or those from `since` on and before `until`."""
    export = read(path)
    days = [entry.day for entry in export.entries]
    since, until = since or min(days), until or _next_day(max(days))
    export = export._replace(entries=[e for e in export.entries if since <= e.day < until])
    if not export.entries:
        raise Unreadable(
            f"{path}: it holds nothing from {since} to {until}; it has {min(days)} to {max(days)}"
        )
    return export, compare(export, ask(target, since, until), by=by, tolerance=tolerance, names=names)


def _next_day(day: str) -> str:
    try:
        return f"{datetime.fromisoformat(day) + timedelta(days=1):%Y-%m-%d}"
    except OverflowError:
        raise Unreadable(f"{day} is no day of which there is usage") from None
