"""Every error as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lightship.errors import LightshipError, RequestError

log = logging.getLogger("lightship.serving")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
         500: "server_error", 503: "server_error"}  # fmt: skip
CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 429: "overloaded", 500: "internal_error",
         503: "unavailable"}  # fmt: skip


def envelope(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def from_error(error: LightshipError) -> tuple[int, dict[str, Any]]:
    """Status and body for one of our errors. The hint is for the operator and stays here."""
    param, code = (error.param, error.code) if isinstance(error, RequestError) else (None, None)
    return error.http_status, envelope(error.message, error.http_status, param, code)


def install(app: FastAPI) -> None:
    """Route every failure of `app` through the envelope."""

    @app.exception_handler(LightshipError)
    async def ours(request: Request, error: LightshipError) -> JSONResponse:
        status, body = from_error(error)
        return JSONResponse(body, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse(envelope("the body is not valid JSON", 400, None, "invalid_json"), 400)
        place = _place(first["loc"], error.body)
        unknown = first["type"] == "extra_forbidden"
        message = "this field is not known to this server" if unknown else first["msg"]
        code = "unknown_parameter" if unknown else "invalid_value"
        return JSONResponse(envelope(f"{place or 'body'}: {message}"[:300], 400, place or None, code), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        body = envelope(str(error.detail)[:300], error.status_code)
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", exc_info=error)
        return JSONResponse(envelope("internal error", 500), 500)


def _place(location: Sequence[int | str], body: Any) -> str:
    """The path in the request, such as messages.0.role, without the names of union branches pydantic puts into it."""
    path: list[str] = []
    for part in location:
        if isinstance(part, int) and isinstance(body, list) and part < len(body):
            body = body[part]
        elif isinstance(part, str) and isinstance(body, dict) and (part in body or part == location[-1]):
            body = body.get(part)
        else:
            continue
        path.append(str(part)[:60])
    return ".".join(path)[:100]
