"""The sink on real Redis and a real PostgreSQL: what is copied, and what never blocks it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from service.domain import CacheUse, Cost, Operation, Outcome, Principal, RequestRecord, Usage, UsageSource
from service.errors import ConfigurationError
from service.stores.redis.address import Client, close_client, make_client
from service.worker.metrics import SinkMetrics
from service.worker.ports import Away
from service.worker.postgres import Tables
from service.worker.records import COLUMNS, LEFT_OUT, NAMES
from service.worker.run import make_sink
from service.worker.schema import MIGRATIONS
from service.worker.sink import Sink
from tests.postgres_server import PostgresServer
from tests.redis_servers import Servers, Single
from tests.running import settings

TENANTS = "weir:tenants"


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> str:
    """A new database's address."""
    return postgres.database(f"d{uuid.uuid4().hex}")


def stream_of(tenant: str) -> str:
    return f"weir:{{{tenant}}}:ledger"


def record(tenant: str = "acme", **values: Any) -> RequestRecord:
    usual: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "request_id": "r",
        "route": "/v1/chat/completions",
        "operation": Operation.CHAT,
        "principal": Principal("app", tenant),
        "outcome": Outcome.SUCCESS,
    }
    return RequestRecord(**usual | values)


class Ledger:
    """Redis as the pods fill it, a database, and the sinks between them."""

    def __init__(self, redis_url: str, database: str) -> None:
        self.redis_url = redis_url
        self.database = database
        self.client: Client = make_client(redis_url, timeout_seconds=10, max_connections=4)
        self.registry = CollectorRegistry()
        self.sinks: list[Sink] = []
        self.stop = asyncio.Event()

    async def __aenter__(self) -> Ledger:
        return self

    async def __aexit__(self, *_: object) -> None:
        for sink in self.sinks:
            await sink._tables.close()
            await sink._streams.close()
        await close_client(self.client)

    def sink(self, **values: Any) -> Sink:
        self.registry = CollectorRegistry()
        given = {"redis_url": self.redis_url, "ledger_postgres_url": self.database} | values
        self.sinks.append(make_sink(settings(**given), SinkMetrics(self.registry)))
        return self.sinks[-1]

    async def copy(self, sink: Sink | None = None) -> None:
        await (sink or self.sinks[-1]).copy_all(self.stop)

    async def add(self, *contents: RequestRecord | bytes, tenant: str = "acme", entry_id: str = "*") -> None:
        client: Any = self.client
        for content in contents:
            value = content if isinstance(content, bytes) else msgspec.json.encode(content)
            await client.xadd(stream_of(tenant), {"record": value}, id=entry_id)
        await client.sadd(TENANTS, tenant)

    async def add_many(self, count: int, tenant: str = "acme") -> list[str]:
        records = [record(tenant) for _ in range(count)]
        await self.add(*records, tenant=tenant)
        return [each.id for each in records]

    async def rows(self, what: str = "weir_ledger", more: str = "") -> list[Any]:
        connection = await asyncpg.connect(self.database)
        try:
            return list(await connection.fetch(f"SELECT * FROM weir.{what} {more}"))
        finally:
            await connection.close()

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.database)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def ids(self) -> list[str]:
        return sorted(row["id"] for row in await self.rows())

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"weir_sink_{name}", labels) or 0.0

    def results(self) -> tuple[float, ...]:
        return tuple(self.metric("records_total", result=r) for r in ("copied", "known", "rejected"))


@pytest.fixture
async def ledger(redis_single: Single, database: str) -> Any:
    async with Ledger(redis_single.url, database) as made:
        yield made


# -- what is copied ------------------------------------------------------------------------------


async def test_every_field_arrives_as_its_type_on_each_form_of_redis(
    redis_servers: Servers, database: str
) -> None:
    full = record(
        "acme",
        id="0001",
        request_id="the caller's",
        principal=Principal("shop", "acme", priority="high", admin=True),
        started_at=1_790_000_000.123456,
        request_model="fast",
        response_model="gpt-4o-mini",
        answered_by="gpt-4o",
        provider="openai",
        upstream="main",
        stream=True,
        outcome=Outcome.STREAM_TRUNCATED,
        error_code="stream_truncated",
        usage=Usage(11, 12, 3, 4, 5, 2, 1, UsageSource.ESTIMATED),
        cost=Cost(0.000_000_123_4, "genai-prices"),
        cache=CacheUse.MISS,
        saved_usd=0.25,
        attempts=2,
        duration_seconds=1.25,
        queue_seconds=0.0625,
        upstream_seconds=1.125,
        overhead_seconds=0.03125,
        time_to_first_token_seconds=0.5,
        time_per_output_token_seconds=0.01,
        finish_reason="length",
        response_id="chatcmpl-1",
        upstream_request_id="req_1",
        conversation_id="conv",
        trace_id="trace",
    )
    bare = record("größe/2", id="0002")
    async with Ledger(redis_servers.url, database) as ledger:
        await ledger.add(full)
        stream = "weir:{gr%C3%B6%C3%9Fe%2F2}:ledger"
        client: Any = ledger.client
        await client.xadd(stream, {"record": msgspec.json.encode(bare)})
        await client.sadd(TENANTS, "größe/2")
        ledger.sink()
        await ledger.copy()
        one, two = await ledger.rows(more="ORDER BY id")
        assert {k: v for k, v in one.items() if k != "copied_at"} == {
            "id": "0001",
            "request_id": "the caller's",
            "tenant": "acme",
            "api_key": "shop",
            "admin": True,
            "priority": "high",
            "started_at": datetime(2026, 9, 21, 14, 13, 20, 123456, UTC),
            "route": "/v1/chat/completions",
            "operation": "chat/completions",
            "request_model": "fast",
            "response_model": "gpt-4o-mini",
            "answered_by": "gpt-4o",
            "provider": "openai",
            "upstream": "main",
            "stream": True,
            "outcome": "stream_truncated",
            "error_code": "stream_truncated",
            "input_tokens": 11,
            "output_tokens": 12,
            "cached_input_tokens": 3,
            "cache_write_tokens": 4,
            "reasoning_tokens": 5,
            "audio_input_tokens": 2,
            "audio_output_tokens": 1,
            "usage_source": "estimated",
            "cost_usd": Decimal("0.0000001234"),
            "cost_source": "genai-prices",
            "cache": "miss",
            "saved_usd": Decimal("0.25"),
            "attempts": 2,
            "duration_seconds": 1.25,
            "queue_seconds": 0.0625,
            "upstream_seconds": 1.125,
            "overhead_seconds": 0.03125,
            "time_to_first_token_seconds": 0.5,
            "time_per_output_token_seconds": 0.01,
            "finish_reason": "length",
            "response_id": "chatcmpl-1",
            "upstream_request_id": "req_1",
            "conversation_id": "conv",
            "trace_id": "trace",
            "extra": None,
        }
        assert (two["tenant"], two["cost_usd"], two["input_tokens"]) == ("größe/2", None, None)
        assert two["cost_source"] == "unpriced"
        assert ledger.results() == (2, 0, 0)
        await ledger.add(record("acme", id="0003"))
        await ledger.copy()
        assert await ledger.ids() == ["0001", "0002", "0003"]
        assert ledger.results() == (3, 0, 0)


async def test_every_field_of_a_record_has_a_column(ledger: Ledger) -> None:
    await ledger.add(record(usage=Usage(), cost=Cost(1.0, "x")))
    ledger.sink()
    await ledger.copy()
    (row,) = await ledger.rows()
    assert row["extra"] is None
    assert [*NAMES, "copied_at"] == list(row.keys())
    decoded = json.loads(msgspec.json.encode(record(usage=Usage())))
    flat: set[tuple[str, ...]] = {(k, i) for k, v in decoded.items() if isinstance(v, dict) for i in v}
    flat |= {(k,) for k, v in decoded.items() if not isinstance(v, dict)}
    assert flat - set(LEFT_OUT) == {column.path for column in COLUMNS}


async def test_without_tenants_there_is_nothing_to_do(ledger: Ledger) -> None:
    ledger.sink()
    await ledger.copy()
    assert await ledger.rows() == []
    await ledger.add_many(1)
    await ledger.copy()
    assert len(await ledger.rows()) == 1


async def test_another_prefix_and_schema_are_others_ledgers(ledger: Ledger) -> None:
    await ledger.add_many(2)
    client: Any = ledger.client
    await client.xadd("other:{acme}:ledger", {"record": msgspec.json.encode(record(id="o"))})
    await client.sadd("other:tenants", "acme")
    ledger.sink(redis_prefix="other:", ledger_postgres_schema="select")
    await ledger.copy()
    connection = await asyncpg.connect(ledger.database)
    assert [r["id"] for r in await connection.fetch('SELECT id FROM "select".weir_ledger')] == ["o"]
    await connection.close()


async def test_long_backlogs_come_in_batches_and_tenants_take_turns(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await ledger.add_many(95, "long") + await ledger.add_many(5, "short")
    sink = ledger.sink(ledger_batch_records=10)
    order: list[str] = []
    copy = sink._tables.copy

    async def watched(stream: str, *rest: Any) -> Any:
        order.append(stream)
        return await copy(stream, *rest)

    monkeypatch.setattr(sink._tables, "copy", watched)
    await ledger.copy()
    assert await ledger.ids() == sorted(ids)
    assert order.count(stream_of("long")) == 10
    assert stream_of("short") in order[:2]


# -- exactly once --------------------------------------------------------------------------------


async def test_a_stream_that_is_read_again_is_not_entered_again(ledger: Ledger) -> None:
    ids = await ledger.add_many(30)
    await ledger.add(record(id=ids[0]))  # and one that came into the stream twice
    ledger.sink(ledger_batch_records=7)
    await ledger.copy()
    assert ledger.results() == (30, 1, 0)
    await ledger.execute("DELETE FROM weir.weir_ledger_cursors")
    await ledger.copy()
    assert ledger.results() == (30, 32, 0)
    assert await ledger.ids() == sorted(ids)


async def test_rows_and_cursor_come_together_or_not_at_all(ledger: Ledger) -> None:
    ids = await ledger.add_many(20)
    ledger.sink(ledger_batch_records=10)
    await ledger.execute("CREATE SCHEMA weir")
    await ledger.sinks[0]._tables.cursors()
    # The cursor's update fails, after the rows are in.
    await ledger.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.position = 20 THEN RAISE SQLSTATE '57P01'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON weir.weir_ledger_cursors"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    with pytest.raises(Away):
        await ledger.copy()
    assert await ledger.ids() == sorted(ids[:10])
    await ledger.execute("DROP TRIGGER refuse ON weir.weir_ledger_cursors")
    await ledger.copy()
    assert await ledger.ids() == sorted(ids)
    assert ledger.results() == (20, 0, 0)


async def test_two_at_once_share_the_tenants(ledger: Ledger) -> None:
    ids = [i for n in range(6) for i in await ledger.add_many(40, f"t{n}")]
    both = [ledger.sink(ledger_batch_records=5) for _ in range(2)]
    await both[0]._tables.cursors()
    while len(await ledger.rows()) < len(ids):
        await asyncio.gather(*(ledger.copy(sink) for sink in both))
    assert await ledger.ids() == sorted(ids)
    taken = [sink._metrics._records.labels("copied")._value.get() for sink in both]
    known = [sink._metrics._records.labels("known")._value.get() for sink in both]
    assert sum(taken) == len(ids)
    assert known == [0, 0], "neither copied what the other did"


async def test_a_stream_that_another_holds_is_left_to_it(ledger: Ledger) -> None:
    ids = await ledger.add_many(5, "one")
    ledger.sink()
    await ledger.copy()
    more = await ledger.add_many(5, "one")
    others = await ledger.add_many(5, "two")
    connection = await asyncpg.connect(ledger.database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT * FROM weir.weir_ledger_cursors FOR UPDATE")
    await ledger.copy()
    assert await ledger.ids() == sorted(ids + others)
    await transaction.rollback()
    await connection.close()
    await ledger.copy()
    assert await ledger.ids() == sorted(ids + others + more)


async def test_a_cursor_that_another_has_moved_is_not_moved_back(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ledger.add_many(4)
    first, second = ledger.sink(ledger_batch_records=2), ledger.sink(ledger_batch_records=2)
    await first._tables.cursors()
    copy = first._tables.copy

    async def late(*arguments: Any) -> Any:
        monkeypatch.undo()
        await ledger.copy(second)
        return await copy(*arguments)

    monkeypatch.setattr(first._tables, "copy", late)
    await ledger.copy(first)
    (cursor,) = await ledger.rows("weir_ledger_cursors")
    assert cursor["position"] == 4
    assert ledger.results() == (4, 0, 0), "the second's registry"
    assert first._metrics._records.labels("known")._value.get() == 0


# -- what it does not know -----------------------------------------------------------------------


async def test_fields_of_newer_pods_are_kept_aside(ledger: Ledger) -> None:
    newer = json.loads(msgspec.json.encode(record(usage=Usage(1, 2))))
    newer["region"] = {"name": "eu\0", "deep": ["\0", 1]}
    newer["usage"]["audio_tokens"] = 7
    newer["outcome"] = "moved_to_mars"
    newer["request_model"] = "gpt\0x"
    del newer["attempts"]
    await ledger.add(json.dumps(newer).encode())
    ledger.sink()
    await ledger.copy()
    (row,) = await ledger.rows()
    assert json.loads(row["extra"]) == {
        "region": {"name": "eu\ufffd", "deep": ["\ufffd", 1]},
        "usage": {"audio_tokens": 7},
    }
    assert (row["outcome"], row["attempts"], row["input_tokens"]) == ("moved_to_mars", None, 1)
    assert row["request_model"] == "gpt\ufffdx"


JUNK: list[tuple[bytes, str]] = [
    (b"", "the record is not JSON"),
    (b"\xff\xfe", "the record is not JSON"),
    (b'{"id": "\\ud800"}', "the record is not JSON"),
    (b"[" * 100_000, "the record is not JSON"),
    (b"[]", "the record is no object"),
    (b"{}", "the field `id` is not there"),
    (msgspec.json.encode(record(id="")), "the field `id` is empty or longer than 200 letters"),
    (msgspec.json.encode(record(id="x" * 201)), "the field `id` is empty or longer than 200 letters"),
    (msgspec.json.encode(record("t" * 5000)), "the field `principal.tenant` is empty or longer than"),
    (b'{"id": "a", "principal": 7}', "the field `principal` is no object"),
    (msgspec.json.encode(record(started_at=1e300)), "the field `started_at` is no time"),
    (msgspec.json.encode(record(usage=Usage(2**63))), "the field `usage.input_tokens` is no whole number"),
    (msgspec.json.encode(record(route=True)), "the field `route` is no text"),
    (msgspec.json.encode(record(stream=1)), "the field `stream` is neither true nor false"),
    (msgspec.json.encode(record(attempts=1.5)), "the field `attempts` is no whole number"),
    (msgspec.json.encode(record(cost=Cost("1", "x"))), "the field `cost.usd` is no number"),  # type: ignore[arg-type]
]


async def test_what_cannot_be_read_is_set_aside_and_told_once(ledger: Ledger) -> None:
    ids: list[str] = []
    for content, _ in JUNK:
        ids += await ledger.add_many(1)
        await ledger.add(content)
    client: Any = ledger.client
    await client.xadd(stream_of("acme"), {"other": "x"})
    ids += await ledger.add_many(1)
    ledger.sink()
    with capture_logs() as lines:
        await ledger.copy()
        await ledger.copy()
    assert await ledger.ids() == sorted(ids)
    rejected = await ledger.rows("weir_ledger_rejected", "ORDER BY entry_id")
    assert len(rejected) == len(JUNK) + 1 == ledger.results()[2]
    for row, (content, reason) in zip(rejected, JUNK, strict=False):
        assert row["reason"].startswith(reason)
        assert row["content"] == content[: 64 * 1024]
    assert rejected[-1]["reason"] == "the entry has no field `record`"
    told = [line for line in lines if line["event"] == "ledger_record_rejected"]
    assert [line["entry_id"] for line in told] == [row["entry_id"] for row in rejected]


async def test_a_row_that_postgres_refuses_is_found_and_set_aside(ledger: Ledger) -> None:
    ids = await ledger.add_many(13)
    await ledger.add(record(id="poison"), record(id="poison2"))
    ids += await ledger.add_many(20)
    sink = ledger.sink()
    await sink._tables.cursors()
    await ledger.execute("ALTER TABLE weir.weir_ledger ADD CHECK (id NOT LIKE 'poison%')")
    await ledger.copy()
    assert await ledger.ids() == sorted(ids)
    assert ledger.results() == (33, 0, 2)
    reasons = {row["reason"] for row in await ledger.rows("weir_ledger_rejected")}
    assert reasons == {"PostgreSQL refused it: CheckViolationError"}
    (cursor,) = await ledger.rows("weir_ledger_cursors")
    assert cursor["position"] == 35


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_fields = st.sampled_from([*sorted({c.path[0] for c in COLUMNS} - {"id"}), "new"])


@given(st.lists(st.dictionaries(_fields, _values, max_size=4), min_size=1, max_size=20))
@examples(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_is_in_the_stream_ends_in_one_of_the_two_tables(
    redis_single: Single, database: str, changes: list[dict[str, Any]]
) -> None:
    async def run() -> None:
        async with Ledger(redis_single.url, database) as ledger:
            client: Any = ledger.client
            await client.flushall()
            ledger.sink()
            await ledger.sinks[0]._tables.cursors()
            await ledger.execute(
                "TRUNCATE weir.weir_ledger, weir.weir_ledger_rejected, weir.weir_ledger_cursors"
            )
            for change in changes:
                base = json.loads(msgspec.json.encode(record(usage=Usage())))
                await ledger.add(json.dumps(base | change, allow_nan=True).encode())
            await ledger.copy()
            copied, rejected = await ledger.rows(), await ledger.rows("weir_ledger_rejected")
            assert len(copied) + len(rejected) == len(changes)
            assert not any("PostgreSQL" in row["reason"] for row in rejected), "known before it is sent"

    asyncio.run(run())


async def test_what_is_no_stream_does_not_hold_up_the_others(ledger: Ledger) -> None:
    client: Any = ledger.client
    await client.set(stream_of("odd"), "x")
    await client.sadd(TENANTS, "odd", "gone", b"\xff")
    ids = await ledger.add_many(3)
    ledger.sink()
    with capture_logs() as lines:
        await ledger.copy()
        await ledger.copy()
    assert await ledger.ids() == sorted(ids)
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["ledger_is_no_stream"]


# -- gaps ----------------------------------------------------------------------------------------


async def test_a_gap_is_told_with_its_size(ledger: Ledger) -> None:
    await ledger.add_many(10)
    ledger.sink(ledger_batch_records=4)
    await ledger.copy()
    await ledger.add_many(90)
    client: Any = ledger.client
    await client.xtrim(stream_of("acme"), maxlen=30, approximate=False)
    with capture_logs() as lines:
        await ledger.copy()
        await ledger.copy()
    errors = [line for line in lines if line["log_level"] == "error"]
    assert [(e["event"], e["tenant"], e["lost"]) for e in errors] == [("ledger_gap", "acme", 60)]
    assert (ledger.metric("gaps_total"), ledger.metric("lost_records_total")) == (1, 60)
    assert len(await ledger.rows()) == 40
    (cursor,) = await ledger.rows("weir_ledger_cursors")
    assert (cursor["position"], cursor["lost"]) == (100, 60)


async def test_trimmed_up_to_the_cursor_is_no_gap(ledger: Ledger) -> None:
    await ledger.add_many(10)
    ledger.sink()
    await ledger.copy()
    await ledger.add_many(5)
    client: Any = ledger.client
    for kept in (8, 5):
        await client.xtrim(stream_of("acme"), maxlen=kept, approximate=False)
        await ledger.copy()
    assert len(await ledger.rows()) == 15
    await client.xtrim(stream_of("acme"), maxlen=0)
    await ledger.copy()
    assert ledger.metric("gaps_total") == 0
    await ledger.add_many(3)
    await client.xtrim(stream_of("acme"), maxlen=0)
    await ledger.copy()
    await ledger.copy()
    assert (ledger.metric("gaps_total"), ledger.metric("lost_records_total")) == (1, 3)


async def test_what_was_trimmed_before_the_first_copy_is_no_gap(ledger: Ledger) -> None:
    ids = await ledger.add_many(10)
    client: Any = ledger.client
    await client.xtrim(stream_of("acme"), maxlen=4, approximate=False)
    ledger.sink()
    with capture_logs() as lines:
        await ledger.copy()
    (begins,) = [line for line in lines if line["event"] == "ledger_begins"]
    assert begins["trimmed_before"] == 6
    assert ledger.metric("gaps_total") == 0
    assert await ledger.ids() == sorted(ids[6:])
    (cursor,) = await ledger.rows("weir_ledger_cursors")
    assert (cursor["position"], cursor["lost"]) == (10, 0)


async def test_entries_that_somebody_deleted_are_no_gap(ledger: Ledger) -> None:
    ids = await ledger.add_many(3)
    ledger.sink(ledger_batch_records=3)
    await ledger.copy()
    ids += await ledger.add_many(10)
    client: Any = ledger.client
    entries = await client.xrange(stream_of("acme"))
    await client.xdel(stream_of("acme"), *(name for name, _ in entries[5:11]))
    await ledger.copy()
    assert await ledger.ids() == sorted(ids[:5] + ids[11:])
    (cursor,) = await ledger.rows("weir_ledger_cursors")
    assert cursor["position"] == 13
    await ledger.add_many(3)
    await client.xtrim(stream_of("acme"), maxlen=3, approximate=False)
    await ledger.copy()
    assert ledger.metric("gaps_total") == 0


@pytest.mark.parametrize(
    ("last", "new", "told"),
    [
        ("*", 3, True),
        ("*", 8, False),  # nothing tells it, and nothing depends on it
        ("9999999999999-0", 3, True),
        ("9999999999999-0", 8, True),
    ],
    ids=["erased", "erased, and more since", "a clock that went back", "and more since"],
)
async def test_a_stream_that_began_anew_is_copied_from_its_beginning(
    ledger: Ledger, last: str, new: int, told: bool
) -> None:
    ids = await ledger.add_many(5)
    await ledger.add(record(id="last"), entry_id=last)
    ledger.sink()
    await ledger.copy()
    client: Any = ledger.client
    await client.delete(stream_of("acme"))
    await ledger.copy()  # there is no stream now
    more = await ledger.add_many(new)
    with capture_logs() as lines:
        await ledger.copy()
        await ledger.copy()
    assert [line["event"] for line in lines] == ["ledger_began_anew"] * told
    assert await ledger.ids() == sorted([*ids, "last", *more])
    assert ledger.metric("gaps_total") == 0


# -- the tables ----------------------------------------------------------------------------------


async def test_workers_that_start_at_once_make_the_tables_once(database: str) -> None:
    tables = [Tables(database, password=None, schema="weir") for _ in range(5)]
    await asyncio.gather(*(each.cursors() for each in tables))
    for each in tables:
        await each.close()
    connection = await asyncpg.connect(database)
    versions = await connection.fetch("SELECT version FROM weir.weir_ledger_schema")
    assert [row["version"] for row in versions] == list(range(1, len(MIGRATIONS) + 1))
    await connection.close()


async def test_an_older_worker_goes_on_with_newer_tables(ledger: Ledger) -> None:
    sink = ledger.sink()
    await sink._tables.cursors()
    await ledger.execute("INSERT INTO weir.weir_ledger_schema (version) VALUES (999)")
    await ledger.execute("ALTER TABLE weir.weir_ledger ADD COLUMN region text")
    await ledger.add_many(3)
    ledger.sink()
    await ledger.copy()
    assert len(await ledger.rows()) == 3


@pytest.mark.parametrize("owns", ["schema", "database"])
async def test_a_role_that_owns_only_its_schema_is_enough(
    postgres: PostgresServer, redis_single: Single, database: str, owns: str
) -> None:
    name = database.rpartition("/")[2]
    role = f"r{uuid.uuid4().hex}"
    word = "p@ss/w:rd %41 #é"
    async with Ledger(redis_single.url, database) as ledger:
        await ledger.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{word}'")
        await ledger.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
        await ledger.execute(f"GRANT CONNECT, TEMPORARY ON DATABASE {name} TO {role}")
        if owns == "schema":
            await ledger.execute(f"CREATE SCHEMA weir AUTHORIZATION {role}")
        else:
            await ledger.execute(f"GRANT CREATE ON DATABASE {name} TO {role}")
        await ledger.add_many(3)
        address = postgres.url_of(role, None, name)
        ledger.sink(ledger_postgres_url=address, ledger_postgres_password=word)
        await ledger.copy()
        assert len(await ledger.rows()) == 3


async def test_what_another_try_does_not_help_says_what_to_do(
    postgres: PostgresServer, redis_single: Single, database: str
) -> None:
    name = database.rpartition("/")[2]
    role = f"r{uuid.uuid4().hex}"
    connection = await asyncpg.connect(database)
    await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'word'")
    await connection.close()
    for url, words in {
        postgres.url_of(role, "hush", name): "user or password are wrong",
        postgres.url_of("nobody", "hush", name): "user or password are wrong",
        postgres.url_of(role, "word", "nowhere"): "there is no such database",
        postgres.url_of(role, "word", name): "the role may not make or write its tables",
        postgres.url_of(role, "word", name) + "?channel_binding=hush": "a parameter after the ?",
        postgres.url_of(role, "word", name) + "?sslmode=hush": "a parameter of the address",
        postgres.url_of(role, "word", name).replace(f":{postgres.port}", ":hush"): "cannot be read as an",
    }.items():
        tables = Tables(url, password=None, schema="weir")
        with pytest.raises(ConfigurationError) as refused:
            await tables.cursors()
        assert words in refused.value.message
        assert "hush" not in refused.value.message
        await tables.close()


def test_tls_is_checked_as_the_address_or_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def outcome(url: str) -> str:
        tables = Tables(url, password=None, schema="weir")
        try:
            await tables.cursors()
        except Away as away:
            return away.reason
        except ConfigurationError as error:
            return error.message.partition("in: ")[2]
        finally:
            await tables.close()
        return "good"

    def told(url: str) -> str:
        return asyncio.run(outcome(url))

    with PostgresServer() as server:
        authority = server.insist_on_tls()
        by_name = server.url.replace("127.0.0.1", "localhost")
        assert told(by_name) == "good"
        assert told(f"{by_name}?sslmode=disable") == "this user may not come from here, or not without TLS"
        checked = f"?sslmode=verify-full&sslrootcert={authority}"
        assert told(by_name + checked) == "good"
        assert told(server.url + checked) == "SSLCertVerificationError", "another's name"
        # As the chart sets them.
        monkeypatch.setenv("PGSSLMODE", "verify-full")
        monkeypatch.setenv("PGSSLROOTCERT", str(authority))
        assert told(by_name) == "good"
        authority.unlink()
        assert told(by_name) == "FileNotFoundError"


async def test_the_record_of_a_process_that_was_not_gone_takes_the_abandoned_ones_place(
    redis_single: Servers, database: str
) -> None:
    lost = record("acme", id="0001", outcome=Outcome.INTERNAL_ERROR, error_code="abandoned")
    real = record("acme", id="0001", usage=Usage(3, 4))
    both = [record("acme", id="0002", error_code="abandoned"), record("acme", id="0002", usage=Usage(5, 6))]
    async with Ledger(redis_single.url, database) as ledger:
        await ledger.add(lost)
        ledger.sink()
        await ledger.copy()
        await ledger.add(real)
        for one in (*both, record("acme", id="0001", outcome=Outcome.INTERNAL_ERROR, error_code="abandoned")):
            await ledger.add(one)
        await ledger.copy()
        rows = await ledger.rows(more="ORDER BY id")
        found = [(row["id"], row["error_code"], row["input_tokens"]) for row in rows]
        assert found == [("0001", None, 3), ("0002", None, 5)]
