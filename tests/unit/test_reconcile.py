"""What a provider exports, as it is read and set beside Weir's sums."""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.reconcile import COLUMNS, WHATS, Entry, Export, Report, Unreadable, as_json, compare, read, tell

NOV_1 = 1_793_491_200
DAY = 86_400


def written(directory: Path, content: Any, name: str = "export") -> Path:
    path = directory / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def bucket(day: int, *results: dict[str, Any]) -> dict[str, Any]:
    start = NOV_1 + day * DAY
    return {
        "object": "bucket",
        "start_time": start,
        "end_time": start + DAY,
        "results": list(results),
    }


def result(model: str | None, requests: int, given: int, taken: int, cached: int = 0) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": given,
        "output_tokens": taken,
        "input_cached_tokens": cached,
        "input_audio_tokens": 0,
        "num_model_requests": requests,
        "project_id": None,
        "model": model,
        "batch": None,
    }


def page(*buckets: dict[str, Any], more: bool = False) -> dict[str, Any]:
    return {"object": "page", "data": list(buckets), "has_more": more, "next_page": "x" if more else None}


def entry(day: str, model: str, **numbers: float | str) -> Entry:
    return Entry(day, model, {what: Decimal(number) for what, number in numbers.items()})


def usual(day: str, model: str, requests: int = 1) -> Entry:
    return entry(day, model, requests=requests, input_tokens=100 * requests, output_tokens=10 * requests)


def placed(report: Report) -> list[tuple[tuple[str, ...], str | None, bool]]:
    return [(one.place, one.only, one.within) for one in report.compared]


# -- reading -------------------------------------------------------------------------------------


def test_the_pages_of_openais_usage_are_read(tmp_path: Path) -> None:
    pages = [
        page(bucket(0, result("gpt-4o-2024-08-06", 3, 300, 30, 20), result("o3", 1, 5, 6)), more=True),
        page(bucket(1), bucket(2, result("o3", 2, 7, 8))),
    ]
    export = read(written(tmp_path, pages))
    assert [(e.day, e.model, int(e.numbers["requests"])) for e in export.entries] == [
        ("2026-11-01", "gpt-4o-2024-08-06", 3),
        ("2026-11-01", "o3", 1),
        ("2026-11-03", "o3", 2),
    ]
    assert export.entries[0] == entry(
        "2026-11-01",
        "gpt-4o-2024-08-06",
        requests=3,
        input_tokens=300,
        output_tokens=30,
        cached_input_tokens=20,
    )
    assert export.whats == ["requests", "input_tokens", "output_tokens", "cached_input_tokens"]


def test_one_page_and_buckets_alone_are_read_too(tmp_path: Path) -> None:
    one = bucket(0, result("o3", 1, 5, 6))
    assert read(written(tmp_path, page(one))) == read(written(tmp_path, [one]))


def test_openais_costs_are_read(tmp_path: Path) -> None:
    def cost(item: str | None, value: Any) -> dict[str, Any]:
        return {
            "object": "organization.costs.result",
            "amount": {"value": value, "currency": "usd"},
            "line_item": item,
        }

    days = page(
        bucket(0, cost("gpt-4o-2024-08-06, input", 0.1), cost("gpt-4o-2024-08-06, output", "0.2")),
        bucket(1, cost(None, 0.06)),
    )
    assert read(written(tmp_path, days)).entries == [
        entry("2026-11-01", "gpt-4o-2024-08-06", cost_usd="0.1"),
        entry("2026-11-01", "gpt-4o-2024-08-06", cost_usd="0.2"),
        entry("2026-11-02", "", cost_usd="0.06"),
    ]


def test_openais_dashboard_csv_is_read(tmp_path: Path) -> None:
    text = (
        "start_time,end_time,start_time_iso,model,num_model_requests,input_tokens,output_tokens,"
        "input_cached_tokens\n"
        f"{NOV_1},{NOV_1 + DAY},2026-11-01T00:00:00+00:00,gpt-4o,3,300,30,20\n"
    )
    assert read(written(tmp_path, text)).entries == [
        entry("2026-11-01", "gpt-4o", requests=3, input_tokens=300, output_tokens=30, cached_input_tokens=20)
    ]


def test_azures_cost_csv_is_read_by_day(tmp_path: Path) -> None:
    text = (
        "\ufeffUsageDate,ServiceName,Meter,Cost,CostUSD,Currency\r\n"
        '11/01/2026,Cognitive Services,"gpt 4o Inp, glbl",9.1,10.5,EUR\r\n'
        "2026-11-02,Cognitive Services,gpt 4o Outp,1,1.25,EUR\r\n"
    )
    export = read(written(tmp_path, text))
    assert export.entries == [
        entry("2026-11-01", "", cost_usd="10.5"),
        entry("2026-11-02", "", cost_usd="1.25"),
    ]
    report = compare(export, [entry("2026-11-01", "gpt-4o", **dict.fromkeys(WHATS, 10.5))])
    assert report.by == ("day",)
    assert placed(report) == [(("2026-11-01",), None, True), (("2026-11-02",), "provider", False)]


@pytest.mark.parametrize(
    ("day", "read_as"),
    [
        ("2026-11-01", "2026-11-01"),
        ("20261101", "2026-11-01"),
        ("11/01/2026", "2026-11-01"),
        ("11/1/2026 12:00:00 AM", "2026-11-01"),
        (str(NOV_1 + DAY - 1), "2026-11-01"),
        ("2026-11-01T23:30:00-02:00", "2026-11-02"),
        ("2026-11-01 23:30", "2026-11-01"),
    ],
)
def test_days_are_read_in_the_forms_that_exports_have(tmp_path: Path, day: str, read_as: str) -> None:
    assert read(written(tmp_path, f"Date;Model Name;Cost\n{day};m;$1,234.50\n")).entries == [
        entry(read_as, "m", cost_usd="1234.5")
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("date,model,requests\n2026-11-01,m,1\n2026-11-02,m,many\n", "line 3, column 'requests': 'many'"),
        ("date,model,requests\nyesterday,m,1\n", "line 2, column 'date': 'yesterday' is no date"),
        ("date,model,requests\n2026-11-01,m\n", "line 2: it has no column 'requests'"),
        ("date,model,requests\n2026-11-01,m,NaN\n", "'NaN' is no number"),
        ("when,model,requests\n1,2,3\n", "line 1: no column is named date"),
        ("date,model,colour\n1,2,3\n", "line 1: no column of requests, tokens or cost: date, model, colour"),
        ("date,cost,currency\n2026-11-01,3,EUR\n", "line 2, column 'currency': a cost in 'EUR'"),
        ("date,model,requests\n", "it holds no usage"),
        ("", "line 1"),
        ('{"data": [', "line 1, column 11: it is not JSON"),
        ('{"object": "page"}', "neither `data` nor `results`"),
        ('{"data": [{"start_time": 1, "results": [{"model": "m"}]}]}', "page 0, bucket 0: ValueError"),
        ('{"data": [{"results": []}]}', "page 0, bucket 0: KeyError: 'start_time'"),
        ('{"data": [7]}', "page 0, bucket 0: TypeError"),
        (
            '[{"start_time": 1, "results": [{"amount": {"value": 1, "currency": "eur"}}]}]',
            "bucket 0: ValueError: a cost in eur",
        ),
        (json.dumps(page(more=True)), "its last page says `has_more`"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(Unreadable) as caught:
        read(written(tmp_path, text))
    assert told in str(caught.value)
    assert str(tmp_path / "export") in str(caught.value)


def test_no_file_and_no_text_are_told(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="No such file"):
        read(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Unreadable, match="not UTF-8"):
        read(tmp_path / "bytes")


@given(st.text(max_size=300))
def test_any_text_is_read_or_is_unreadable(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for content in (text, "date,requests\n" + text, '{"data": [' + text + "]}"):
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
        with suppress(Unreadable):
            assert read(path).entries


# -- comparing -----------------------------------------------------------------------------------


def test_the_same_on_both_sides_is_within() -> None:
    sides = [usual("2026-11-01", "a", 3), usual("2026-11-02", "b", 2)]
    report = compare(Export("x", sides), list(sides))
    assert report.within
    assert placed(report) == [(("2026-11-01", "a"), None, True), (("2026-11-02", "b"), None, True)]
    assert report.total.numbers["requests"].weir == 5


@pytest.mark.parametrize(
    ("weir", "within"), [(1000, True), (1005, True), (995, True), (1006, False), (994, False)]
)
def test_the_tolerance_is_a_share_of_the_providers_number(weir: int, within: bool) -> None:
    export = Export("x", [entry("2026-11-01", "a", input_tokens=1000)])
    report = compare(export, [entry("2026-11-01", "a", input_tokens=weir)])
    assert report.within is within
    difference = report.compared[0].numbers["input_tokens"]
    assert difference.absolute == weir - 1000
    assert difference.percent == Decimal(weir - 1000) / 10


def test_a_cost_that_was_rounded_to_cents_is_the_same() -> None:
    export = Export("x", [entry("2026-11-01", "a", cost_usd="0.01")])
    assert compare(export, [entry("2026-11-01", "a", cost_usd="0.0149")]).within
    assert not compare(export, [entry("2026-11-01", "a", cost_usd="0.0151")]).within


def test_what_only_one_side_has_is_told() -> None:
    export = Export("x", [usual("2026-11-01", "a"), usual("2026-11-02", "a")])
    report = compare(export, [usual("2026-11-01", "a"), usual("2026-11-01", "b")])
    assert not report.within
    assert placed(report) == [
        (("2026-11-01", "a"), None, True),
        (("2026-11-01", "b"), "Weir", False),
        (("2026-11-02", "a"), "provider", False),
    ]
    assert report.compared[1].numbers["requests"].percent is None


def test_what_the_file_does_not_tell_is_not_compared() -> None:
    export = Export("x", [entry("2026-11-01", "a", requests=1)])
    report = compare(export, [usual("2026-11-01", "a")])
    assert report.within
    assert list(report.compared[0].numbers) == ["requests"]


def test_a_days_small_differences_are_no_more_when_the_days_are_one() -> None:
    export = Export("x", [usual("2026-11-01", "a", 3), usual("2026-11-02", "a", 5)])
    weir = [usual("2026-11-01", "a", 4), usual("2026-11-02", "a", 4)]
    assert not compare(export, weir).within
    assert compare(export, weir, by=("model",)).within


def test_a_dated_name_is_joined_with_the_name_that_callers_use() -> None:
    export = Export(
        "x", [usual("2026-11-01", "gpt-4o-2024-08-06", 2), usual("2026-11-01", "claude-20250101")]
    )
    report = compare(export, [usual("2026-11-01", "gpt-4o", 2), usual("2026-11-01", "claude")])
    assert report.within
    assert report.joined == [
        "claude-20250101 -> claude (its date left out)",
        "gpt-4o-2024-08-06 -> gpt-4o (its date left out)",
    ]


def test_callers_may_have_named_it_in_both_ways() -> None:
    export = Export("x", [usual("2026-11-01", "gpt-4o-2024-08-06", 3)])
    weir = [usual("2026-11-01", "gpt-4o", 2), usual("2026-11-01", "gpt-4o-2024-08-06", 1)]
    report = compare(export, weir)
    assert report.within
    assert report.joined == ["gpt-4o-2024-08-06 -> gpt-4o + gpt-4o-2024-08-06 (its date left out)"]


def test_an_exact_name_is_left_as_it_is() -> None:
    sides = [usual("2026-11-01", "gpt-4o", 2), usual("2026-11-01", "gpt-4o-2024-08-06", 1)]
    report = compare(Export("x", sides), list(sides), names={"gpt-4o": ["fast"]})
    assert report.within
    assert report.joined == []
    assert len(report.compared) == 2


def test_a_mapped_name_is_joined_with_all_that_it_is_mapped_to() -> None:
    export = Export("x", [usual("2026-11-01", "gpt-4o", 3), usual("2026-11-01", "o3", 1)])
    weir = [usual("2026-11-01", "fast", 2), usual("2026-11-01", "chat"), usual("2026-11-01", "o3")]
    report = compare(export, weir, names={"gpt-4o": ["fast", "chat"]})
    assert report.within
    assert report.joined == ["gpt-4o -> fast + chat (mapped)"]


entries = st.lists(
    st.builds(
        Entry,
        day=st.sampled_from(["2026-11-01", "2026-11-02"]),
        model=st.sampled_from(["a", "a-2026-01-01", "b", "c-20260101"]),
        numbers=st.fixed_dictionaries({what: st.integers(0, 1000).map(Decimal) for what in WHATS}),
    ),
    min_size=1,
    max_size=12,
)


@given(theirs=entries, ours=entries, by=st.sampled_from([("day", "model"), ("day",), ("model",)]))
def test_nothing_is_lost_between_the_sides(
    theirs: list[Entry], ours: list[Entry], by: tuple[str, ...]
) -> None:
    report = compare(Export("x", theirs), ours, by=by)
    for what in WHATS:
        assert sum(one.numbers[what].weir for one in report.compared) == sum(e.numbers[what] for e in ours)
        told = sum(one.numbers[what].provider for one in report.compared)
        assert told == sum(e.numbers[what] for e in theirs) == report.total.numbers[what].provider
    assert compare(Export("x", theirs), theirs, by=by).within
    json.dumps(as_json(report))
    assert all(len(line) <= 100 for line in tell(report, Decimal("0.005")))


def test_the_report_says_what_is_where() -> None:
    export = Export("x", [usual("2026-11-01", "a", 1_000_000), usual("2026-11-02", "a")])
    lines = list(tell(compare(export, [usual("2026-11-01", "a", 900_000)]), Decimal("0.005")))
    assert lines[1] == "2026-11-01  a"
    assert lines[2].split() == ["requests", "900,000", "1,000,000", "-100,000", "-10.00", "!"]
    assert lines[5] == "2026-11-02  a  (only the provider has it)"
    assert lines[-1] == ("2 compared, 2 differ by more than 0.5 % (!); only Weir has 0, only the provider 1")


def test_the_docs_name_every_column_that_is_known() -> None:
    page = (Path(__file__).parents[2] / "docs/usage.md").read_text()
    for names in COLUMNS.values():
        assert all(f"`{name}`" in page for name in names)
