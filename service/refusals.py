"""What an upstream refuses, as one of our errors: by an HTTP status, or in words below a status of 200."""

from __future__ import annotations

from enum import StrEnum
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


class Failure(StrEnum):
    """Why a model could not answer, as far as another model may help."""

    CONTEXT_LENGTH = "context_length"
    CONTENT_FILTER = "content_filter"
    RATE_LIMIT = "rate_limit"
    UNAVAILABLE = "unavailable"


_MEANINGS: Final[dict[str, tuple[int, Failure | None]]] = {
    "context_length_exceeded": (400, Failure.CONTEXT_LENGTH),
    "string_above_max_length": (400, Failure.CONTEXT_LENGTH),
    "content_filter": (400, Failure.CONTENT_FILTER),
    "content_policy_violation": (400, Failure.CONTENT_FILTER),
    "invalid_prompt": (400, None),
    # The `type` of many codes that parameters have, and of those of an account, which are listed for that.
    "invalid_request_error": (400, None),
    "BadRequestError": (400, None),
    "invalid_api_key": (401, None),
    "authentication_error": (401, None),
    "account_deactivated": (401, None),
    "mismatched_organization": (401, None),
    "no_organization": (401, None),
    "billing_error": (402, None),
    "permission_error": (403, None),
    "insufficient_quota": (429, None),
    "rate_limit_error": (429, None),
    "rate_limit_exceeded": (429, None),
}
"""By the `code` or `type` of an error: the status that belongs to it, and whether another model may do."""
_TOO_LONG: Final = ("context length", "context window", "maximum context")
"""Words of servers whose errors have no code of their own: as `context_length_exceeded`."""
_TOO_LONG_IF_REFUSED: Final = "too many tokens"
"""The same under a status of refusal. Without one it may be a rate that is limited."""


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


def asked_too_much(detail: dict[str, Any]) -> Failure | None:
    """Why another model may answer a request that was refused with this `detail`; None if none would."""
    for name in ("code", "type"):
        _, failure = _MEANINGS.get(str(detail.get(name)), (0, None))
        if failure is not None:
            return failure
    return Failure.CONTEXT_LENGTH if _says(detail, *_TOO_LONG, _TOO_LONG_IF_REFUSED) else None


def _says(detail: dict[str, Any], *some: str) -> bool:
    message = str(detail.get("message")).lower()
    return any(words in message for words in some)


def _status_of(detail: dict[str, Any]) -> int | None:
    for name in ("status", "code", "type"):
        value = detail.get(name)
        if isinstance(value, str):
            value = int(value) if value.isascii() and value.isdigit() else _MEANINGS.get(value, (None,))[0]
        if isinstance(value, int) and 400 <= value < 600:  # OpenRouter numbers its codes by statuses
            return value
    return 400 if _says(detail, *_TOO_LONG) else None


_FAULTS: Final[dict[int, tuple[type[UpstreamError], str]]] = {
    401: (UpstreamMisconfigured, "The model's provider refused this service's credentials (401)."),
    # Its caller has a 402 of its own, for budgets: this one is the operators' to mend.
    402: (UpstreamMisconfigured, "The model's provider wants this service to pay first (402)."),
    403: (UpstreamMisconfigured, "The model's provider refused this service's credentials (403)."),
    429: (UpstreamRateLimited, "The model's provider limits the rate of requests."),
    503: (UpstreamUnavailable, "The upstream is unavailable (503)."),
    504: (UpstreamTimeout, "The upstream reported a timeout (504)."),
}
