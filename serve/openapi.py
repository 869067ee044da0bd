"""Describes the API as OpenAPI: bodies of serve/wire.py, examples that run, errors in OpenAI's shape."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serve.wire import CaptionRequest, ChatRequest

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4IacBAALA"
    "AQ/aQIG5AAAAAElFTkSuQmCC"
)
"""A whole PNG of one pixel."""

CHAT_EXAMPLE = {
    "model": "toy-chat",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": PIXEL}},
                {"type": "text", "text": "Analyze the image in a comprehensive and detailed manner."},
            ],
        }
    ],
    "max_tokens": 20,
}
CAPTION_EXAMPLE = {"image": PIXEL, "max_tokens": 20}

_ERROR = {
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

ERRORS = {
    400: "the request cannot be answered as it is; param names the field",
    401: "no valid key",
    403: "without keys this machine alone is answered",
    404: "no such model or path",
    408: "the body did not arrive in time",
    413: "the body is too large",
    429: "too many requests, of this key or of all; Retry-After says when to try again",
    500: "the server's fault; its log says why under the id in x-request-id",
    503: "the server is about to end, or a model is being started again",
    504: "the answer was not finished within its time limit",
}


def error_responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Returns the errors of a route for FastAPI."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {code: {"description": ERRORS[code], "content": content} for code in codes or ERRORS}


def json_body(model: type[ChatRequest] | type[CaptionRequest], example: dict[str, Any]) -> dict[str, Any]:
    """Describes a JSON body, which the route reads itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"application/json": {"schema": schema, "example": example}}


FORM = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["image"],
            "properties": {
                "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                "prompt": {"type": "string"},
                "model": {"type": "string"},
            },
        }
    }
}


def describe(app: FastAPI) -> None:
    """Gives the app its description, made once when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas["Error"] = _ERROR
            for model in (ChatRequest, CaptionRequest):
                own = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= own.pop("$defs", {})
                schemas[model.__name__] = own
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
