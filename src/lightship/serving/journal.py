"""One JSON line for every request, with an id that the client is told. Never a prompt or an answer, unless asked."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightship.serving.ticket import Ticket

JSON = dict[str, Any]
ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
HEADER = b"x-request-id"
CLIENT_LEFT = 499  # as nginx writes it
LONGEST_PROMPT = 100_000  # characters that a line keeps


@dataclass
class Record:
    """What is to be written of a request. The route fills it in: `request.state.record`.

    `ticket` says how long it waited, how many tokens it took and how it ended; a route without one sets
    `prompt_tokens`. `prompt` is kept only by `note_prompt`, and only where prompts are wanted.
    """

    id: str
    keeps_prompt: bool = False
    ticket: Ticket | None = None
    prompt_tokens: int | None = None
    prompt: str | None = None

    def note_prompt(self, prompt: str) -> None:
        """Keep the prompt, where the operator has asked for prompts."""
        if self.keeps_prompt:
            self.prompt = prompt[:LONGEST_PROMPT]

    def figures(self) -> JSON:
        """Times in milliseconds, and counts of tokens; null for what did not happen."""
        ticket = self.ticket
        if ticket is None:
            return {"finish": None, "prompt_tokens": self.prompt_tokens, "output_tokens": None, "queue_ms": None,
                    "ttft_ms": None}  # fmt: skip
        return {"finish": ticket.finish, "prompt_tokens": ticket.demand.prompt, "output_tokens": ticket.tokens,
                "queue_ms": _milliseconds(ticket.queued), "ttft_ms": _milliseconds(ticket.ttft)}  # fmt: skip


class Journal:
    """ASGI middleware around the whole application, so that no response is without its id.

    A client may send `X-Request-Id` (1 … 64 characters of `[A-Za-z0-9._-]`), else one is made; it goes into
    `request.state.id`, into the response and into the line that is written when the response has ended, however it
    ended. `status` is 499 when the client left before the response began. `answered` is told each status.
    """

    def __init__(
        self,
        app: ASGIApp,
        logger: logging.Logger,
        log_prompts: bool = False,
        answered: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app, self._logger, self._log_prompts, self._answered = app, logger, log_prompts, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and write the line."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(_id_of(scope), self._log_prompts)
        scope.setdefault("state", {}).update(id=record.id, record=record)
        watched = _Watched(record.id, receive, send)
        try:
            await self._app(scope, watched.receive, watched.send)
        finally:
            if record.ticket is not None:
                record.ticket.close()  # whatever became of the route, its place in the engine is free again
            self._answered(watched.status)
            self._write(scope, record, watched)

    def _write(self, scope: Scope, record: Record, watched: _Watched) -> None:
        key = scope["state"].get("key")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": record.id,
            "key": getattr(key, "id", None),
            "method": scope["method"],
            "route": getattr(scope.get("route"), "path", None),  # the pattern, not what a client may have written
            "status": watched.status,
            "client_left": watched.left,
            **record.figures(),
            "total_ms": _milliseconds(time.monotonic() - watched.began),
        }
        if record.prompt is not None:
            line["prompt"] = record.prompt
        self._logger.info(json.dumps(line, ensure_ascii=False, separators=(",", ":")))


class _Watched:
    """The two channels of a request: puts the id into the response, and sees how it went."""

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self._id, self._receive, self._send = request_id, receive, send
        self._began_response: int | None = None
        self._complete = False
        self.left = False
        self.began = time.monotonic()

    @property
    def status(self) -> int:
        """What the client was answered; 500 stands for an application that failed before it answered."""
        if self._began_response is not None:
            return self._began_response
        return CLIENT_LEFT if self.left else 500

    async def receive(self) -> Message:
        """A message of the client."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        """A message to the client."""
        if message["type"] == "http.response.start":
            if not self.left:
                self._began_response = message["status"]
            others = [(name, value) for name, value in message.get("headers", ()) if name.lower() != HEADER]
            message = {**message, "headers": [*others, (HEADER, self._id.encode())]}
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self._complete = True
        try:
            await self._send(message)
        except OSError:
            self.left = True
            raise


def _id_of(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == HEADER]
    if len(given) == 1 and ID.fullmatch(given[0]):
        return bytes(given[0]).decode()
    return "req-" + secrets.token_hex(12)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


# ── Where the lines go ──────────────────────────────────────────────────────


class Sink(logging.Handler):
    """A log handler that neither fails nor delays a request: a thread of its own writes, and lines are dropped while
    the disk is full or the pipe is stuck and `room` lines wait. `dropped` counts them; when writing works again, a line
    says how many were lost. `target`: a file, which is appended to, or a file descriptor, which is left open."""

    def __init__(self, target: Path | int, room: int = 10_000) -> None:
        super().__init__()
        self._owned = isinstance(target, Path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(target, flags, 0o640) if isinstance(target, Path) else target
        self._lines: queue.Queue[bytes | None] = queue.Queue(room)
        self._counting = threading.Lock()
        self.dropped = 0
        self._told = 0  # of those dropped, how many a line has told of
        self._torn = False  # whether the last line was written in part
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the line over."""
        try:
            self._lines.put_nowait(self.format(record).encode("utf-8", "backslashreplace") + b"\n")
        except queue.Full:
            self._drop()

    def stop(self) -> None:
        """Write what waits, for 2 seconds at most, and end. Not called `close`: `logging.config` closes every handler
        there is when somebody configures logging, as uvicorn does."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(1)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._tell()
                self._write(line)
            except OSError:
                self._drop()
        if self._owned:
            os.close(self._descriptor)

    def _drop(self) -> None:
        with self._counting:
            self.dropped += 1

    def _tell(self) -> None:
        """Say what was lost, once it can be said."""
        lost = self.dropped - self._told
        if lost:
            says = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": "log_lines_dropped"}
            self._write(json.dumps({**says, "lines": lost}).encode() + b"\n")
            self._told += lost

    def _write(self, line: bytes) -> None:
        """All of it, or `OSError`. A line of which a part was written is ended first, so that it spoils no other."""
        line = b"\n" + line if self._torn else line
        written = os.write(self._descriptor, line)
        while written < len(line):
            self._torn = True
            written += os.write(self._descriptor, line[written:])
        self._torn = False


def journal_to(target: Path | int) -> tuple[logging.Logger, Sink]:
    """A logger for `Journal` that writes to a file or descriptor and nowhere else."""
    sink = Sink(target)
    sink.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger("lightship.journal", logging.INFO)
    logger.addHandler(sink)
    return logger, sink
