"""What was used, told by the running service and reconciled; a tenant's conversations as a whole."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog

from service.__main__ import main
from service.api import usage as usage_module
from service.auth import hash_key
from service.config import KeyConfig
from service.domain import CacheUse, Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.errors import StateUnavailable
from service.stores.memory_book import MemoryUsageBook
from tests.redis_servers import Single
from tests.running import RunningWeir, configuration

DAY, HOUR = 86_400, 3_600
TODAY = int(time.time() // DAY) * DAY
ADMIN, ANNA, BERT, OTHER = (f"weir-key-of-{name}" for name in ("admin", "anna", "bert", "other"))
KEYS = (
    KeyConfig(name="admin", tenant="operators", sha256=hash_key(ADMIN), admin=True),
    KeyConfig(name="anna", tenant="team", sha256=hash_key(ANNA)),
    KeyConfig(name="bert", tenant="team", sha256=hash_key(BERT)),
    KeyConfig(name="other", tenant="other/team", sha256=hash_key(OTHER)),
)
SUMS = ("requests", "errors", "input_tokens", "output_tokens", "cost_usd")


def day(days_ago: int = 0) -> str:
    return f"{datetime.fromtimestamp(TODAY - days_ago * DAY, tz=UTC):%Y-%m-%d}"


@pytest.fixture
def guarded() -> Iterator[RunningWeir]:
    with RunningWeir(configuration(keys=KEYS, simulator_tokens_per_second=100_000)) as weir:
        yield weir


Ask = Callable[..., httpx2.Response]


@pytest.fixture
def ask(guarded: RunningWeir) -> Ask:
    return asking(guarded)


def asking(weir: RunningWeir) -> Ask:
    def ask(key: str = ANNA, path: str = "usage", method: str = "GET", **query: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}", **query.pop("headers", {})}
        query = {name.rstrip("_"): value for name, value in query.items()}
        url = f"{weir.url}/api/v1/{path}"
        return httpx2.request(method, url, params=query, headers=headers, timeout=20)

    return ask


def used(
    key: str = "anna",
    tenant: str = "team",
    model: str = "gpt-4o",
    *,
    days_ago: int = 0,
    hour: int = 0,
    **fields: Any,
) -> RequestRecord:
    usual: dict[str, Any] = {
        "outcome": Outcome.SUCCESS,
        "usage": Usage(100, 10, cached_input_tokens=30, reasoning_tokens=5),
        "cost": Cost(0.000000001, "test"),
        "started_at": TODAY - days_ago * DAY + hour * HOUR + 0.5,
    }
    return RequestRecord(
        "id",
        "request",
        "/v1/chat/completions",
        Operation.CHAT,
        Principal(key, tenant),
        request_model=model,
        **usual | fields,
    )


def fill(weir: RunningWeir, *records: RequestRecord) -> None:
    """Into the book, as if they had been settled at their time."""
    book = weir.parts.adapters.book
    assert isinstance(book, MemoryUsageBook)
    weir.in_loop(lambda: list(map(book.add, records)))


def good(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = json.loads(answer.text)
    return report


def refused(answer: httpx2.Response) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


# -- what is told --------------------------------------------------------------------------------


def test_what_the_sdk_used_is_told(guarded: RunningWeir, ask: Ask) -> None:
    client = guarded.sdk(api_key=ANNA)
    answer = client.chat.completions.create(model="simulator", messages=[{"role": "user", "content": "Hi"}])
    assert answer.usage is not None
    guarded.records()
    report = good(ask())
    (row,) = report["rows"]
    assert (row["day"], row["model"], row["requests"], row["errors"]) == (day(), "simulator", 1, 0)
    assert (row["input_tokens"], row["output_tokens"]) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )
    assert row["total_tokens"] == answer.usage.total_tokens
    assert report["totals"] == {name: row[name] for name in report["totals"]}
    assert report["group_by"] == ["day", "model"]
    assert (report["from"], report["to"]) == (f"{day(29)}T00:00:00Z", f"{day(-1)}T00:00:00Z")


def test_all_that_is_summed_is_told(guarded: RunningWeir, ask: Ask) -> None:
    fill(
        guarded,
        used(),
        used(cost=Cost(None, "unpriced"), cache=CacheUse.HIT),
        used(outcome=Outcome.TIMEOUT, usage=None, cost=Cost(None, "unpriced")),
        used(outcome=Outcome.CLIENT_DISCONNECTED, cost=Cost(2.5, "test")),
    )
    answer = ask(group_by="model")
    report = good(answer)
    assert report["rows"] == [
        {"model": "", **dict.fromkeys(report["totals"], 0), "requests": 1, "errors": 1},
        {
            "model": "gpt-4o",
            "requests": 3,
            "errors": 0,
            "input_tokens": 300,
            "output_tokens": 30,
            "cached_input_tokens": 90,
            "reasoning_tokens": 15,
            "total_tokens": 330,
            "cost_usd": 2.500000001,
            "unpriced_requests": 1,
            "cache_hits": 1,
        },
    ]
    assert '"cost_usd":2.500000001' in answer.text


def test_a_sum_of_any_size_has_all_of_its_digits(guarded: RunningWeir, ask: Ask) -> None:
    fill(guarded, used(cost=Cost(123_456_789.0, "test")), used())
    assert '"cost_usd":123456789.000000001' in ask().text


def test_groups_are_those_that_are_asked_for_in_their_order(guarded: RunningWeir, ask: Ask) -> None:
    fill(guarded, used(), used("bert", days_ago=1), used(model="o3"), used(model="o3", days_ago=1))
    names = [list(row.values())[:2] for row in good(ask(group_by="model,day"))["rows"]]
    assert names == [["gpt-4o", day(1)], ["gpt-4o", day()], ["o3", day(1)], ["o3", day()]]
    names = [list(row.values())[:2] for row in good(ask(group_by="key,tenant"))["rows"]]
    assert names == [["anna", "team"], ["bert", "team"]]
    assert [row["requests"] for row in good(ask(group_by=""))["rows"]] == [4]


def test_a_time_is_from_its_beginning_and_without_its_end(guarded: RunningWeir, ask: Ask) -> None:
    fill(guarded, *(used(days_ago=days) for days in range(4)))
    report = good(ask(from_=day(2), to=day(), group_by="day"))
    assert [row["day"] for row in report["rows"]] == [day(2), day(1)]
    report = good(ask(from_=f"{day(2)}T00:00:00Z", to=f"{day(1)}T00:00:00+00:00", group_by="day"))
    assert [row["day"] for row in report["rows"]] == [day(2)]


def test_hours_are_told_and_so_are_days_of_another_zone(guarded: RunningWeir, ask: Ask) -> None:
    fill(guarded, used(days_ago=1, hour=22), used(days_ago=1, hour=23), used(hour=22), used(hour=23))
    report = good(ask(from_=day(1), group_by="hour"))
    assert [row["hour"] for row in report["rows"]] == [
        f"{day(days)}T{hour}:00:00Z" for days in (1, 0) for hour in (22, 23)
    ]
    # A day of Berlin in winter.
    report = good(ask(from_=f"{day()}T00:00:00+01:00", to=f"{day(-1)}T00:00:00+01:00", group_by=""))
    assert (report["unit"], report["totals"]["requests"]) == ("hour", 2)


def test_filters_leave_the_rest_out(guarded: RunningWeir, ask: Ask) -> None:
    fill(
        guarded, used(), used("bert"), used(model="o3"), used(model="x", outcome=Outcome.TIMEOUT, usage=None)
    )
    assert good(ask(key_="bert"))["totals"]["requests"] == 1
    assert good(ask(ANNA, model="gpt-4o"))["totals"]["requests"] == 2
    assert good(ask(ANNA, model=""))["totals"]["errors"] == 1
    assert good(ask(model="nothing"))["rows"] == []


# -- who is told ---------------------------------------------------------------------------------


def test_a_tenant_sees_itself_and_an_admin_sees_all(guarded: RunningWeir, ask: Ask) -> None:
    fill(guarded, used(), used("other", "other/team"), used("other", "other/team"))
    by = {"group_by": "tenant"}
    assert [row["tenant"] for row in good(ask(ANNA, **by))["rows"]] == ["team"]
    assert [row["tenant"] for row in good(ask(ANNA, **by, tenant="team"))["rows"]] == ["team"]
    status, param, _ = refused(ask(ANNA, **by, tenant="other/team"))
    assert (status, param) == (403, "tenant")
    rows = good(ask(ADMIN, **by))["rows"]
    assert [(row["tenant"], row["requests"]) for row in rows] == [("other/team", 2), ("team", 1)]
    assert good(ask(ADMIN, tenant="other/team"))["totals"]["requests"] == 2
    assert good(ask(ADMIN, tenant="nobody"))["rows"] == []
    assert ask("weir-nobody").status_code == 401


def test_without_keys_everybody_is_the_default_tenant() -> None:
    with RunningWeir(configuration()) as weir:
        fill(weir, used("anonymous", "default"), used())
        ask = asking(weir)
        assert good(ask(group_by="tenant"))["rows"][0]["tenant"] == "default"
        assert good(ask())["totals"]["requests"] == 1
        assert ask(tenant="team").status_code == 403


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "param", "told"),
    [
        ({"group_by": "colour"}, "group_by", "'colour' is none of tenant, key, model, day, hour"),
        ({"group_by": "day,day"}, "group_by", "twice"),
        ({"from_": "soon"}, "from", "a date like 2026-11-01"),
        ({"to": f"{day()}T00:30:00Z"}, "to", "full hour"),
        ({"from_": day(), "to": day()}, "from", "before `to`"),
        ({"from_": day(400), "to": day(-1)}, "from", "more than 400 days before"),
        ({"from_": "2020-01-01", "to": "2020-02-01"}, "from", "too long ago"),
        ({"from_": day(36), "to": day(), "group_by": "hour"}, "from", "more than 35 days before"),
        ({"from_": day(50), "to": day(40), "group_by": "hour"}, "from", "kept for 35 days"),
        ({"unit": "day", "group_by": "hour"}, "group_by", "unit=hour"),
        ({"unit": "day", "from_": f"{day()}T01:00:00Z"}, "from", "a whole day"),
        ({"format": "xml"}, "format", "json"),
        ({"form": "csv"}, "form", "not permitted"),
    ],
)
def test_what_cannot_be_told_is_refused_with_its_field(
    ask: Ask, query: dict[str, str], param: str, told: str
) -> None:
    status, named, message = refused(ask(**query))
    assert (status, named) == (422, param)
    assert told in message


def test_too_many_rows_are_refused_and_not_cut(
    guarded: RunningWeir, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(guarded, *(used(model=f"m{number}") for number in range(6)))
    monkeypatch.setattr(usage_module, "MOST_ROWS", 5)
    status, _, message = refused(ask())
    assert status == 422
    assert "more than 5 rows: ask for a shorter time" in message
    assert good(ask(group_by="day"))["totals"]["requests"] == 6
    monkeypatch.setattr(usage_module, "MOST_READ", 5)
    assert "made of more than 5 sums" in refused(ask(group_by="day"))[2]


def test_many_rows_come_whole(guarded: RunningWeir, ask: Ask) -> None:
    """More than are written in one turn."""
    fill(guarded, *(used(model=f"m{number:04d}") for number in range(1_700)))
    rows = good(ask())["rows"]
    assert [row["model"] for row in rows] == [f"m{number:04d}" for number in range(1_700)]
    assert len(list(csv.reader(io.StringIO(ask(format="csv").text)))) == 1_701


# -- CSV -----------------------------------------------------------------------------------------


def test_csv_says_the_same(guarded: RunningWeir, ask: Ask) -> None:
    fill(guarded, used(model='with "quotes", commas\r\nand lines'), used(), used(days_ago=3))
    for answer in (ask(format="csv"), ask(headers={"Accept": "text/csv"})):
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert answer.headers["content-disposition"] == (
            f'attachment; filename="usage_{day(29)}_{day(-1)}.csv"'
        )
        assert answer.text.split("\r\n")[0].startswith("day,model,requests,errors,input_tokens")
        rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
        expected = good(ask(format="json", headers={"Accept": "text/csv"}))["rows"]
        assert [row["model"] for row in rows] == [row["model"] for row in expected]
        for told, one in zip(expected, rows, strict=True):
            assert list(told) == list(one)
            for name in SUMS:
                assert float(one[name]) == told[name]
        assert rows[0]["cost_usd"] == "0.000000001"


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_is_a_formula(guarded: RunningWeir, ask: Ask, begin: str) -> None:
    fill(guarded, used(model=f"{begin}cmd|' /C calc'!A0"))
    (row,) = csv.DictReader(io.StringIO(ask(format="csv").text, newline=""))
    assert row["model"] == f"'{begin}cmd|' /C calc'!A0"


# -- a tenant's conversations --------------------------------------------------------------------


def conversing(weir: RunningWeir, key: str, message: str, **fields: Any) -> str:
    answer = httpx2.post(
        f"{weir.url}/api/v1/chat",
        json={"message": message, **fields},
        headers={"Authorization": f"Bearer {key}"},
        timeout=20,
    )
    assert answer.status_code == 200, answer.text
    begun: str = answer.json()["conversation_id"]
    return begun


def test_an_admin_exports_and_erases_a_tenants_conversations(guarded: RunningWeir, ask: Ask) -> None:
    first = conversing(guarded, ANNA, "Hello!", system_prompt="Be brief.")
    second = conversing(guarded, BERT, "Grüße\nan alle")
    third = conversing(guarded, OTHER, "Hi")
    answer = ask(ADMIN, "tenants/team/conversations/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = {line["id"]: line for line in map(json.loads, answer.text.splitlines())}
    assert {name: line["key"] for name, line in lines.items()} == {first: "anna", second: "bert"}
    shown = good(ask(ANNA, f"conversations/{first}"))
    assert lines[first] == {**shown, "key": "anna"}
    assert lines[first]["system_prompt"] == "Be brief."
    assert lines[second]["messages"][0]["content"] == "Grüße\nan alle"

    erased = good(ask(ADMIN, "tenants/team/conversations", "DELETE"))
    assert erased == {"tenant": "team", "conversations": 2, "cached_answers": 0, "idempotent_answers": 0}
    assert ask(ANNA, f"conversations/{first}").status_code == 404
    assert ask(ADMIN, "tenants/team/conversations/export").text == ""
    assert ask(OTHER, f"conversations/{third}").status_code == 200
    # A tenant's name may hold a slash.
    assert json.loads(ask(ADMIN, "tenants/other%2Fteam/conversations/export").text)["id"] == third


@pytest.mark.parametrize("key", [ANNA, OTHER])
def test_nobody_else_does(guarded: RunningWeir, ask: Ask, key: str) -> None:
    begun = conversing(guarded, ANNA, "Hello!")
    assert ask(key, "tenants/team/conversations/export").status_code == 403
    assert ask(key, "tenants/team/conversations", "DELETE").status_code == 403
    assert ask(ANNA, f"conversations/{begun}").status_code == 200


def test_an_export_that_ends_early_says_so(
    guarded: RunningWeir, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversing(guarded, ANNA, "Hello!")
    kept = guarded.parts.adapters.conversations
    whole = kept.of_tenant

    async def broken(tenant: str) -> Any:
        async for conversation in whole(tenant):
            yield conversation
        raise StateUnavailable("The store of shared state is away.")

    monkeypatch.setattr(kept, "of_tenant", broken)
    lines = [json.loads(line) for line in ask(ADMIN, "tenants/team/conversations/export").text.splitlines()]
    assert lines[0]["key"] == "anna"
    assert lines[1]["error"]["code"] == "state_unavailable"

    async def broken_at_once(tenant: str) -> Any:
        raise StateUnavailable("The store of shared state is away.")
        yield

    monkeypatch.setattr(kept, "of_tenant", broken_at_once)
    assert ask(ADMIN, "tenants/team/conversations/export").status_code == 503


# -- on Redis ------------------------------------------------------------------------------------


def test_all_pods_tell_the_same_and_503_without_redis() -> None:
    options = {"keys": KEYS, "simulator_tokens_per_second": 100_000}
    with Single() as redis, RunningWeir(configuration(redis_url=redis.url, **options)) as one:  # type: ignore[arg-type]
        with RunningWeir(configuration(redis_url=redis.url, **options)) as two:  # type: ignore[arg-type]
            for weir in (one, two):
                begun = conversing(weir, ANNA, "Hello!")
                weir.records()
            reports = [good(asking(weir)(ADMIN, group_by="tenant,key,day")) for weir in (one, two)]
            assert reports[0] == reports[1]
            (row,) = reports[0]["rows"]
            assert (row["tenant"], row["key"], row["day"], row["requests"]) == ("team", "anna", day(), 2)
            assert row["total_tokens"] == sum(
                record.usage.total_tokens for weir in (one, two) for record in weir.records() if record.usage
            )
            redis.server.command("SET", "weir:{team}:cache:answer", "x")
            export = asking(two)(ADMIN, "tenants/team/conversations/export").text.splitlines()
            assert begun in {json.loads(line)["id"] for line in export}
            erased = good(asking(two)(ADMIN, "tenants/team/conversations", "DELETE"))
            assert erased == {
                "tenant": "team",
                "conversations": 2,
                "cached_answers": 1,
                "idempotent_answers": 0,
            }
            assert asking(one)(ANNA, f"conversations/{begun}").status_code == 404
        redis.kill()
        for path, method in (
            ("usage", "GET"),
            ("tenants/team/conversations/export", "GET"),
            ("tenants/team/conversations", "DELETE"),
        ):
            answer = asking(one)(ADMIN, path, method)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "state_unavailable")
            assert "retry-after" in answer.headers


# -- reconciliation ------------------------------------------------------------------------------


@pytest.fixture
def reconcile(
    guarded: RunningWeir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., int]]:
    """The command, with nothing else on standard output: what Weir logs goes elsewhere."""
    monkeypatch.setenv("WEIR_API_KEY", ADMIN)
    monkeypatch.setenv("WEIR_URL", guarded.url)

    def run(text: str, *options: str) -> int:
        (tmp_path / "export.csv").write_text(text)
        return main(["reconcile", str(tmp_path / "export.csv"), *options])

    with structlog.testing.capture_logs():
        yield run


HEAD = "date,model,requests,input_tokens,output_tokens,cached_input_tokens,cost\n"


def test_a_providers_books_that_agree_are_within(
    guarded: RunningWeir, reconcile: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(
        guarded,
        used(days_ago=1, cost=Cost(0.5, "test")),
        used("other", "other/team", days_ago=1, cost=Cost(0.25, "test")),
        used(days_ago=1, outcome=Outcome.TIMEOUT, usage=None),
        used(days_ago=1, cache=CacheUse.HIT, usage=None),
        used(days_ago=5),
    )
    text = f"{HEAD}{day(1)},gpt-4o-2024-08-06,2,200,20,60,0.75\n"
    assert reconcile(text) == 0
    told = capsys.readouterr().out
    assert "joined: gpt-4o-2024-08-06 -> gpt-4o (its date left out)" in told
    assert "1 compared, 0 differ by more than 0.5 % (!)" in told
    assert reconcile(text, "--tenant", "team") == 1
    assert reconcile(text, "--tenant", "team", "--tolerance", "50%", "--by", "day") == 0


def test_differences_are_printed_and_are_1(
    guarded: RunningWeir, reconcile: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(guarded, used(model="fast", days_ago=1), used(model="o3", days_ago=2))
    text = f"{HEAD}{day(1)},gpt-4o,1,110,10,30,0\n"
    assert reconcile(text, "--map", "gpt-4o=fast", "--from", day(2)) == 1
    told = capsys.readouterr().out
    assert f"{day(2)}  o3  (only Weir has it)" in told
    assert "joined: gpt-4o -> fast (mapped)" in told
    (line,) = [line for line in told.splitlines() if "-9.09" in line]
    assert line.split() == ["input_tokens", "100", "110", "-10", "-9.09", "!"]
    assert reconcile(text, "--map", "gpt-4o=fast", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["compared"][0]["numbers"]["input_tokens"] == {
        "weir": 100.0,
        "provider": 110.0,
        "difference": -10.0,
        "percent": -9.0909,
        "within": False,
    }


def test_what_cannot_be_compared_is_2_and_told(
    reconcile: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{HEAD}{day(1)},gpt-4o,1,110,10,30,0\n"
    for content, options, told in (
        (f"{HEAD}{day(1)},gpt-4o,x,1,1,1,1\n", (), "line 2, column 'requests': 'x' is no number"),
        (text, ("--from", day()), "it holds nothing from"),
        (text, ("--url", "http://127.0.0.1:9"), "http://127.0.0.1:9: "),
        (text, ("--api-key", "wrong"), "401: The API key is not known here."),
        (f"{HEAD}2020-01-01,gpt-4o,1,1,1,1,0\n", (), "422: from: it is too long ago"),
        (text, ("--api-key", ANNA, "--tenant", "x"), "403: Another tenant's usage"),
    ):
        assert reconcile(content, *options) == 2
        assert told in capsys.readouterr().err
    for options in (("--map", "x"), ("--tolerance", "much"), ("--from", "soon"), ("--by", "colour")):
        with pytest.raises(SystemExit) as caught:
            reconcile(text, *options)
        assert caught.value.code == 2
