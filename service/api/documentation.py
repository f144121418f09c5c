"""The OpenAPI page: FastAPI's own, plus the plain routes and every error with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI

from service.api import schemas
from service.domain import Operation
from service.errors import WeirError, catalogue

DESCRIPTION: Final = """
One door to the models. Below `/v1` it speaks OpenAI's API: point the official SDK at it with
`base_url="http://HOST:8000/v1"`. Below `/api/v1` it keeps conversations.

Every error has one form, `{"error": {"message", "type", "param", "code"}}`, and the header
`x-should-retry`. Every answer has `X-Request-ID`: name it when you ask for help.
"""
TAGS: Final = [
    {"name": "openai", "description": "OpenAI-compatible; every parameter is passed on."},
    {"name": "chat", "description": "Turns of a conversation that Weir keeps."},
    {"name": "conversations", "description": "What is kept: seen by its owner alone."},
    {"name": "generate", "description": "Single prompts, without a conversation."},
    {"name": "usage", "description": "What was used, by whom and at which model."},
    {"name": "tenants", "description": "For operators: a tenant's conversations, taken along or erased."},
    {"name": "system", "description": "Is it there, and how is it?"},
]
_EXAMPLES: Final[dict[Operation, dict[str, Any]]] = {
    Operation.CHAT: {
        "model": "simulator",
        "messages": [{"role": "user", "content": "Why does a weir have steps?"}],
        "stream": False,
    },
    Operation.TEXT_COMPLETION: {"model": "simulator", "prompt": "A weir is", "max_tokens": 50},
    Operation.EMBEDDINGS: {"model": "simulator", "input": "a quiet river"},
    Operation.RESPONSES: {"model": "simulator", "input": "Why does a weir have steps?"},
}
_OF_BODIES: Final = (408, 409, 413)
"""Errors that a request without a body cannot meet."""
_SUMMARIES: Final = {
    Operation.CHAT: "Chat completion, streamed or not",
    Operation.TEXT_COMPLETION: "Text completion, streamed or not",
    Operation.EMBEDDINGS: "Embeddings",
    Operation.RESPONSES: "Response, streamed or not",
}


def document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """An `openapi` function for `app` that tells all of it; made once, at the first call."""
    made: dict[str, Any] = {}
    own = app.openapi

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(own())
            paths = made.setdefault("paths", {})
            made["paths"] = {**_plain_paths(), **paths}
            parts = made.setdefault("components", {})
            shapes = parts.setdefault("schemas", {})
            shapes.update(_schemas())
            for unused in ("HTTPValidationError", "ValidationError"):  # the envelope takes their place
                shapes.pop(unused, None)
            _add_stream(made["paths"]["/api/v1/chat"]["post"])
            parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            for path, operations in made["paths"].items():
                for method, operation in operations.items():
                    _add_errors(path, method, operation)
        return made

    return openapi


def _plain_paths() -> dict[str, Any]:
    paths: dict[str, Any] = {f"/v1/{o.value}": {"post": _model_operation(o)} for o in Operation}
    paths["/v1/models"] = {"get": _get("list_models", "The models that you may name")}
    show = _get("show_model", "One model")
    show["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    paths["/v1/models/{model}"] = {"get": show}
    return paths


def _model_operation(operation: Operation) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": "object",
        "required": ["model"],
        "properties": {"model": {"type": "string"}, "stream": {"type": "boolean"}},
        "additionalProperties": True,
        "description": "OpenAI's parameters; unknown ones are passed on too.",
    }
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if operation is not Operation.EMBEDDINGS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "tags": ["openai"],
        "summary": _SUMMARIES[operation],
        "operationId": "create_" + operation.name.lower(),
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": body, "example": _EXAMPLES[operation]}},
        },
        "responses": {
            "200": {"description": "The model's answer, as the upstream sent it", "content": content}
        },
    }


def _get(operation_id: str, summary: str) -> dict[str, Any]:
    return {
        "tags": ["openai"],
        "summary": summary,
        "operationId": operation_id,
        "responses": {
            "200": {"description": "OK", "content": {"application/json": {"schema": {"type": "object"}}}}
        },
    }


def _schemas() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for shape in (schemas.ErrorBody, schemas.StreamEvent):
        schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
        made.update(schema.pop("$defs", {}))
        made[shape.__name__] = schema
    return made


def _add_stream(operation: dict[str, Any]) -> None:
    """With `stream` the answer of a turn is that of /api/v1/chat/stream."""
    reference = {"schema": {"$ref": "#/components/schemas/StreamEvent"}}
    operation["responses"]["200"]["content"]["text/event-stream"] = reference


def _add_errors(path: str, method: str, operation: dict[str, Any]) -> None:
    """The errors that this operation can end with, each with an example and an advice."""
    responses = operation["responses"]
    responses.pop("422", None)
    if not path.startswith(("/v1/", "/api/")):
        return
    operation["security"] = [{"bearer": []}]
    for status, errors in sorted(_by_status().items()):
        if method != "post" and status in _OF_BODIES:
            continue
        advice = "\n".join(f"- `{e.code}`: {e.advice}" for e in errors)
        responses[str(status)] = {
            "description": advice,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/ErrorBody"},
                    "examples": {e.code: {"value": _example(e)} for e in errors},
                }
            },
        }


def _by_status() -> dict[int, list[type[WeirError]]]:
    found: dict[int, list[type[WeirError]]] = {}
    for error in catalogue():
        same = found.setdefault(error.status, [])
        if error.code not in {e.code for e in same}:
            same.append(error)
    return found


def _example(error: type[WeirError]) -> dict[str, Any]:
    message = "What happened, in a sentence."
    return {"error": {"message": message, "type": error.type, "param": None, "code": error.code}}
