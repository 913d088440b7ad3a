"""A client that may leave at any moment: whatever is done for it ends with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from lightship.errors import ClientLeft

Result = TypeVar("Result")
KEEP_ALIVE = 15.0  # seconds without a piece after which a stream begins, or says that it goes on
COMMENT = b": keep-alive\n\n"


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


async def begun(
    source: AsyncGenerator[Result, None], patience: float
) -> tuple[Result | None, AsyncGenerator[Result, None]]:
    """The first that `source` gives and the source of the others; None, and the source of all, when nothing comes for
    `patience` seconds. Closes the source when it is cancelled; raises what the source raises, and `StopAsyncIteration`.
    """
    waiting = asyncio.create_task(_next(source))
    try:
        await asyncio.wait({waiting}, timeout=patience)
    except BaseException:
        await _give_up(waiting, source)
        raise
    return (waiting.result(), source) if waiting.done() else (None, _after(waiting, source))


async def _after(waiting: asyncio.Task[Result], source: AsyncGenerator[Result, None]) -> AsyncGenerator[Result, None]:
    try:
        yield await waiting
        async for each in source:
            yield each
    finally:
        await _give_up(waiting, source)


async def _give_up(waiting: asyncio.Task[Result], source: AsyncGenerator[Result, None]) -> None:
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await source.aclose()


async def _next(source: AsyncGenerator[Result, None]) -> Result:
    return await anext(source)


class Stream(StreamingResponse):
    """Server-sent events. Closes its source however it ends, so that a client which leaves between two events frees the
    engine at once. Whenever nothing was sent for `silence` seconds it sends a comment, so that no proxy cuts it."""

    def __init__(
        self, source: AsyncGenerator[str, None], ended: Callable[[], None] = lambda: None, silence: float = KEEP_ALIVE
    ) -> None:
        """`ended` is called at the end, also where nothing of `source` was ever sent."""
        super().__init__(source, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source, self._silence, self._ended = source, silence, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(send, self._silence)
        try:
            await super().__call__(scope, receive, sender.send)
        finally:
            sender.stop()
            await self._source.aclose()
            self._ended()


class _Sender:
    """`send` of one response, which comments on silence between its start and its end."""

    def __init__(self, send: Send, silence: float) -> None:
        self._send, self._silence = send, silence
        self._last = 0.0
        self._commenting: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        """Pass it on."""
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.stop()  # nothing may follow the last message
        self._last = time.monotonic()
        await self._send(message)
        if message["type"] == "http.response.start":
            self._commenting = asyncio.create_task(self._comment())

    async def _comment(self) -> None:
        while True:
            quiet = time.monotonic() - self._last
            if quiet < self._silence:
                await asyncio.sleep(self._silence - quiet)
            else:
                await self.send({"type": "http.response.body", "body": COMMENT, "more_body": True})

    def stop(self) -> None:
        """No more comments."""
        if self._commenting is not None:
            self._commenting.cancel()
