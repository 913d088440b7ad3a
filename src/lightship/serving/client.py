"""A small client of the API, for `lightship chat`, `reload` and the demo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from lightship.errors import EngineError, ReloadFailed, RequestError


def stream_chat(url: str, messages: list[dict[str, str]], key: str | None = None, **options: Any) -> Iterator[str]:
    """The pieces of the answer to `messages` from the server at `url`, where `key` opens it. Raises with the server's
    own message."""
    body = {"messages": messages, "stream": True, **options}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = f"{url.rstrip('/')}/v1/chat/completions"
    try:
        with httpx.stream(
            "POST",
            address,
            json=body,
            headers=headers,
            timeout=httpx.Timeout(600, connect=5),
            trust_env=not _local(url),
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                raise RequestError(_message(answer), status=answer.status_code)
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield from _text(json.loads(line[6:]))
    except httpx.TransportError as error:
        raise EngineError(f"no answer from {address}: {error}", hint="is the server running?") from error


def change(url: str, what: str, body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """POST /admin/`what` to the server at `url`: its answer, however long that takes. Raises `ReloadFailed` with the
    server's own message, `RequestError` where it did not begin."""
    address = f"{url.rstrip('/')}/admin/{what}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.post(address, json=body, headers=headers, timeout=httpx.Timeout(None, connect=5),
                            trust_env=not _local(url))  # fmt: skip
    except httpx.TransportError as error:
        raise EngineError(f"no answer from {address}: {error}", hint="is the server running?") from error
    if answer.status_code == 200:
        found: dict[str, Any] = answer.json()
        return found
    if _code(answer) == ReloadFailed.code:
        raise ReloadFailed(_message(answer))
    raise RequestError(_message(answer), status=answer.status_code)


def _local(url: str) -> bool:
    """Whether `url` is this machine, where no proxy of the environment may come between."""
    return httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {answer.status_code}"


def _code(answer: httpx.Response) -> str | None:
    try:
        code: str | None = answer.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code


def _text(chunk: dict[str, Any]) -> Iterator[str]:
    if "error" in chunk:
        raise EngineError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        if piece := choice["delta"].get("content"):
            yield piece
