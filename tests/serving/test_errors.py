"""Errors as clients see them: OpenAI's envelope to the byte, codes that tell cases apart, nothing of the request."""

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from lightship.errors import EngineDied, LightshipError, Overloaded, RequestError
from lightship.serving import errors

SECRET = "do-not-echo-" * 50


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    text: str = Field(max_length=10, min_length=2)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    whole: int | None = Field(None, ge=1, le=9)
    real: float | None = Field(None, gt=0, lt=1)
    several: list[Inner] | None = Field(None, min_length=1, max_length=2)
    either: str | list[str] | None = None
    stream: bool = False


class Later(Overloaded):
    retry_after = 2.1


class Quota(RequestError):
    kind = "tokens"
    retry_after = 0.2


RAISED = {
    "bad": RequestError("no", "n", "unsupported_parameter"),
    "none": RequestError("no such model", "model", "model_not_found", 404),
    "later": Later("too many"),
    "quota": Quota("slower", None, "rate_limit_exceeded", 429),
    "dead": EngineDied("it died"),
    "ours": LightshipError("broken", hint=SECRET),
    "theirs": ValueError(SECRET),
    "long": RequestError("x" * 5000),
    "odd": RequestError("\ud800", "\ud800é"),
}


@pytest.fixture(scope="module")
def app():
    app = FastAPI()
    errors.install(app)

    @app.post("/body")
    async def body(given: Body):
        return given

    @app.get("/raise/{name}")
    async def fail(name: str):
        raise RAISED[name]

    @app.get("/livez")
    async def livez():
        return {}

    errors.document(app, keyed=True)
    return app


@pytest.fixture(scope="module")
def ask(app):
    async def asked(method, path, **options):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return lambda *arguments, **options: asyncio.run(asked(*arguments, **options))


def test_the_form_is_openai_s_to_the_byte():
    """The 413 that was seen, whose Content-Length (172) fits only this form: chidiwilliams/buzz#381."""
    message = "Maximum content size limit (26214400) exceeded (222592852 bytes read)"
    seen = errors.Failure({"error": {"message": message, "type": "server_error", "param": None, "code": None}}, 413)
    assert seen.headers["content-length"] == "172" and seen.headers["content-type"] == "application/json"
    assert seen.body.startswith(b'{\n  "error": {\n    "message": "Maximum') and seen.body.endswith(
        b'"code": null\n  }\n}'
    )


@pytest.mark.parametrize(
    ("name", "status", "kind", "param", "code", "again"),
    [
        ("bad", 400, "invalid_request_error", "n", "unsupported_parameter", None),
        ("none", 404, "invalid_request_error", "model", "model_not_found", None),
        ("later", 429, "server_error", None, "overloaded", "3"),
        ("quota", 429, "tokens", None, "rate_limit_exceeded", "1"),
        ("dead", 503, "server_error", None, "unavailable", None),
        ("ours", 500, "server_error", None, "internal_error", None),
        ("theirs", 500, "server_error", None, "internal_error", None),
        ("long", 400, "invalid_request_error", None, None, None),
    ],
)
def test_each_class_has_its_status_type_and_code(ask, name, status, kind, param, code, again):
    answer = ask("GET", f"/raise/{name}")
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (status, kind, param, code)
    assert answer.headers.get("retry-after") == again
    assert len(error["message"]) <= 300 and "do-not-echo" not in answer.text


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"whole": SECRET}, "whole", "invalid_type"),
        ({"whole": 1.5}, "whole", "invalid_type"),
        ({"whole": 0}, "whole", "integer_below_min_value"),
        ({"whole": 10}, "whole", "integer_above_max_value"),
        ({"real": 1.0}, "real", "decimal_above_max_value"),
        ({"real": 0.0}, "real", "decimal_below_min_value"),
        ({"several": []}, "several", "array_below_min_length"),
        ({"several": [{"text": "ab"}] * 3}, "several", "array_above_max_length"),
        ({"several": [{"text": SECRET}]}, "several.0.text", "string_above_max_length"),
        ({"several": [{"text": "a"}]}, "several.0.text", "string_below_min_length"),
        ({"several": [{}]}, "several.0.text", "missing_required_parameter"),
        ({"several": [SECRET]}, "several.0", "invalid_type"),
        ({"several": [{"text": "ab", "more": SECRET}]}, "several.0.more", "unknown_parameter"),
        ({"more": SECRET}, "more", "unknown_parameter"),
        ({"either": {"x": SECRET}}, "either", "invalid_type"),
        ({"x" * 5000: 1}, "x" * 60, "unknown_parameter"),
        ([], None, "invalid_type"),
        (SECRET, None, "invalid_type"),
        ({"whole": SECRET, "real": SECRET, "several": SECRET}, "whole", "invalid_type"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_one_complaint_about_a_body_that_names_the_place_and_echoes_nothing(ask, body, param, code):
    answer = ask("POST", "/body", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert len(answer.content) < 600 and "do-not-echo" not in answer.text


def test_what_is_in_a_message_is_ascii_whatever_was_asked(ask):
    """A lone surrogate cannot be encoded; it must not turn the answer into a failure of the server."""
    answer = ask("GET", "/raise/odd")
    assert answer.status_code == 400 and answer.content.isascii()
    assert answer.json()["error"]["param"] == "\ud800é"
    content = b'{"more\\ud800\xc3\xa9": 1}'
    answer = ask("POST", "/body", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] is None


def test_routes_that_are_not_there(ask):
    missing = ask("GET", "/v1/v1/models").json()["error"]
    assert missing["code"] == "unknown_url" and "GET /v1/v1/models" in missing["message"]
    wrong = ask("DELETE", "/body")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert len(ask("GET", "/" + "x" * 5000).content) < 600


def test_the_openapi_document_names_every_error_on_every_route(ask):
    schema = ask("GET", "/openapi.json").json()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert {"400", "401", "403", "404", "405", "408", "413", "415", "429", "431", "500"} <= set(
                operation["responses"]
            )
            assert "422" not in operation["responses"]
            assert operation.get("security") == ([] if path == "/livez" else None)
    refused = schema["paths"]["/body"]["post"]["responses"]["413"]["content"]["application/json"]["schema"]
    assert refused == {"$ref": "#/components/schemas/Error"} and "Error" in schema["components"]["schemas"]
    assert "text/event-stream" in schema["paths"]["/body"]["post"]["responses"]["200"]["content"]
    assert schema["security"] == [{"key": []}] and "key" in schema["components"]["securitySchemes"]


def test_every_status_an_error_can_have_is_in_the_table():
    def classes(kind):
        yield kind
        for each in kind.__subclasses__():
            yield from classes(each)

    gone = 499  # of a client that left; nobody sees it
    assert {each.http_status for each in classes(LightshipError)} - {gone} <= set(errors.TABLE)
    for status, row in errors.TABLE.items():
        body = errors.envelope("m", status)["error"] if isinstance(status, int) else None
        assert body is None or json.dumps(body) == json.dumps(
            {"message": "m", "type": row[0], "param": None, "code": row[1]}
        )
