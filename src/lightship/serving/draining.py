"""The end of a server: readiness goes first, what runs may finish, then the engine and the process end."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from lightship.serving import errors

log = logging.getLogger("lightship.serving")
STILL_ANSWERED = (*errors.OPEN, "/metrics")
LAST_WORDS = 2  # seconds in which streams that are cut off can still tell their clients


class Door:
    """Counts the requests inside; `closing`, it lets no more in."""

    def __init__(self) -> None:
        self.running = 0
        self.closing = False


class Turnstile:
    """ASGI middleware: who comes while the server ends gets 503 at once, and may try again elsewhere."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count, or refuse."""
        if scope["type"] != "http" or scope["path"] in STILL_ANSWERED:
            await self._app(scope, receive, send)
        elif self._door.closing:
            headers = {"Retry-After": "1", "Connection": "close"}
            refusal = errors.failure("the server is stopping", 503, code="stopping", headers=headers)
            await refusal(scope, receive, send)
        else:
            self._door.running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._door.running -= 1


class DrainingServer(uvicorn.Server):
    """Ends on the first signal once nothing runs, after `drain` seconds at the latest; on the second at once.

    `abort` ends the engine: streams that still run then tell their clients so, instead of breaking off.
    """

    def __init__(
        self, config: uvicorn.Config, door: Door, abort: Callable[[], Awaitable[None]], drain: float = 30
    ) -> None:
        config.timeout_graceful_shutdown = LAST_WORDS
        super().__init__(config)
        self._door, self._abort, self._drain = door, abort, drain
        self._latest = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self._door.closing:
            self._latest = time.monotonic()
            return
        self._door.closing = True
        self._latest = time.monotonic() + self._drain

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end now."""
        if self._door.closing and not self.should_exit:
            late = time.monotonic() >= self._latest
            if late and self._door.running:
                log.warning("%d requests are cut off", self._door.running)
                await self._abort()
            self.should_exit = late or not self._door.running
        return await super().on_tick(counter)
