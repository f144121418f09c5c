"""GET /api/v1/usage: the sums of the ledger, added up as a caller asks, as JSON or CSV."""

from __future__ import annotations

import asyncio
import csv
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from service.api import schemas
from service.api.caller import CallerWatch
from service.api.context import context_of
from service.deadlines import Sweep
from service.domain import Principal
from service.errors import PermissionDenied, ValidationFailed
from service.ports import UsageBook
from service.usage import DAY, DAYS_KEPT, DIMENSIONS, HOUR, HOURS_KEPT, SUMS, Table, Total, dollars

MOST_ROWS: Final = 10_000
MOST_READ: Final = 500_000
"""Sums of one hour or day, key and model that a report may be made of."""
AT_ONCE: Final = 2
"""Reports that a process makes at the same time: the others wait, and requests to models do not."""
STEPS: Final = {"hour": 48 * HOUR, "day": 16 * DAY}
"""How much of a time is read in one call of the book: what is in memory at once is bounded by it."""
TURN: Final = 500
"""Rows that are worked on until others have their turn."""
USUAL_DAYS: Final = 30
COLUMNS: Final = (
    *("requests", "errors", "input_tokens", "output_tokens", "cached_input_tokens", "reasoning_tokens"),
    *("total_tokens", "cost_usd", "unpriced_requests", "cache_hits"),
)
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""A cell that begins so is run as a formula by programs that open a CSV."""
_ADVICE: Final = "ask for a shorter time, for one key, model or tenant, or group by less"


class Period(msgspec.Struct, frozen=True):
    """From when on and until when, seconds since 1970, and of which sums it is made."""

    since: int
    until: int
    unit: Literal["hour", "day"]


def make_router(book: UsageBook, sweep: Sweep, *, clock: Callable[[], float] = time.time) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["usage"])
    places = asyncio.Semaphore(AT_ONCE)

    @router.get(
        "/usage",
        summary="What was used: requests, tokens and dollars",
        response_model=schemas.UsageReport,
        responses={
            200: {
                "description": "As JSON, or as CSV: a line of names and one for each row, no totals.",
                "content": {
                    "text/csv": {
                        "schema": {"type": "string"},
                        "example": ",".join(("day", "model", *COLUMNS))
                        + "\r\n2026-11-01,gpt-4o-mini,2,0,30,12,0,0,42,0.0000117,0,0\r\n",
                    }
                },
            }
        },
    )
    async def usage(request: Request, query: Annotated[schemas.UsageQuery, Query()]) -> Response:
        context = context_of(request.scope)
        by = _dimensions(query.group_by)
        period = _period(query, by, clock())
        with CallerWatch(request.receive, sweep):
            tenants = await _tenants(book, context.principal, query.tenant)
            async with places:
                table = await _added(book, tenants, period, by, query)
        as_csv = query.format == "csv" or (
            query.format is None and "text/csv" in (context.header(b"accept") or "")
        )
        if as_csv:
            name = f"usage_{_day(period.since)}_{_day(period.until)}.csv"
            return StreamingResponse(
                _in_turns(_csv(by, table)),
                media_type="text/csv; charset=utf-8",
                headers={"Content-Disposition": f'attachment; filename="{name}"', "Vary": "Accept"},
            )
        return StreamingResponse(
            _in_turns(_json(by, table, period)), media_type="application/json", headers={"Vary": "Accept"}
        )

    return router


# -- what is asked for ---------------------------------------------------------------------------


def _dimensions(group_by: str) -> tuple[str, ...]:
    by = tuple(name.strip() for name in group_by.split(",")) if group_by.strip() else ()
    for name in by:
        if name not in DIMENSIONS:
            raise ValidationFailed(
                f"group_by: {name!r} is none of {', '.join(DIMENSIONS)}.", param="group_by"
            )
    if len(set(by)) < len(by):
        raise ValidationFailed("group_by: it names something twice.", param="group_by")
    return by


def _period(query: schemas.UsageQuery, by: Sequence[str], now: float) -> Period:
    """What the caller asks for, within what is kept."""
    tomorrow = int(now // DAY + 1) * DAY
    until = tomorrow if query.until is None else _time("to", query.until)
    since = until - USUAL_DAYS * DAY if query.since is None else _time("from", query.since)
    if since >= until:
        raise ValidationFailed("from: it must be before `to`.", param="from")
    parts = [name for name, at in (("from", since), ("to", until)) if at % DAY]
    unit = query.unit or ("hour" if "hour" in by or parts else "day")
    if unit == "day" and "hour" in by:
        raise ValidationFailed("group_by: hours need `unit=hour`.", param="group_by")
    if unit == "day" and parts:
        raise ValidationFailed(f"{parts[0]}: with `unit=day` it must be a whole day.", param=parts[0])
    step, kept = (HOUR, HOURS_KEPT) if unit == "hour" else (DAY, DAYS_KEPT)
    most = kept * step
    told = f"sums by {unit} are kept for {most // DAY} days"
    if until - since > most:
        raise ValidationFailed(f"from: it is more than {most // DAY} days before `to`; {told}.", param="from")
    if since < int(now // step) * step - most:
        raise ValidationFailed(f"from: it is too long ago; {told}.", param="from")
    return Period(since, until, unit)


def _time(param: str, text: str) -> int:
    """A date or an RFC 3339 time as seconds since 1970; without an offset it is UTC."""
    try:
        # A plus sign in an address is a space, if nobody has quoted it.
        at = datetime.fromisoformat(text.strip().replace(" ", "+"))
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        seconds = at.timestamp()
        datetime.fromtimestamp(seconds + DAY, tz=UTC)  # it will be shown in UTC
    except (ValueError, OverflowError, OSError):
        raise ValidationFailed(
            f"{param}: it must be a date like 2026-11-01 or a time like 2026-11-01T14:00:00Z.", param=param
        ) from None
    if seconds % HOUR:
        raise ValidationFailed(f"{param}: it must be a full hour (UTC).", param=param)
    return int(seconds)


async def _tenants(book: UsageBook, principal: Principal, asked: str | None) -> Sequence[str]:
    """Whose usage the principal gets. Raises PermissionDenied."""
    if principal.admin:
        return await book.tenants() if asked is None else [asked]
    if asked not in (None, principal.tenant):
        raise PermissionDenied("Another tenant's usage is for keys with `admin: true`.", param="tenant")
    return [principal.tenant]


# -- adding up -----------------------------------------------------------------------------------


async def _added(
    book: UsageBook, tenants: Sequence[str], period: Period, by: Sequence[str], query: schemas.UsageQuery
) -> Table:
    """All rows of all tenants, some at a time."""
    table, read = Table(by), 0
    for tenant in tenants:
        for since in range(period.since, period.until, STEPS[period.unit]):
            until = min(since + STEPS[period.unit], period.until)
            for row in await book.rows(tenant, since, until, period.unit):
                read += 1
                if query.key in (None, row.key) and query.model in (None, row.model):
                    table.add(row)
                if read % TURN == 0:
                    await asyncio.sleep(0)
            if len(table) > MOST_ROWS:
                raise ValidationFailed(f"This makes more than {MOST_ROWS} rows: {_ADVICE}.", param="group_by")
            if read > MOST_READ:
                raise ValidationFailed(
                    f"This is made of more than {MOST_READ} sums: {_ADVICE}.", param="from"
                )
    return table


def _numbers(total: Total) -> dict[str, str]:
    """Sums by the names of their columns, as they are written in both formats."""
    sums = dict(zip(SUMS, total, strict=True))
    sums["total_tokens"] = sums["input_tokens"] + sums["output_tokens"]
    sums["unpriced_requests"] = sums["unpriced"]
    cost = dollars(sums["cost_nano_usd"])
    return {name: cost if name == "cost_usd" else str(sums[name]) for name in COLUMNS}


# -- what is written -----------------------------------------------------------------------------


async def _in_turns(pieces: Iterator[str]) -> AsyncIterator[str]:
    """The pieces, so many together; others have their turn in between."""
    waiting: list[str] = []
    for piece in pieces:
        waiting.append(piece)
        if len(waiting) == TURN:
            yield "".join(waiting)
            waiting = []
            await asyncio.sleep(0)
    yield "".join(waiting)


def _json(by: Sequence[str], table: Table, period: Period) -> Iterator[str]:
    """As text: so a sum of any size is a number with all of its digits."""
    about = {"from": _rfc3339(period.since), "to": _rfc3339(period.until), "unit": period.unit}
    yield f'{_text(about)[:-1]},"group_by":{_text(by)},"rows":['
    for place, (names, total) in enumerate(table.groups()):
        fields = [f"{_text(name)}:{_text(value)}" for name, value in zip(by, names, strict=True)]
        fields += [f'"{name}":{number}' for name, number in _numbers(total).items()]
        yield f"{',' if place else ''}{{{','.join(fields)}}}"
    totals = ",".join(f'"{name}":{number}' for name, number in _numbers(table.total).items())
    yield f'],"totals":{{{totals}}}}}'


def _csv(by: Sequence[str], table: Table) -> Iterator[str]:
    """RFC 4180: lines end with CR LF, and what holds a comma, a quote or a line's end is quoted."""
    line = io.StringIO(newline="")
    writer = csv.writer(line, lineterminator="\r\n")
    writer.writerow((*by, *COLUMNS))
    yield line.getvalue()
    for names, total in table.groups():
        line.seek(0)
        line.truncate()
        writer.writerow((*map(_cell, names), *_numbers(total).values()))
        yield line.getvalue()


def _cell(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _rfc3339(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%dT%H:%M:%SZ}"


def _day(seconds: int) -> str:
    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds):%Y-%m-%d}"
