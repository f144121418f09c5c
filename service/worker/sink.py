"""The sink: copies each tenant's stream into the table, a batch and its cursor in one transaction.

It may be killed at any moment, and several may run at once: whatever was not committed is read again, a
cursor that another worker holds or has moved is left to it, and an id that is there already is not entered
twice. Tenants take turns, one batch each, so a long backlog of one does not hold up the others.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import structlog

from service.tracing import NO_TRACING, Tracing
from service.worker.metrics import WHERES, SinkMetrics
from service.worker.ports import (
    Away,
    Cursor,
    Entry,
    NotAStream,
    Reading,
    Rejected,
    RowsRefused,
    Streams,
    Tables,
    Where,
    is_after,
)
from service.worker.records import Row, Unreadable, row

FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
KEPT_BYTES: Final = 64 * 1024
"""Of what was rejected; no record is nearly as long."""
WARNED_RECORDS: Final = 20
"""Lines for rejected records in one batch; the table has them all."""

log = structlog.get_logger("weir")


class _Waiting(NamedTuple):
    records: int
    oldest_at: float


class Sink:
    """`run` copies until `stop` is set. `well`: both sides answered the last time they were asked."""

    def __init__(
        self,
        streams: Streams,
        tables: Tables,
        metrics: SinkMetrics,
        *,
        batch_records: int,
        poll_seconds: float,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._tracing = tracing
        self._streams = streams
        self._tables = tables
        self._metrics = metrics
        self._batch_records = batch_records
        self._poll_seconds = poll_seconds
        self._cursors: dict[str, Cursor] = {}
        self._cursors_known = False
        self._moved = False
        self._waiting: dict[str, _Waiting] = {}
        self._well: dict[Where, bool] = {}
        self._not_streams: set[str] = set()

    @property
    def missing(self) -> list[str]:
        """The sides that did not answer, or were not asked yet."""
        return [where for where in WHERES if not self._well.get(where)]

    async def run(self, stop: asyncio.Event) -> None:
        """Raises ConfigurationError where another try does not help."""
        pause = FIRST_PAUSE_SECONDS
        try:
            while not stop.is_set():
                self._moved = False
                try:
                    await self.copy_all(stop)
                except Away as away:
                    await self._failed(away)
                    if self._moved:
                        pause = FIRST_PAUSE_SECONDS
                    await _wait(stop, pause * random.uniform(0.75, 1.25))
                    pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                else:
                    pause = FIRST_PAUSE_SECONDS
                    await _wait(stop, self._poll_seconds)
        finally:
            await self.close()

    async def close(self) -> None:
        """Cut both connections: what waits for one fails, and what was not committed is rolled back."""
        await self._tables.close()
        await self._streams.close()

    # -- one round over all tenants --------------------------------------------------------------

    async def copy_all(self, stop: asyncio.Event) -> None:
        """All that is there now and no other worker copies. Raises Away, ConfigurationError."""
        self._cursors, self._cursors_known = await self._tables.cursors(), True
        self._tell("postgres")
        tenants = list(await self._streams.tenants())
        self._tell("redis")
        names = {self._streams.name(tenant) for tenant in tenants}
        self._waiting = {stream: w for stream, w in self._waiting.items() if stream in names}
        random.shuffle(tenants)  # two workers that start together do not go the same way
        queue = deque(tenants)
        while queue and not stop.is_set():
            tenant = queue.popleft()
            if await self._batch(tenant):
                queue.append(tenant)
            self._tell_waiting()

    async def _batch(self, tenant: str) -> bool:
        """Whether the stream has more for us."""
        stream = self._streams.name(tenant)
        before = self._cursors.get(stream)
        found = await self._read(stream, before or Cursor())
        if found is None:
            self._waiting.pop(stream, None)
            return False
        start, reading = found
        entries, rest = reading.entries[: self._batch_records], reading.entries[self._batch_records :]
        trimmed = _trimmed(start, reading)
        job = _Job(stream, tenant, before, start._replace(position=start.position + trimmed), trimmed)
        if before is None or start != before:
            if before is None and trimmed:
                log.info("ledger_begins", tenant=tenant, trimmed_before=trimmed)
            job = job._replace(lost=0)  # what was trimmed before a beginning was never ours to copy
        if entries:
            with self._tracing.work("ledger copy") as work:
                work.note(tenant=tenant, records=len(entries))
                end = await self._copy(job, entries, reading)
        elif trimmed or start != (before or start):
            end = await self._commit(job._replace(at=Cursor(reading.last_id, reading.added)), [], [])
        else:
            end = start
        if end is None:
            log.debug("ledger_of_another_worker", tenant=tenant)
            rest = ()
        self._note(stream, end or start, reading, rest)
        return bool(rest)

    async def _read(self, stream: str, cursor: Cursor) -> tuple[Cursor, Reading] | None:
        """What comes after the cursor, and the cursor: that of a beginning where the stream began anew."""
        try:
            # One more than a batch: it tells whether there is more, and since when it waits.
            reading = await self._streams.read(stream, cursor.last_id, self._batch_records + 1)
            if reading is not None and _began_anew(cursor, reading):
                log.warning("ledger_began_anew", stream=stream, was=cursor.last_id, now=reading.last_id)
                cursor = Cursor()
                reading = await self._streams.read(stream, cursor.last_id, self._batch_records + 1)
        except NotAStream:
            if stream not in self._not_streams:
                self._not_streams.add(stream)
                log.error("ledger_is_no_stream", stream=stream)
            return None
        return None if reading is None else (cursor, reading)

    # -- one batch -------------------------------------------------------------------------------

    async def _copy(self, job: _Job, entries: Sequence[Entry], reading: Reading) -> Cursor | None:
        """Copy entries that follow on `job.at`; where it stands then, or None if it is another worker's."""
        moved = job._replace(at=_after(job.at, entries, reading))
        rows, rejected = _rows(entries)
        try:
            return await self._commit(moved, rows, rejected)
        except RowsRefused as why:
            if len(entries) == 1:
                return await self._commit(moved, [], [_reject(entries[0], str(why))])
        # One of them is the reason: halves, until it is alone.
        half = len(entries) // 2
        middle = await self._copy(job, entries[:half], reading)
        if middle is None:
            return None
        return await self._copy(job._replace(before=middle, at=middle, lost=0), entries[half:], reading)

    async def _commit(self, job: _Job, rows: Sequence[Row], rejected: Sequence[Rejected]) -> Cursor | None:
        copied = await self._tables.copy(job.stream, job.tenant, job.before, job.at, rows, rejected, job.lost)
        if copied is None:
            return None
        self._cursors[job.stream] = job.at
        self._moved = True
        self._metrics.copied(new=copied.new, known=copied.known, rejected=len(rejected))
        if job.lost:
            self._metrics.gap(job.lost)
            log.error("ledger_gap", tenant=job.tenant, lost=job.lost, after=(job.before or job.at).last_id)
        for each in rejected[:WARNED_RECORDS]:
            log.warning(
                "ledger_record_rejected", tenant=job.tenant, entry_id=each.entry_id, reason=each.reason
            )
        return job.at

    # -- what it tells ---------------------------------------------------------------------------

    def _note(self, stream: str, end: Cursor, reading: Reading, rest: Sequence[Entry]) -> None:
        if not rest:
            self._waiting.pop(stream, None)
            return
        age = max(reading.now_ms - rest[0].at_ms, 0) / 1000
        self._waiting[stream] = _Waiting(max(reading.added - end.position, 1), time.time() - age)

    def _tell_waiting(self) -> None:
        waiting = self._waiting.values()
        self._metrics.waiting(
            sum(each.records for each in waiting), min((each.oldest_at for each in waiting), default=None)
        )

    def _tell(self, where: Where) -> None:
        """One line for each change."""
        if not self._well.get(where):
            self._well[where] = True
            self._metrics.available(where, True)
            if where == "redis":
                log.info("redis_available")
            else:
                log.info("postgres_available")

    async def _failed(self, away: Away) -> None:
        self._metrics.failed(away.where)
        self._metrics.available(away.where, False)
        if self._well.get(away.where) is not False:
            self._well[away.where] = False
            if away.where == "redis":
                log.warning("redis_unavailable", reason=away.reason)
            else:
                log.warning("postgres_unavailable", reason=away.reason)
        # Anew next time: whatever state the old connection is in.
        if away.where == "redis":
            await self._streams.close()
            return
        await self._tables.close()
        with suppress(Away):
            await self._look()

    async def _look(self) -> None:
        """How much waits while PostgreSQL is away. Without its cursors nobody knows."""
        if not self._cursors_known:
            return
        for tenant in await self._streams.tenants():
            stream = self._streams.name(tenant)
            cursor = self._cursors.get(stream) or Cursor()
            with suppress(NotAStream):
                reading = await self._streams.read(stream, cursor.last_id, 1)
                if reading is not None:
                    self._note(stream, cursor, reading, reading.entries)
        self._tell_waiting()


class _Job(NamedTuple):
    """A step of one stream: from the cursor that the table holds to where it is `at` then."""

    stream: str
    tenant: str
    before: Cursor | None
    at: Cursor
    lost: int
    """Entries that were trimmed between the two before they were copied."""


def _began_anew(cursor: Cursor, reading: Reading) -> bool:
    """The stream knows nothing of where we stand: it was deleted, or Redis lost its latest writes."""
    return is_after(cursor.last_id, reading.last_id) or cursor.position > reading.added


def _trimmed(cursor: Cursor, reading: Reading) -> int:
    """Entries after the cursor that are gone. While its own entry is there, none can be."""
    if reading.first_id and not is_after(reading.first_id, cursor.last_id):
        return 0
    return max(reading.added - reading.length - cursor.position, 0)


def _after(start: Cursor, entries: Sequence[Entry], reading: Reading) -> Cursor:
    last = entries[-1].id
    # The end of the stream is known exactly, also where somebody deleted entries from its middle.
    position = reading.added if last == reading.last_id else start.position + len(entries)
    return Cursor(last, position)


def _rows(entries: Sequence[Entry]) -> tuple[list[Row], list[Rejected]]:
    rows, rejected = [], []
    for entry in entries:
        try:
            rows.append(row(entry.record))
        except Unreadable as why:
            rejected.append(_reject(entry, str(why)))
    return rows, rejected


def _reject(entry: Entry, reason: str) -> Rejected:
    return Rejected(entry.id, reason, None if entry.record is None else entry.record[:KEPT_BYTES])


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
