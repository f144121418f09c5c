"""One tree of errors. Each knows its HTTP status, its code, its outcome and whether a retry helps.

Drivers' errors (aiohttp, openai, ...) become one of these once, in the adapter that met them.
Messages are for the caller: they say what happened and what to do, and hold no key, no address of
the inside and no text of a prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

from service.domain import Outcome


class WeirError(Exception):
    """The root. `status` is the HTTP status; `retry` says whether the same request may succeed later."""

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    outcome: ClassVar[Outcome] = Outcome.INTERNAL_ERROR
    retry: bool = False
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
        self.retry_after_seconds = retry_after_seconds

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


class RateLimited(WeirError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    outcome = Outcome.RATE_LIMITED
    retry = True
    advice = "Wait for the seconds that Retry-After names."


class CallerGone(WeirError):
    """The caller closed the connection; nobody is left to read this."""

    status = 499
    code = "client_disconnected"
    outcome = Outcome.CLIENT_DISCONNECTED
    advice = "None: the caller has left."


# -- the service's side --------------------------------------------------------------------------


class InternalError(WeirError):
    """A fault of Weir itself."""


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


class UpstreamUnavailable(UpstreamError):
    """Refused, reset, no such host, TLS: or the upstream's own 503."""

    status = 503


class UpstreamProtocolError(UpstreamError):
    """The upstream answered something that is no answer: HTML, half a JSON, a wrong content type."""


class UpstreamMisconfigured(UpstreamError):
    """The upstream refused this service's own key or rights: 401 or 403 there is not the caller's."""

    code = "upstream_authentication_error"
    retry = False
    advice = "Tell the operators of this service: its key for the model's provider is refused."


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


class StreamTruncated(UpstreamError):
    """A stream that began and did not end as its protocol wants."""

    code = "stream_truncated"
    outcome = Outcome.STREAM_TRUNCATED
    advice = "What came is incomplete; ask again."


class UpstreamRejected(UpstreamError):
    """The upstream found the request wrong (4xx): its own words go on to the caller."""

    outcome = Outcome.CLIENT_ERROR
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
        envelope["code"] = "upstream_rejected"
        for name in ("type", "param", "code"):
            given = self.error.get(name, envelope[name])
            # Some servers number their codes, and the SDK wants a string or nothing.
            envelope[name] = str(given) if isinstance(given, str | int) else None
        return {"error": {**envelope, "message": self.message}}


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
