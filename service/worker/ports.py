"""What the sink asks of Redis and of PostgreSQL, and the words between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from service.worker.records import Row

Where: TypeAlias = Literal["redis", "postgres"]


class Away(Exception):
    """It cannot be reached or cannot serve just now: try again later. `reason` is a word for the log."""

    def __init__(self, where: Where, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where: Where = where
        self.reason = reason


class NotAStream(Exception):
    """Under a stream's name there is something else."""


class RowsRefused(Exception):
    """One of the rows holds what PostgreSQL does not take; the text says what, without the value."""


class Cursor(NamedTuple):
    """How far a stream is copied: up to and with this entry, which was the so manieth ever added."""

    last_id: str = "0-0"
    position: int = 0


class Entry(NamedTuple):
    id: str
    record: bytes | None

    @property
    def at_ms(self) -> int:
        """When Redis took it, milliseconds since 1970."""
        return int(self.id.partition("-")[0])


class Reading(NamedTuple):
    """Entries of a stream, and what the stream was in that moment."""

    now_ms: int
    length: int
    added: int
    """Entries that were ever added, those trimmed since with them."""
    first_id: str
    """Of the oldest entry that is there; empty where there is none."""
    last_id: str
    """Of the latest entry that was ever added."""
    entries: Sequence[Entry]


class Rejected(NamedTuple):
    entry_id: str
    reason: str
    content: bytes | None


class Copied(NamedTuple):
    new: int
    known: int
    """Rows whose id was there before."""


class Streams(Protocol):
    """The tenants' ledgers. Raises Away, NotAStream, ConfigurationError."""

    def name(self, tenant: str) -> str: ...

    async def tenants(self) -> Sequence[str]: ...

    async def read(self, stream: str, after: str, count: int) -> Reading | None: ...

    async def close(self) -> None: ...


class Tables(Protocol):
    """Where the ledger is copied to. Raises Away, RowsRefused, ConfigurationError."""

    async def cursors(self) -> dict[str, Cursor]: ...

    async def copy(
        self,
        stream: str,
        tenant: str,
        before: Cursor | None,
        after: Cursor,
        rows: Sequence[Row],
        rejected: Sequence[Rejected],
        lost: int,
    ) -> Copied | None: ...

    async def close(self) -> None: ...


def is_after(entry_id: str, other: str) -> bool:
    """Ids of a stream are two numbers, `time-sequence`."""
    return _numbers(entry_id) > _numbers(other)


def _numbers(entry_id: str) -> tuple[int, int]:
    time, _, sequence = entry_id.partition("-")
    return int(time), int(sequence)
