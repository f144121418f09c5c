"""An upstream's error answer, or a failed attempt to get one, as one of our errors: for all adapters."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec

from service.errors import (
    StreamTruncated,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from service.refusals import cleaned, refusal

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,200}")
MAX_ERROR_BYTES: Final = 64 * 1024
MAX_RETRY_AFTER_SECONDS: Final = 3_600.0


def rejection(
    status: int, body: bytes, *, retry_after: str | None, request_id: str | None, secret: str | None
) -> UpstreamError:
    """The error for an HTTP answer of a `status` other than 200. `secret` never shows in its message."""
    return refusal(
        status, _detail(body, secret), retry_after_seconds=_seconds(retry_after), request_id=request_id
    )


def check_content_type(content_type: str, *, stream: bool, status: int) -> None:
    """Raises UpstreamProtocolError for an answer of a form that was not asked for."""
    wanted = "text/event-stream" if stream else "application/json"
    if not content_type.lower().startswith(wanted):
        raise UpstreamProtocolError(
            f"The upstream answered {status} with {content_type or 'no content type'}; "
            f"{wanted} was asked for."
        )


def clean_request_id(given: str | None) -> str | None:
    """An upstream's request id, if it can go into a header and a log line."""
    return given if given and _REQUEST_ID.fullmatch(given) else None


def unreachable(reason: str) -> UpstreamUnavailable:
    """`reason` is a word of ours, such as `refused`: drivers' texts name addresses."""
    return UpstreamUnavailable(f"The upstream cannot be reached ({reason}).")


def connect_timeout() -> UpstreamTimeout:
    return UpstreamTimeout("The upstream did not accept a connection in time.")


def broken_answer() -> UpstreamProtocolError:
    return UpstreamProtocolError("The connection to the upstream broke before the answer was whole.")


def broken_stream() -> StreamTruncated:
    return StreamTruncated("The connection to the upstream broke in the middle of the stream.")


def _detail(body: bytes, secret: str | None) -> dict[str, Any]:
    """The `error` object of an OpenAI-like error body; {} when there is none."""
    try:
        decoded = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    detail = decoded.get("error", decoded.get("detail", decoded)) if isinstance(decoded, dict) else None
    if isinstance(detail, list):  # FastAPI's list of what is wrong
        detail = msgspec.json.encode(detail).decode()
    return cleaned(detail, secret)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds, from either of its forms."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
        except (ValueError, OverflowError):
            return None
    return min(seconds, MAX_RETRY_AFTER_SECONDS) if seconds >= 0 else None
