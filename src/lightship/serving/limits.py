"""What a request may cost before any of it is understood: bytes, lines, depth, and the time it takes to arrive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightship.serving.errors import Failure, failure

BODY_LIMIT = 2 * 2**20
HEADER_BYTES = 64 * 2**10
HEADER_LINES = 100
DEPTH = 64  # of nested lists and objects
PARTS = 20_000  # fields, lists and objects together; each costs the parser and the checks far more than its bytes
BLOCK = 64 * 2**10  # bytes whose nesting is counted in one go


@dataclass(frozen=True)
class Limits:
    """What one client may take. Times are in seconds."""

    body: int = BODY_LIMIT  # bytes of a body
    chunks: int = 10_000  # pieces a body may be sent in; each costs the event loop the same, however small
    connections: int = 500  # open at the same time; those beyond are refused, up to as many again with an answer
    head_seconds: float = 10.0  # until the last line of the headers is here
    body_seconds: float = 30.0  # until the last byte of a body is here
    write_seconds: float = 30.0  # without a client taking anything of what is sent to it
    linger_seconds: float = 2.0  # for a refused client to read why


class HeadLimit:
    """ASGI middleware, outside of all that looks at headers: 431 for too many of them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count."""
        headers = scope.get("headers", ())
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        if scope["type"] == "http" and (len(headers) > HEADER_LINES or size > HEADER_BYTES):
            message = f"the headers exceed {HEADER_LINES} lines or {HEADER_BYTES} bytes"
            return await refuse(failure(message, 431), scope, receive, send)
        return await self._app(scope, receive, send)


class BodyLimit:
    """ASGI middleware: takes the whole body in, within bounds of size and time, and hands it on only when it can be
    JSON that is safe to parse."""

    def __init__(self, app: ASGIApp, limits: Limits | None = None) -> None:
        self._app, self._limits = app, limits or Limits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read and check; a request without a body passes as it is."""
        if scope["type"] != "http" or not has_body(scope):
            return await self._app(scope, receive, send)
        refusal = _other_content(scope) or self._too_large(_declared(scope))
        if refusal is not None:
            return await refuse(refusal, scope, receive, send, self._limits.linger_seconds)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                found = await self._read(receive)
        except TimeoutError:
            found = failure(f"the body did not arrive within {self._limits.body_seconds:g} s", 408)
        if isinstance(found, Failure):
            return await refuse(found, scope, receive, send, self._limits.linger_seconds)
        if found is None:
            return None  # the client left
        refusal = complaint(found)
        if refusal is not None:
            return await refusal(scope, receive, send)
        return await self._app(scope, _replay(found, receive), send)

    async def _read(self, receive: Receive) -> bytes | Failure | None:
        """The body; a refusal when it is too large; None when the client left."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if refusal := self._too_large(len(body)):
                return refusal
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self, size: int) -> Failure | None:
        limit = self._limits.body
        return failure(f"the body exceeds {limit} bytes", 413) if size > limit else None


def has_body(scope: Scope) -> bool:
    """Whether the headers announce one."""
    return _declared(scope) > 0 or any(name == b"transfer-encoding" for name, _ in scope["headers"])


def _declared(scope: Scope) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0


def _other_content(scope: Scope) -> Failure | None:
    """A refusal of anything but application/json in UTF-8, sent as it is. Nothing is guessed, so that a web page cannot
    send a body without asking first either."""
    given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-type"]
    kind, _, more = given[0].partition(";") if len(given) == 1 else ("", "", "")
    charset = more.strip().lower().replace('"', "")
    encoded = any(name == b"content-encoding" and value != b"identity" for name, value in scope["headers"])
    if kind.strip().lower() == "application/json" and charset in ("", "charset=utf-8") and not encoded:
        return None
    message = "Unsupported content type: this API only accepts application/json (UTF-8, not compressed)"
    return failure(message, 415, headers={"Accept": "application/json"})


def complaint(body: bytes) -> Failure | None:
    """A refusal of a body that must not reach the parser: not UTF-8, numbers JSON does not have, nested too deep."""
    try:
        body.decode("utf-8")
        valid = b"\x00" not in body  # else the parser would guess UTF-16 or UTF-32
    except UnicodeDecodeError:
        valid = False
    if valid and (b"NaN" in body or b"Infinity" in body):
        valid = not any((outside == ord("N")).any() or (outside == ord("I")).any() for outside in _outside(body))
    if not valid:
        return failure("the body is not valid JSON in UTF-8", 400, None, "invalid_json")
    if sum(map(body.count, (b":", b"[", b"{"))) > PARTS and parts_of(body) > PARTS:
        return failure(f"the body has more than {PARTS} fields, lists and objects", 400, None, "invalid_json")
    if body.count(b"[") + body.count(b"{") > DEPTH and too_deep(body):
        return failure(f"the body nests more than {DEPTH} lists or objects", 400, None, "invalid_json")
    return None


def parts_of(body: bytes) -> int:
    """How many fields, lists and objects there are."""
    return sum(int(((outside == ord(":")) | ((outside | 0x20) == ord("{"))).sum()) for outside in _outside(body))


def too_deep(body: bytes) -> bool:
    """Whether a JSON parser would ever be inside more than `DEPTH` lists and objects. Takes time proportional to the
    length, whatever the content, and no stack."""
    depth = 0
    for outside in _outside(body):
        folded = outside | 0x20  # [ and { become one, and ] and } do; nothing else does that JSON has outside strings
        steps = (folded == ord("{")).astype(np.int32) - (folded == ord("}"))
        depths = depth + np.cumsum(steps, dtype=np.int32)
        if depths.max(initial=0) > DEPTH:
            return True
        depth = int(depths[-1]) if len(depths) else depth
    return False


def _outside(body: bytes) -> Iterator[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """What stands outside of strings, block by block."""
    # A backslash is an escape only inside strings: without the pairs and the escaped quotes, quotes just alternate.
    plain = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = 0
    for start in range(0, len(plain), BLOCK):
        block = plain[start : start + BLOCK]
        parity = (np.cumsum(block == ord('"'), dtype=np.uint8) + np.uint8(inside)) & 1
        inside = int(parity[-1])
        yield block[parity == 0]


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, then what comes after it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def refuse(
    response: Response, scope: Scope, receive: Receive, send: Send, seconds: float = Limits.linger_seconds
) -> None:
    """Answer a request whose body has not been read. The answer goes out at once; what the client is still sending is
    then thrown away for `seconds`, within four times `BODY_LIMIT`, and the connection is closed: one that is closed
    with unread data is reset, and the client may never see the answer."""
    if not has_body(scope):
        return await response(scope, receive, send)
    response.headers["Connection"] = "close"
    start: Message = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    await send(start)
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            seen = 0
            while seen < 4 * BODY_LIMIT:
                message = await receive()
                seen += len(message.get("body", b""))
                if not message.get("more_body"):
                    break
    await send({"type": "http.response.body", "body": b"", "more_body": False})
