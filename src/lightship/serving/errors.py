"""Every error as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}.

Keys, their order, the types and the form (two spaces of indentation, no newline at the end) are those that OpenAI's
own API was seen to send; the documentation does not say. 401: chatanywhere/GPT_API_free#62. 404, 500 and 503:
artificial-julien/docker-nginx-openai-api-cache#2, acheong08/ChatGPT#607, ikechan8370/chatgpt-plugin#125. 413 with its
Content-Length, which fits this form only: chidiwilliams/buzz#381. 415: openai/openai-openapi#194. 429: of a rate
Huanshere/VideoLingo#34, of an overloaded server mckaywrigley/repo-chat#13. A wrong type: Jeffser/Alpaca#904. Where it
sends a null code, ours has a name: clients can tell cases apart, and none can rely on a null.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lightship.errors import LightshipError, Overloaded

log = logging.getLogger("lightship.serving")
JSON = dict[str, Any]
INVALID, SERVER = "invalid_request_error", "server_error"
LONGEST = 300  # characters of a message

# Class of error, or status → type, code, and what the OpenAPI document says of it.
TABLE: Mapping[type[LightshipError] | int, tuple[str, str | None, str]] = {
    Overloaded: (SERVER, "overloaded", ""),
    400: (INVALID, None, "The request cannot be served as asked"),
    401: (INVALID, "invalid_api_key", "No key, or one that is not known"),
    403: (INVALID, "missing_scope", "The key may not do this"),
    404: (INVALID, "unknown_url", "No such route, or no such model"),
    405: (INVALID, "method_not_allowed", "The route has other methods"),
    408: (INVALID, "request_timeout", "The request did not arrive in time"),
    409: (INVALID, "conflict", "Not now: something else is under way, or must come first"),
    413: (INVALID, "body_too_large", "The body is too large"),
    415: (INVALID, "unsupported_content_type", "The body is not application/json"),
    429: ("requests", "rate_limit_exceeded", "Too many requests now; Retry-After tells when to come again"),
    431: (INVALID, "headers_too_large", "The headers are too large"),
    500: (SERVER, "internal_error", "The server failed"),
    503: (SERVER, "unavailable", "The server cannot answer now"),
}

# What pydantic says → OpenAI's code. Bounds of numbers are named after the number's kind, see `_code`.
CODES: Mapping[str, str] = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
    "too_long": "array_above_max_length",
    "too_short": "array_below_min_length",
}
BOUNDS: Mapping[str, str] = {
    "less_than": "above_max_value",
    "less_than_equal": "above_max_value",
    "greater_than": "below_min_value",
    "greater_than_equal": "below_min_value",
}


class Failure(JSONResponse):
    """An envelope as a response, laid out as OpenAI lays it out. Whatever a message holds, the bytes are ASCII."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, indent=2).encode("ascii")


def envelope(
    message: str, status: int, param: str | None = None, code: str | None = None, kind: str | None = None
) -> JSON:
    """The body of an error; type and code are the status's own unless given."""
    usual, name, _ = TABLE.get(status, TABLE[400 if status < 500 else 500])
    return {"error": {"message": message[:LONGEST], "type": kind or usual, "param": param, "code": code or name}}


def failure(
    message: str,
    status: int,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Failure:
    """The response for an error."""
    return Failure(envelope(message, status, param, code), status, headers)


def from_error(error: LightshipError) -> tuple[int, JSON]:
    """Status and body for one of our errors. The hint is for the operator and stays here. An error may have its own
    `param`, `code` and `kind` (OpenAI's `type`); what it lacks comes from the table, by its class or its status."""
    kind, code, _ = next((TABLE[each] for each in type(error).__mro__ if each in TABLE), (None, None, ""))
    param, code = getattr(error, "param", None), getattr(error, "code", None) or code
    return error.http_status, envelope(
        error.message, error.http_status, param, code, getattr(error, "kind", None) or kind
    )


def retry_after(error: LightshipError) -> dict[str, str]:
    """The header that tells when to come again, in whole seconds, for an error that has `retry_after`."""
    seconds = getattr(error, "retry_after", None)
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


def install(app: FastAPI) -> None:
    """Route every failure of `app` through the envelope."""

    @app.exception_handler(LightshipError)
    async def ours(request: Request, error: LightshipError) -> Failure:
        status, body = from_error(error)
        return Failure(body, status, retry_after(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Failure:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return failure("the body is not valid JSON", 400, None, "invalid_json")
        place = _place(first, error.body)
        return failure(_complaint(first, place), 400, place or None, _code(first))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Failure:
        asked = f"{request.method} {request.url.path}"[:100]
        message = {
            404: f"Unknown request URL: {asked}. Please check it for typos",
            405: f"Not allowed: {asked}. Perhaps another method is meant",
        }.get(error.status_code, str(error.detail))
        return failure(message, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Failure:
        log.error("unexpected error", exc_info=error)
        return failure("internal error", 500)


def _complaint(first: Mapping[str, Any], place: str) -> str:
    """What is wrong, in words that hold nothing of the request but the names of its fields."""
    if first["type"] == "missing":
        return f"Missing required parameter: '{place or 'body'}'"
    if first["type"] == "extra_forbidden":
        return f"Unknown parameter: '{place}' is not known to this server"
    return f"Invalid '{place or 'body'}': {first['msg']}"


def _code(first: Mapping[str, Any]) -> str:
    kind = first["type"]
    if kind in BOUNDS:
        return f"{'integer' if isinstance(first['input'], int) else 'decimal'}_{BOUNDS[kind]}"
    return CODES.get(kind) or ("invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value")


def _place(first: Mapping[str, Any], body: Any) -> str:
    """The path in the request, such as messages.0.role, without the names of union branches pydantic puts into it."""
    where, *location = first["loc"]
    path: list[str] = []
    for number, part in enumerate(location, 1):
        absent = first["type"] == "missing" and number == len(location)
        if isinstance(part, int) and isinstance(body, list) and part < len(body):
            body = body[part]
        elif isinstance(part, str) and isinstance(body, dict) and (part in body or absent):
            body = body.get(part)
        elif where == "body":
            continue
        path.append(str(part)[:60])
    return ".".join(path)[:100]


# ── What the OpenAPI document says of errors ────────────────────────────────

SCHEMA: JSON = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "maxLength": LONGEST},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
OPEN = ("/livez", "/readyz", "/health")  # answered without a key, and 503 in a form of their own


def document(app: FastAPI, keyed: bool = False) -> None:
    """Make the OpenAPI document of `app` name every error on every route, the event stream where `stream` can be asked
    for, and, where it is `keyed`, the key."""
    plain = app.openapi

    def documented() -> JSON:
        if app.openapi_schema is None:
            schema = plain()
            parts = schema.setdefault("components", {})
            parts.setdefault("schemas", {})["Error"] = SCHEMA
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    _name_errors(operation, path)
                    _name_stream(operation, parts["schemas"])
            if keyed:
                parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
                for path in OPEN:
                    for operation in schema["paths"].get(path, {}).values():
                        operation["security"] = []
        return app.openapi_schema or {}

    app.openapi = documented  # type: ignore[method-assign]


def _name_errors(operation: JSON, path: str) -> None:
    answers = operation.setdefault("responses", {})
    answers.pop("422", None)  # FastAPI's own form, which is never sent here
    for status, (_, _, description) in TABLE.items():
        if isinstance(status, int) and not (path in OPEN and status == 503):
            answer = {"description": description, "content": {"application/json": {"schema": _ref("Error")}}}
            answers.setdefault(str(status), answer)


def _name_stream(operation: JSON, schemas: JSON) -> None:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    named = schemas.get(body.get("$ref", "").rpartition("/")[2], {})
    if "stream" in named.get("properties", {}):
        operation["responses"]["200"].setdefault("content", {})["text/event-stream"] = {}


def _ref(name: str) -> JSON:
    return {"$ref": f"#/components/schemas/{name}"}
