"""Every error knows what it means for the caller."""

from __future__ import annotations

import re

import pytest

from service.domain import Outcome
from service.errors import (
    AuthenticationFailed,
    BodyTooLarge,
    CallerGone,
    ConfigurationError,
    InternalError,
    InvalidRequest,
    UpstreamRejected,
    WeirError,
    catalogue,
)

ALL = catalogue()


@pytest.mark.parametrize("error", ALL, ids=lambda e: e.__name__)
def test_each_error_has_status_code_type_and_advice(error: type[WeirError]) -> None:
    assert 400 <= error.status <= 599
    assert re.fullmatch(r"[a-z_]+", error.code)
    assert re.fullmatch(r"[a-z_]+_error", error.type)
    assert error.advice.endswith(".")
    assert isinstance(error.outcome, Outcome)
    assert error.outcome is not Outcome.SUCCESS


@pytest.mark.parametrize("error", [e for e in ALL if e is not UpstreamRejected], ids=lambda e: e.__name__)
def test_each_error_is_written_as_openai_writes_its_own(error: type[WeirError]) -> None:
    made = error("What happened.", param="field", retry_after_seconds=2.0)
    assert made.body() == {
        "error": {"message": "What happened.", "type": error.type, "param": "field", "code": error.code}
    }
    assert made.retry_after_seconds == 2.0
    assert str(made) == "What happened."


def test_the_catalogue_has_each_error_once_and_none_that_no_caller_meets() -> None:
    assert len(set(ALL)) == len(ALL)
    assert {AuthenticationFailed, BodyTooLarge, InternalError, InvalidRequest, UpstreamRejected} <= set(ALL)
    assert not {CallerGone, ConfigurationError, WeirError} & set(ALL)


def test_errors_of_one_status_and_code_agree_on_whether_a_retry_helps() -> None:
    by_code: dict[tuple[int, str], set[bool]] = {}
    for error in ALL:
        by_code.setdefault((error.status, error.code), set()).add(error.retry)
    assert all(len(answers) == 1 for answers in by_code.values())


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ({}, ("The upstream answered 400.", "invalid_request_error", None, "upstream_rejected")),
        ({"message": "No.", "code": "c"}, ("No.", "invalid_request_error", None, "c")),
        (
            {"message": "No.", "type": "t", "param": "p", "code": None, "inner": "secret"},
            ("No.", "t", "p", None),
        ),
        ({"message": "No.", "code": 400}, ("No.", "invalid_request_error", None, "400")),
        ({"message": 7}, ("The upstream answered 400.", "invalid_request_error", None, "upstream_rejected")),
        ({"message": ""}, ("The upstream answered 400.", "invalid_request_error", None, "upstream_rejected")),
    ],
)
def test_a_refusal_carries_the_upstreams_own_words_and_nothing_unknown(
    detail: dict[str, object], expected: tuple[object, ...]
) -> None:
    body = UpstreamRejected(400, detail).body()["error"]
    assert (body["message"], body["type"], body["param"], body["code"]) == expected
    assert set(body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("status", "retry"), [(400, False), (404, False), (408, True), (409, True)])
def test_a_refusal_keeps_its_status_and_may_be_retried_where_time_helps(status: int, retry: bool) -> None:
    error = UpstreamRejected(status, {})
    assert (error.status, error.retry, error.outcome) == (status, retry, Outcome.CLIENT_ERROR)
