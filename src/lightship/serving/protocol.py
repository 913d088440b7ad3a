"""uvicorn's HTTP/1.1 protocol with limits: time for a request's head, open connections, clients that do not read.

What it refuses itself is in the envelope of every error.

Held by tests to the uvicorn that is installed: it relies on `connections`, `conn`, `cycle`, `transport`, `loop`, and on
`send_400_response` being called where h11's error is being handled.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from lightship.serving.errors import failure
from lightship.serving.limits import HEADER_BYTES, Limits

log = logging.getLogger("lightship.serving")

MESSAGES = {
    400: "the request is not valid HTTP",
    408: "the head of the request did not arrive in time",
    413: "the body is sent in too many pieces",
    431: f"the headers exceed {HEADER_BYTES} bytes",
    501: "this transfer encoding is not supported",
    503: "too many connections are open; try again later",
}


class DoorLoop(asyncio.SelectorEventLoop):
    """Gives a TLS handshake as long as the head of a request has, where asyncio gives a minute: until it is done no
    one counts the connection."""

    handshake_seconds = Limits.head_seconds

    async def create_server(self, *arguments: Any, **options: Any) -> Any:
        """See `asyncio`'s."""
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = self.handshake_seconds
        return await super().create_server(*arguments, **options)


class _Connection(h11.Connection):
    """h11's state machine, which counts the pieces of a body: parsing one costs the same however small it is."""

    def __init__(self, pieces: int) -> None:
        super().__init__(h11.SERVER, HEADER_BYTES)
        self._most, self._pieces = pieces, 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = 0
        elif isinstance(event, h11.Data):
            self._pieces += 1
            if self._pieces > self._most:
                raise h11.RemoteProtocolError(MESSAGES[413], error_status_hint=413)
        return event


class DoorProtocol(H11Protocol):
    """One connection."""

    limits = Limits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Connection(self.limits.chunks)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._unwritten = 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock, or refuse."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self.limits.connections:
            transport.abort()
        elif sum(not getattr(each, "_refused", False) for each in self.connections) > self.limits.connections:
            self._refuse(503)
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take in what came, unless it is the rest of what was refused."""
        if not self._refused:
            super().data_received(data)
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for timer in (self._head_timer, self._write_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # ── A head that does not come ───────────────────────────────────────────

    def _watch_head(self) -> None:
        """A timer runs from the first byte of a head (of the first one: from the connection) until it is whole."""
        if self.conn.their_state is not h11.IDLE or self._refused:
            if self._head_timer is not None:
                self._head_timer.cancel()
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self._refuse(408)

    # ── A client that does not read ─────────────────────────────────────────

    def pause_writing(self) -> None:
        """More waits to be sent than is good; look whether it gets less."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        """A connection that is to be closed now is closed at last even if nobody reads the rest."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()

    def timeout_keep_alive_handler(self) -> None:
        """As above."""
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def _watch_writing(self) -> None:
        if self._write_timer is None:
            self._unwritten = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(self.limits.write_seconds, self._look_at_writing)

    def _look_at_writing(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() >= self._unwritten:
            return self.transport.abort()  # to the app this is a client that left
        self._watch_writing()

    # ── Refusals ────────────────────────────────────────────────────────────

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for anything that is not HTTP; h11 says by a status what it was."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status if status in MESSAGES else 400)

    def _refuse(self, status: int) -> None:
        """Answer and close. What the client still sends is thrown away for a while: closing at once would reset the
        connection, and the answer might be lost."""
        self._refused = True
        self._watch_head()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the app must not answer as well
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()  # an answer has begun: there is no place for another one
        response = failure(MESSAGES[status], status, code="invalid_http" if status in (400, 501) else None)
        headers = [*response.raw_headers, (b"connection", b"close")]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        self.transport.write(b"".join(filter(None, map(self.conn.send, (head, h11.Data(bytes(response.body)),
                                                                         h11.EndOfMessage())))))  # fmt: skip
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._end_within(self.limits.linger_seconds)

    def _end_within(self, seconds: float) -> None:
        self._end_timer = self._end_timer or self.loop.call_later(seconds, self.transport.abort)


def protocol_with(limits: Limits) -> type[DoorProtocol]:
    """The protocol class for `uvicorn.Config(http=…)`: uvicorn makes the instances itself."""
    return type("LimitedProtocol", (DoorProtocol,), {"limits": limits})
