"""What an upstream refuses, as one of our errors: by an HTTP status, or in words below a status of 200."""

from __future__ import annotations

from typing import Any, Final

from service.errors import (
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    without_secrets,
)

_STATUSES: Final = {
    "context_length_exceeded": 400,
    "string_above_max_length": 400,
    "content_filter": 400,
    "content_policy_violation": 400,
    "invalid_prompt": 400,
    "invalid_request_error": 400,
    "insufficient_quota": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
}
"""By the `code` or `type` of an error without a status; whatever else is a fault of the upstream."""


def refusal(
    status: int,
    detail: dict[str, Any],
    *,
    retry_after_seconds: float | None = None,
    request_id: str | None = None,
) -> UpstreamError:
    """The error for an answer of a `status` other than 200; `detail` is its `error`, without secrets."""
    if status < 400:
        return UpstreamProtocolError(
            f"The upstream answered {status}, which is no answer to this.", upstream_request_id=request_id
        )
    if 400 <= status < 500 and status not in (401, 402, 403, 429):
        return UpstreamRejected(
            status, detail, retry_after_seconds=retry_after_seconds, upstream_request_id=request_id
        )
    kind, words = _FAULTS.get(status, (UpstreamError, f"The upstream failed ({status})."))
    return kind(words, retry_after_seconds=retry_after_seconds, upstream_request_id=request_id)


def reported(error: Any, secret: str | None = None) -> UpstreamError:
    """An error that came with a status of 200, in place of an answer or as a stream's first event.

    It is what the same words would have been with the status that belongs to them.
    """
    detail = cleaned(error, secret)
    status = _status_of(detail)
    if status is None:
        return failed_in_words(error, secret)
    return refusal(status, detail)


def failed_in_words(error: Any, secret: str | None = None) -> UpstreamError:
    """A failure of the upstream, told in its own words."""
    message = cleaned(error, secret).get("message")
    words = message if isinstance(message, str) and message else "no reason was given"
    return UpstreamError(f"The upstream reported an error: {words}")


def cleaned(error: Any, secret: str | None) -> dict[str, Any]:
    """The object of an OpenAI-like error without secrets; {} for what is none."""
    detail = {"message": error} if isinstance(error, str) else error
    if not isinstance(detail, dict):
        return {}
    return {
        name: without_secrets(value, secret) if isinstance(value, str) else value
        for name, value in detail.items()
    }


def _status_of(detail: dict[str, Any]) -> int | None:
    for name in ("status", "code", "type"):
        value = detail.get(name)
        if isinstance(value, str):
            value = int(value) if value.isascii() and value.isdigit() else _STATUSES.get(value)
        if isinstance(value, int) and 400 <= value < 600:  # OpenRouter numbers its codes by statuses
            return value
    return None


_FAULTS: Final[dict[int, tuple[type[UpstreamError], str]]] = {
    401: (UpstreamMisconfigured, "The model's provider refused this service's credentials (401)."),
    # Its caller has a 402 of its own, for budgets: this one is the operators' to mend.
    402: (UpstreamMisconfigured, "The model's provider wants this service to pay first (402)."),
    403: (UpstreamMisconfigured, "The model's provider refused this service's credentials (403)."),
    429: (UpstreamRateLimited, "The model's provider limits the rate of requests."),
    503: (UpstreamUnavailable, "The upstream is unavailable (503)."),
    504: (UpstreamTimeout, "The upstream reported a timeout (504)."),
}
