"""What spans say, under the names of OpenTelemetry's GenAI conventions; `weir.` before Weir's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import msgspec

from service.config import Configuration
from service.domain import AttemptKind, Call, Outcome, RequestRecord, UsageSource
from service.errors import WeirError, outcome_of
from service.ports import Target

Attributes: TypeAlias = dict[str, Any]

MOST_LETTERS: Final = 200
"""Of what a caller or an upstream makes up."""


class _Asked(msgspec.Struct):
    """The parameters of a question that a span names."""

    temperature: Any = None
    top_p: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    seed: Any = None
    n: Any = None


_decode: Final = msgspec.json.Decoder(_Asked).decode
_NUMBERS: Final = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
}


def servers(configuration: Configuration) -> dict[str, Attributes]:
    """Host and port of each upstream by its name; never what else may stand in an address."""
    found = {}
    for upstream in configuration.upstreams:
        if upstream.base_url:
            parts = urlsplit(upstream.base_url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            found[upstream.name] = {"server.address": parts.hostname or "", "server.port": port}
    return found


def of_question(call: Call, target: Target, kind: AttemptKind) -> Attributes:
    return {
        "gen_ai.operation.name": call.operation.genai_name,
        "gen_ai.provider.name": target.upstream.provider,
        "gen_ai.request.model": target.model[:MOST_LETTERS],
        "gen_ai.request.stream": call.stream,
        "weir.upstream": target.upstream.name,
        "weir.attempt.kind": kind.value,
        **_parameters(call),
    }


def of_answer(record: RequestRecord, first_chunk_seconds: float | None) -> Attributes:
    usage = record.usage
    attributes: Attributes = {
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.model": record.response_model,
        "gen_ai.response.finish_reasons": (record.finish_reason[:MOST_LETTERS],)
        if record.finish_reason
        else None,
        "gen_ai.response.time_to_first_chunk": first_chunk_seconds,
        "weir.upstream_request_id": record.upstream_request_id,
    }
    if usage is not None:
        attributes |= {
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_input_tokens or None,
            "gen_ai.usage.cache_write.input_tokens": usage.cache_write_tokens or None,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
            "weir.usage_source": "estimated" if usage.source is UsageSource.ESTIMATED else None,
        }
    return _known(attributes)


def of_exchange(record: RequestRecord) -> Attributes:
    """Of the request's own span. Its tokens are on that of the attempt: sums must not have them twice."""
    return _known(
        {
            "gen_ai.operation.name": record.operation.genai_name,
            "gen_ai.request.model": record.request_model,
            "gen_ai.request.stream": record.stream,
            "weir.outcome": record.outcome.value,
            "weir.tenant": record.principal.tenant,
            "weir.key": record.principal.name,
            "weir.attempts": record.attempts,
            "weir.cache": record.cache.value if record.cache is not None else None,
            "weir.answered_by": record.answered_by,
            "weir.cost_usd": record.cost.usd,
            "weir.conversation_id": record.conversation_id,
        }
    )


def of_error(error: BaseException) -> tuple[Outcome, str]:
    """How an error is booked, and its `error.type`."""
    if isinstance(error, WeirError):
        return outcome_of(error), error.code
    if isinstance(error, Exception):
        return Outcome.INTERNAL_ERROR, WeirError.code
    return Outcome.CLIENT_DISCONNECTED, "cancelled"


def _parameters(call: Call) -> Attributes:
    try:
        asked = _decode(call.body)
    except (ValueError, RecursionError):
        return {}
    values = ((name, getattr(asked, field)) for field, name in _NUMBERS.items())
    return {name: value for name, value in values if type(value) in (int, float) and abs(value) < 2**63}


def _known(attributes: Mapping[str, Any]) -> Attributes:
    """Those that have a value; what an upstream made up is cut."""
    return {
        name: value[:MOST_LETTERS] if isinstance(value, str) else value
        for name, value in attributes.items()
        if value not in (None, "")
    }
