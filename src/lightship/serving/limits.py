"""What a request may cost before any of it is understood: bytes of its body."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightship.serving import errors

BODY_LIMIT = 8 * 2**20  # bytes of a request


class BodyLimit:
    """ASGI middleware: 413 for a body beyond `BODY_LIMIT`, declared or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what arrives."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_LIMIT:
                if message.get("more_body"):
                    await self._drain(receive)
                raise HTTPException(413, f"the body exceeds {BODY_LIMIT} bytes")
            return message

        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > BODY_LIMIT:
            await self._drain(receive)
            body = errors.envelope(f"the body exceeds {BODY_LIMIT} bytes", 413)
            await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, counted, send)

    @staticmethod
    async def _drain(receive: Receive) -> None:
        """Read what is still coming, within bounds: a connection closed with unread data is reset, and the client may
        lose the answer."""
        seen = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while seen < 4 * BODY_LIMIT:
                    message = await receive()
                    seen += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
