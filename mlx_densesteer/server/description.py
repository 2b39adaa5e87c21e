"""The OpenAPI description that the server serves, made of the models that check its requests."""

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .._version import __version__
from .schema import ChatRequest, CompletionRequest

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSALS = {
    "400": "Something in the request is wrong, or not supported.",
    "401": "No valid API key.",
    "403": "Another site, or another host name.",
    "404": "No such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; see Retry-After.",
    "503": "The server is shutting down.",
}
APPLIED = {
    "type": ["object", "null"],
    "description": "What was added to the residual stream; null is the stock model.",
}
USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {"type": "object"},
        "completion_tokens_details": {
            "type": "object",
            "description": "The density receipt: steps, density (tokens per step), speed.",
        },
    },
}
ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage", "steering"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["chat.completion", "text_completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": USAGE,
        "steering": APPLIED,
    },
}

EVENT = {
    "type": "object",
    "description": "A server-sent event: a chunk as JSON, at the end [DONE].",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}


def describe(with_key: bool) -> dict[str, object]:
    """Return the description; ``with_key``: an API key is needed."""
    kinds: list[type[BaseModel]] = [ChatRequest, CompletionRequest]
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    components = {"schemas": {**schemas["$defs"], "Error": ERROR, "Answer": ANSWER}}
    document: dict[str, object] = {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-densesteer", "version": __version__,
            "description": "OpenAI's API for one local model, steered per request.",
        },
        "paths": {
            "/health": {"get": _get("Is the server up, and how busy?")},
            "/v1/models": {"get": _get("The model, and its steered presets.")},
            "/v1/models/{model}": {"get": _get("One of them.") | {"parameters": [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}},
            ]}},
            "/v1/steering": {"get": _get("Vectors, presets, and what is known of them.")},
            "/v1/chat/completions": {"post": _post("Answer a conversation.", "ChatRequest")},
            "/v1/completions": {"post": _post("Continue a text.", "CompletionRequest")},
        },
        "components": components,
    }  # fmt: skip
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _get(summary: str) -> dict[str, object]:
    return {
        "summary": summary,
        "responses": {"200": _json("Yes.", {"type": "object"})} | _refusals("400", "401", "403", "404"),
    }  # fmt: skip


def _post(summary: str, kind: str) -> dict[str, object]:
    body = {"schema": {"$ref": f"#/components/schemas/{kind}"}}
    answer = _json("The answer, or its stream.", {"$ref": "#/components/schemas/Answer"})
    answer["content"]["text/event-stream"] = {"schema": EVENT}  # type: ignore[index]
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": answer} | _refusals(*REFUSALS),
    }


def _refusals(*statuses: str) -> dict[str, object]:
    error = {"$ref": "#/components/schemas/Error"}
    return {status: _json(REFUSALS[status], error) for status in statuses}


def _json(description: str, schema: dict[str, object]) -> dict[str, object]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
