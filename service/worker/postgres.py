"""The ledger's tables in PostgreSQL. The one module that knows the driver.

Its errors become Away; RowsRefused, where it is a value that PostgreSQL does not take; and
ConfigurationError, where another try does not help: the password, the database, rights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import asyncpg

from service.errors import ConfigurationError
from service.worker.ports import Away, Copied, Cursor, Rejected, RowsRefused
from service.worker.records import COLUMNS, EXTRA, NAMES, Row
from service.worker.schema import MIGRATIONS

CONNECT_SECONDS: Final = 10.0
STATEMENT_SECONDS: Final = 30.0

_TYPES: Final = {column.name: column.type for column in COLUMNS} | {EXTRA: "jsonb"}
_VALUES: Final = ("22", "23", "54")
"""Classes of SQLSTATE: the value, a constraint, a limit such as an index entry's size."""
_COLUMNS: Final = ", ".join(NAMES)
_EXCLUDED: Final = ", ".join(f"EXCLUDED.{name}" for name in NAMES)
_ABANDONED: Final = "({} IS NOT DISTINCT FROM 'abandoned')"
"""Entered for a process that seemed to be gone; its own record, should it come after all, takes the place."""
_TYPED_COLUMNS: Final = ", ".join(f"{name} {_TYPES[name]}" for name in NAMES)


class Tables:
    """One connection, opened when it is needed. Each batch is one transaction."""

    def __init__(self, url: str, *, password: str | None, schema: str) -> None:
        self._url = url
        self._password = password
        self._schema = f'"{schema}"'  # letters, digits and _ alone, as the settings have checked
        self._name = schema
        self._connection: asyncpg.Connection[Any] | None = None
        # Of the version, because a pooler may give us a session in which another worker has made one.
        self._batch = f"weir_ledger_batch_{len(MIGRATIONS)}"

    async def cursors(self) -> dict[str, Cursor]:
        """Where each stream's copy stands, by the stream's name."""
        connection = await self._connected()
        with _translated():
            rows = await connection.fetch(
                self._sql("SELECT stream, last_id, position FROM {schema}.weir_ledger_cursors")
            )
        return {row["stream"]: Cursor(row["last_id"], row["position"]) for row in rows}

    async def copy(
        self,
        stream: str,
        tenant: str,
        before: Cursor | None,
        after: Cursor,
        rows: Sequence[Row],
        rejected: Sequence[Rejected],
        lost: int,
    ) -> Copied | None:
        """Rows and cursor, both or neither. None if another worker moved the cursor or holds it."""
        connection = await self._connected()
        with _translated():
            async with connection.transaction():
                if not await self._hold(connection, stream, tenant, before):
                    return None
                new = await self._insert(connection, rows) if rows else 0
                if rejected:
                    await connection.executemany(
                        self._sql(
                            "INSERT INTO {schema}.weir_ledger_rejected (stream, entry_id, reason, content)"
                            " VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING"
                        ),
                        [(stream, each.entry_id, each.reason, each.content) for each in rejected],
                    )
                await connection.execute(
                    self._sql(
                        "UPDATE {schema}.weir_ledger_cursors SET last_id = $2, position = $3,"
                        " lost = lost + $4, moved_at = now() WHERE stream = $1"
                    ),
                    *(stream, after.last_id, after.position, lost),
                )
        return Copied(new=new, known=len(rows) - new)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()  # whatever runs is rolled back

    async def _hold(
        self, connection: asyncpg.Connection[Any], stream: str, tenant: str, before: Cursor | None
    ) -> bool:
        """Lock the cursor until the end of the transaction, if it is still where we read on from."""
        if before is None:
            before = Cursor()
            await connection.execute(
                self._sql(
                    "INSERT INTO {schema}.weir_ledger_cursors (stream, tenant, last_id, position)"
                    " VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING"
                ),
                *(stream, tenant, before.last_id, before.position),
            )
        held = await connection.fetchrow(
            self._sql(
                "SELECT last_id, position FROM {schema}.weir_ledger_cursors"
                " WHERE stream = $1 FOR UPDATE SKIP LOCKED"
            ),
            stream,
        )
        return held is not None and Cursor(held["last_id"], held["position"]) == before

    async def _insert(self, connection: asyncpg.Connection[Any], rows: Sequence[Row]) -> int:
        """How many were new. COPY knows no ON CONFLICT, so it goes through a table of this session."""
        await connection.execute(
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {self._batch} ({_TYPED_COLUMNS}) ON COMMIT DELETE ROWS"
        )
        await connection.copy_records_to_table(
            self._batch, records=rows, columns=NAMES, schema_name="pg_temp"
        )
        # All that is put into the text are names of ours.
        done = await connection.execute(
            self._sql(
                f"INSERT INTO {{schema}}.weir_ledger AS known ({_COLUMNS})"  # noqa: S608
                f" SELECT DISTINCT ON (id) {_COLUMNS} FROM pg_temp.{self._batch}"
                f" ORDER BY id, {_ABANDONED.format('error_code')}"
                f" ON CONFLICT (id) DO UPDATE SET ({_COLUMNS}) = ROW ({_EXCLUDED})"
                f" WHERE {_ABANDONED.format('known.error_code')}"
                f" AND NOT {_ABANDONED.format('EXCLUDED.error_code')}"
            )
        )
        return int(done.split()[-1])  # INSERT 0 <rows>

    async def _connected(self) -> asyncpg.Connection[Any]:
        if self._connection is None or self._connection.is_closed():
            with _translated():
                connection = await self._connect()
                try:
                    await self._migrate(connection)
                except BaseException:
                    connection.terminate()
                    raise
            self._connection = connection
        return self._connection

    async def _connect(self) -> asyncpg.Connection[Any]:
        try:
            # No kept statements: behind a pooler the next transaction may be in another session.
            return await asyncpg.connect(
                self._url,
                password=self._password,
                timeout=CONNECT_SECONDS,
                command_timeout=STATEMENT_SECONDS,
                statement_cache_size=0,
                server_settings={"application_name": "weir-worker"},
            )
        except asyncpg.UndefinedObjectError:
            raise ConfigurationError(
                "LEDGER_POSTGRES_URL: it has a parameter after the ? that the worker does not know"
            ) from None
        except (asyncpg.InterfaceError, OSError):
            raise  # a certificate that does not fit is an OSError, and a ValueError too
        except ValueError:  # its words may show a piece of the address
            raise ConfigurationError("LEDGER_POSTGRES_URL: cannot be read as an address") from None

    async def _migrate(self, connection: asyncpg.Connection[Any]) -> None:
        if await self._version(connection) >= len(MIGRATIONS):
            return
        async with connection.transaction():
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"weir {self._name}"
            )
            # Asked for first: IF NOT EXISTS wants the right to make it also where it is there.
            if not await connection.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = $1", self._name):
                await connection.execute(self._sql("CREATE SCHEMA {schema}"))
            await connection.execute(
                self._sql(
                    "CREATE TABLE IF NOT EXISTS {schema}.weir_ledger_schema"
                    " (version integer PRIMARY KEY, made_at timestamptz NOT NULL DEFAULT now())"
                )
            )
            for number in range(await self._version(connection) + 1, len(MIGRATIONS) + 1):
                await connection.execute(self._sql(MIGRATIONS[number - 1]))
                await connection.execute(
                    self._sql("INSERT INTO {schema}.weir_ledger_schema (version) VALUES ($1)"), number
                )

    async def _version(self, connection: asyncpg.Connection[Any]) -> int:
        table = f"{self._schema}.weir_ledger_schema"
        if await connection.fetchval("SELECT to_regclass($1)::text", table) is None:
            return 0
        found = await connection.fetchval(self._sql("SELECT max(version) FROM {schema}.weir_ledger_schema"))
        return int(found or 0)

    def _sql(self, text: str) -> str:
        return text.format(schema=self._schema)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.ClientConfigurationError,
    ) as error:
        raise ConfigurationError(
            "LEDGER_POSTGRES_URL, LEDGER_POSTGRES_PASSWORD: PostgreSQL does not let the worker in:"
            f" {_NOT_IN.get(type(error), type(error).__name__)}"
        ) from None
    except asyncpg.InsufficientPrivilegeError:
        raise ConfigurationError(
            "LEDGER_POSTGRES_SCHEMA: the role may not make or write its tables; give it the schema"
            " (docs/ledger.md) and the right TEMPORARY on the database"
        ) from None
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in _VALUES:
            raise RowsRefused(f"PostgreSQL refused it: {type(error).__name__}") from None
        raise Away("postgres", type(error).__name__) from None
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError) as error:
        raise Away("postgres", type(error).__name__) from None


_NOT_IN: Final = {
    asyncpg.InvalidPasswordError: "user or password are wrong",
    asyncpg.InvalidAuthorizationSpecificationError: "this user may not come from here, or not without TLS",
    asyncpg.InvalidCatalogNameError: "there is no such database",
    asyncpg.ClientConfigurationError: "a parameter of the address or a certificate is wrong",
}
