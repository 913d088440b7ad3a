"""A client that may leave at any moment: whatever is done for it ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lightship.errors import ClientLeft

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled, and with it the request in the engine, when the client goes away."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def wrapped() -> Result:
        return await work

    working, gone = asyncio.create_task(wrapped()), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft("the client closed the connection")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def pulsing(source: AsyncGenerator[Result, None], interval: float) -> AsyncGenerator[Result | None, None]:
    """What `source` gives, and None whenever nothing came for `interval` seconds. Closes it when it is closed."""
    waiting: asyncio.Task[Result] | None = None
    try:
        while True:
            waiting = waiting or asyncio.create_task(_next(source))
            if not (await asyncio.wait({waiting}, timeout=interval))[0]:
                yield None
                continue
            try:
                got = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield got
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await source.aclose()


async def _next(source: AsyncGenerator[Result, None]) -> Result:
    return await anext(source)


class Stream(StreamingResponse):
    """Closes its source however it ends, so that a client which leaves between two chunks frees the engine at once."""

    def __init__(self, source: AsyncGenerator[str, None], ended: Callable[[], None] = lambda: None) -> None:
        """`ended` is called at the end, also where nothing of `source` was ever sent."""
        super().__init__(source, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source, self._ended = source, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()
            self._ended()
