"""One tree of errors. Each knows its HTTP status, its code, its outcome and whether a retry helps.

Drivers' errors (aiohttp, openai, ...) become one of these once, in the adapter that met them.
Messages are for the caller: they say what happened and what to do, and hold no key, no address of
the inside and no text of a prompt.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

from service.credentials import CREDENTIAL
from service.domain import Outcome, Standing

WORDS_MOST_LETTERS: Final = 2_000
"""Of an upstream's own words."""
_LABEL: Final = r"[a-z0-9-]{1,63}"
_PATH: Final = r"(?:/[^\s'\"]*)?"
_URL: Final = rf"\bhttps?://(?:[^\s/@'\"]+@[^\s/'\"]+|\[[^\s/'\"]+|[\w.-]+:\d+|[\w-]+(?!\.?[\w-])){_PATH}"
"""One that is of no use to strangers: with credentials, a port, an IPv6 address, or a host without a dot."""
_IPV4: Final = (
    r"(?:10|127)(?:\.\d{1,3}){3}|(?:192\.168|169\.254|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2}"
    r"|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7])(?:\.\d{1,3}){2}|0(?:\.0){3}"
)
_HOST: Final = (
    rf"(?:\bhttps?://)?(?<![\w.-])(?:localhost|(?:{_LABEL}\.){{1,9}}(?:svc|internal|local|corp|intranet|lan)|{_IPV4})"
    rf"(?![\w-])(?::\d+)?{_PATH}"
)
_SAID_SO: Final = "|".join(
    (
        "(?<=://)",
        *(
            rf"(?<=\b{words}{re.escape(between)})"
            for words in (
                *("host", "tcp", "address", "addr", "server", "upstream", "backend", "endpoint"),
                *(
                    "dial",
                    "refused",
                    "econnrefused",
                    "connect to",
                    "connected to",
                    "connecting to",
                    "connection to",
                ),
            )
            for between in (" ", "=", ": ", " '", ' "', " (", "='", '="')
        ),
    )
)
_PORT: Final = r"443|[1-9]\d{3,4}"
_HOST_WITH_PORT: Final = (
    rf"(?<![\w.-])(?<![\w.]:)(?:(?:{_SAID_SO})(?:{_LABEL}\.){{0,9}}[a-z]{_LABEL}:(?:80|{_PORT})"
    rf"|(?<!:)(?:{_LABEL}\.){{1,9}}[a-z]{_LABEL}:(?:{_PORT})"
    rf"|(?<!:)\d{{1,3}}(?:\.\d{{1,3}}){{3}}:\d{{2,5}})(?!\w){_PATH}"
)
"""Whatever the host. A name without a dot is one only where the words before say so, and only a usual port
follows: there are `Error code:40001`, `gemma2:2024`, `messages.0.content:10` and `file.py:12`, too.
"""
_IPV6: Final = (
    r"(?<![\w.:-])\[?(?:::1|(?:f[cd][0-9a-f]{2}|fe[89ab][0-9a-f]):[0-9a-f:.]*[0-9a-f])(?:%\w+)?"
    r"(?:\](?::\d+)?)?(?![\w:])"
)
_INSIDE: Final = re.compile("|".join((_URL, _HOST, _HOST_WITH_PORT, _IPV6)), re.IGNORECASE)


class WeirError(Exception):
    """The root. `status` is the HTTP status; `retry` says whether the same request may succeed later."""

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    outcome: ClassVar[Outcome] = Outcome.INTERNAL_ERROR
    retry: bool = False
    usual_retry_after_seconds: ClassVar[float | None] = None
    """What a caller is told where nobody knows better."""
    advice: ClassVar[str] = "Report the request id to the operators of this service."

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = (
            self.usual_retry_after_seconds if retry_after_seconds is None else retry_after_seconds
        )

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it: {"error": {"message", "type", "param", "code"}}."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class ConfigurationError(WeirError):
    """A setting or a file of settings is wrong: the start stops, a reload is refused."""

    code = "configuration_error"


# -- the caller's side ---------------------------------------------------------------------------


class InvalidRequest(WeirError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    outcome = Outcome.CLIENT_ERROR
    advice = "Correct the request; the message names the field."


class AuthenticationFailed(WeirError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    outcome = Outcome.CLIENT_ERROR
    advice = "Send `Authorization: Bearer KEY` with a key that the operators of this service gave you."


class PermissionDenied(WeirError):
    status = 403
    type = "permission_error"
    code = "permission_denied"
    outcome = Outcome.CLIENT_ERROR
    advice = "Ask the operators of this service for access."


class NotFound(WeirError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"
    outcome = Outcome.CLIENT_ERROR
    advice = "Check the path; `/docs` lists what is there."


class ModelNotFound(NotFound):
    code = "model_not_found"
    advice = "Choose a model that `GET /v1/models` lists."


class ConversationNotFound(NotFound):
    code = "conversation_not_found"
    advice = "Start a new conversation: leave `conversation_id` out."


class MethodNotAllowed(WeirError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    outcome = Outcome.CLIENT_ERROR
    advice = "Use the method that `/docs` shows for this path."


class RequestTimeout(WeirError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    outcome = Outcome.CLIENT_ERROR
    retry = True
    advice = "Send the whole body sooner, or check the network between you and this service."


class Conflict(WeirError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"
    outcome = Outcome.CLIENT_ERROR
    advice = "Wait until the other request has ended, then send this one again."


class IdempotencyRunning(Conflict):
    """A request with this idempotency key runs."""

    code = "idempotency_in_progress"
    retry = True
    usual_retry_after_seconds = 2.0
    advice = "Send the same again after the seconds that Retry-After names: its answer will be there."


class IdempotencyNotKept(Conflict):
    """A request with this idempotency key was answered, and the answer cannot be given again."""

    code = "idempotency_answer_not_kept"
    advice = "Send it with a new Idempotency-Key: that is another call, which costs what the first did."


class BodyTooLarge(WeirError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    outcome = Outcome.CLIENT_ERROR
    advice = "Send less, or ask the operators to raise MAX_BODY_BYTES."


class ValidationFailed(WeirError):
    status = 422
    type = "invalid_request_error"
    code = "validation_error"
    outcome = Outcome.CLIENT_ERROR
    advice = "Correct the field that `param` names."


class IdempotencyMismatch(WeirError):
    """An idempotency key that belongs to another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"
    outcome = Outcome.CLIENT_ERROR
    advice = "Use a new Idempotency-Key for each new request, and an old one only to send the same again."


class RateLimited(WeirError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    outcome = Outcome.RATE_LIMITED
    retry = True
    advice = "Wait for the seconds that Retry-After names."
    standing: Standing | None = None
    """The limit that was met, for the headers that tell of it."""


class BudgetExceeded(WeirError):
    """The dollars of a budget are spent, or so nearly that this call may not fit."""

    status = 402
    type = "budget_error"
    code = "budget_exceeded"
    outcome = Outcome.BUDGET_REJECTED
    advice = "Wait until the budget begins anew, which the message names, or ask the operators for more."
    standing: Standing | None = None
    """The budget that was met."""


class BudgetReserved(RateLimited):
    """There is something left of a budget, but calls that run now may need it."""

    code = "budget_reserved"
    outcome = Outcome.BUDGET_REJECTED
    usual_retry_after_seconds = 1.0
    advice = "Send it again in a moment: the calls that run now will have shown what they really cost."


class CallerGone(WeirError):
    """The caller closed the connection; nobody is left to read this."""

    status = 499
    code = "client_disconnected"
    outcome = Outcome.CLIENT_DISCONNECTED
    advice = "None: the caller has left."


# -- the service's side --------------------------------------------------------------------------


class InternalError(WeirError):
    """A fault of Weir itself."""


class StateUnavailable(WeirError):
    """What the pods share cannot be reached just now, and this request needs it."""

    status = 503
    type = "server_error"
    code = "state_unavailable"
    outcome = Outcome.OVERLOADED
    retry = True
    advice = "Send it again after the seconds that Retry-After names; calls without a conversation go on."
    usual_retry_after_seconds = 2.0


class StateRefused(StateUnavailable):
    """The store is well and refused a command: a fault of Weir, or a key that holds something else."""


class Overloaded(WeirError):
    """There are more requests than this process can serve, and this one was turned away."""

    status = 503
    code = "overloaded"
    outcome = Outcome.OVERLOADED
    retry = True
    usual_retry_after_seconds = 1.0
    advice = "Send it again after the seconds that Retry-After names; another pod may have room sooner."


class ShuttingDown(WeirError):
    status = 503
    code = "server_shutting_down"
    outcome = Outcome.INTERNAL_ERROR
    retry = True
    advice = "Send the request again: another pod answers it."


# -- the upstream's side -------------------------------------------------------------------------


class UpstreamError(WeirError):
    """The upstream failed; the class says how, so that callers and retries know what to do."""

    status = 502
    type = "upstream_error"
    code = "openai_service_error"
    outcome = Outcome.UPSTREAM_ERROR
    retry = True
    advice = "Try again with a growing delay; if it lasts, the model's provider has an outage."

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        upstream_request_id: str | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after_seconds=retry_after_seconds)
        self.upstream_request_id = upstream_request_id
        self.at_once = False
        """Another key of the same upstream is ready: the call may be made again without a pause."""


class UpstreamUnavailable(UpstreamError):
    """Refused, reset, no such host, TLS: or the upstream's own 503."""

    status = 503


class UpstreamProtocolError(UpstreamError):
    """The upstream answered something that is no answer: HTML, half a JSON, a wrong content type."""


class UpstreamMisconfigured(UpstreamError):
    """The upstream refused this service's own key, rights or account: 401, 402 or 403 is not the caller's."""

    code = "upstream_authentication_error"
    retry = False
    advice = "Tell the operators of this service: the model's provider refuses its key, or wants to be paid."


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "api_timeout"
    outcome = Outcome.TIMEOUT
    advice = "Try again, ask for fewer tokens, or stream the answer."


class UpstreamRateLimited(UpstreamError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    outcome = Outcome.RATE_LIMITED
    advice = "Wait for the seconds that Retry-After names: the model's provider limits this service."


class RequestDeadline(UpstreamTimeout):
    """The time that the caller or the operators gave to the whole request is over."""

    code = "request_deadline_exceeded"
    retry = False
    advice = "Allow more time (X-Request-Timeout), ask for fewer tokens, or stream the answer."


class StreamTruncated(UpstreamError):
    """A stream that began and did not end as its protocol wants."""

    code = "stream_truncated"
    outcome = Outcome.STREAM_TRUNCATED
    advice = "What came is incomplete; ask again."


class UpstreamRejected(UpstreamError):
    """The upstream found the request wrong (4xx): its own words go on to the caller."""

    status = 400
    code = "upstream_rejected"
    outcome = Outcome.CLIENT_ERROR
    retry = False
    type = "invalid_request_error"
    advice = "Correct the request; the message is the model provider's own."

    def __init__(
        self,
        status: int,
        error: dict[str, Any],
        *,
        retry_after_seconds: float | None = None,
        upstream_request_id: str | None = None,
    ) -> None:
        message = error.get("message")
        super().__init__(
            message if isinstance(message, str) and message else f"The upstream answered {status}.",
            retry_after_seconds=retry_after_seconds,
            upstream_request_id=upstream_request_id,
        )
        self.status = status
        self.retry = status in (408, 409)
        self.error = error

    def body(self) -> dict[str, Any]:
        envelope = super().body()["error"]
        for name in ("type", "param", "code"):
            given = self.error.get(name, envelope[name])
            # Some servers number their codes, and the SDK wants a string or nothing.
            envelope[name] = str(given) if isinstance(given, str | int) else None
        return {"error": {**envelope, "message": self.message}}


def without_secrets(words: str, secret: str | None = None) -> str:
    """An upstream's own words, without what looks like a key or like an address of the inside."""
    if secret:
        words = words.replace(secret, "(hidden)")
    # Cut before too, for it takes time; what is beyond may begin inside a key.
    words = CREDENTIAL.sub("(hidden)", words[: 2 * WORDS_MOST_LETTERS])
    return _INSIDE.sub("(hidden)", words)[:WORDS_MOST_LETTERS]


def outcome_of(error: WeirError) -> Outcome:
    """How it is booked. An upstream's own 408 is one that was late, whoever says so."""
    return Outcome.TIMEOUT if isinstance(error, UpstreamError) and error.status == 408 else error.outcome


def catalogue() -> list[type[WeirError]]:
    """Every error that a caller can meet, for the OpenAPI page and the docs."""
    hidden = (ConfigurationError, CallerGone)
    found: list[type[WeirError]] = []
    queue: list[type[WeirError]] = list(WeirError.__subclasses__())
    while queue:
        cls = queue.pop(0)
        queue.extend(cls.__subclasses__())
        if cls not in hidden:
            found.append(cls)
    return found
