"""One streamed request: when it was due, sent, first answered and done, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from lightship.bench.wire import Answer, Door, events

Clock = Callable[[], float]
Outcome = Literal["whole", "stopped", "short", "refused", "failed", "broken", "timeout", "left"]
ENDED_ITSELF = ("stop", "tool_calls", "function_call")


@dataclass(frozen=True)
class Asked:
    """One request. `max_tokens` is what was asked for (None: no limit); with `exact` an answer that the model ends
    before that is too short, without it is what was wanted. `at`: seconds after the start when it is due, None in a
    closed loop. `leave_after`: close the connection after so many pieces, as clients do that lose their patience."""

    number: int
    path: str
    body: bytes
    max_tokens: int | None
    exact: bool = True
    at: float | None = None
    leave_after: int | None = None


@dataclass(frozen=True)
class Seen:
    """What one request saw. Times in seconds on the clock of its run; None: did not happen.

    `outcome`: whole; stopped (the model ended it before the length that was asked for); short (ended with fewer tokens
    than that, for no reason of the model's own); refused (429, or 503 with a time to retry); failed (another status, or
    an error in the stream); broken (broke off, or no connection); timeout; left (this client left on purpose).
    `tokens` come from the server's usage where `counted` is "usage", else they are the pieces of text that came.
    """

    number: int
    outcome: Outcome
    scheduled: float
    sent: float
    first: float | None = None
    last: float | None = None
    ended: float = 0.0
    tokens: int = 0
    counted: Literal["usage", "pieces"] = "pieces"
    prompt_tokens: int | None = None
    finish: str | None = None
    status: int | None = None
    retry_after: bool = False
    reason: str | None = None

    @property
    def answered(self) -> bool:
        """It came to an end of its own with at least one token: its times say how fast the server is."""
        return self.outcome in ("whole", "stopped")

    @property
    def delay(self) -> float:
        """How late the generator itself was."""
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float | None:
        """From the schedule to the first text; to the first token where the server tells the usage with each chunk."""
        return None if self.first is None or not self.answered else self.first - self.scheduled

    @property
    def tpot(self) -> float | None:
        """(last − first) / (tokens − 1)."""
        if self.first is None or self.last is None or self.tokens < 2 or not self.answered:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def e2e(self) -> float | None:
        """From the schedule to the end; only of whole answers, since one that ends early ends soon."""
        return self.ended - self.scheduled if self.outcome == "whole" else None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def visible(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)))


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None


CHUNK = msgspec.json.Decoder(_Chunk)


class _Reading:
    """What was read so far of one answer; it lives through a time-out."""

    def __init__(self, asked: Asked, clock: Clock) -> None:
        self._asked, self._clock = asked, clock
        self.status: int | None = None
        self.retry_after = False
        self.first: float | None = None
        self.last: float | None = None
        self.pieces = 0
        self.usage = _Usage()
        self.finish: str | None = None
        self.reason: str | None = None
        self.done = False

    async def take(self, answer: Answer) -> Outcome:
        """Read the answer to its end."""
        self.status = answer.status
        self.retry_after = "retry-after" in answer.headers
        if answer.status != 200:
            self.reason = message(await answer.read(), answer.status)
            pushed_back = answer.status == 429 or (answer.status == 503 and self.retry_after)
            return "refused" if pushed_back else "failed"
        if not answer.headers.get("content-type", "").lower().startswith("text/event-stream"):
            self.reason = "the answer is not streamed"
            return "failed"
        async for data in events(answer):
            if data == b"[DONE]":
                self.done = True
                continue
            chunk = CHUNK.decode(data)
            if chunk.error is not None or chunk.object == "error":
                self.reason = message(data, 200)
            self._take(chunk)
            if self._asked.leave_after is not None and self.pieces >= self._asked.leave_after:
                return "left"
        return self._judge()

    def _take(self, chunk: _Chunk) -> None:
        counted = chunk.usage is not None and (chunk.usage.completion_tokens or 0) > (self.usage.completion_tokens or 0)
        for choice in chunk.choices:
            if visible := choice.visible():
                self.pieces += 1
            if visible or counted or choice.finish_reason is not None:
                self.last = self._clock()
                self.first = self.last if self.first is None else self.first
                self.finish = choice.finish_reason or self.finish
        self.usage = chunk.usage or self.usage

    @property
    def tokens(self) -> int:
        counted = self.usage.completion_tokens
        return self.pieces if counted is None else counted

    def _judge(self) -> Outcome:
        """How an answer ended that was read to its end."""
        if self.reason is not None:
            return "failed"
        if not self.done and self.finish is None:
            self.reason = "the stream ended without an end"
            return "broken"
        wanted = self._asked.max_tokens
        if not self.tokens:
            self.reason = "no token came"
            return "short"
        if wanted is None or self.tokens >= wanted:
            return "whole"
        if self.finish in ENDED_ITSELF:
            return "stopped" if self._asked.exact else "whole"
        if self.finish == "length" and self.usage.completion_tokens is None:
            return "whole"  # a piece may hold several tokens
        self.reason = f"{self.tokens} of {wanted} tokens, finish_reason {self.finish}"
        return "short"


async def ask(door: Door, asked: Asked, clock: Clock, scheduled: float, timeout: float) -> Seen:
    """Send one request and read its answer, for `timeout` seconds at most. Never raises for what the server does."""
    reading, sent = _Reading(asked, clock), clock()
    try:
        async with asyncio.timeout(timeout):
            answer = await door.send(door.request("POST", asked.path, asked.body))
            try:
                outcome = await reading.take(answer)
            finally:
                answer.close()
    except TimeoutError:
        outcome, reading.reason = "timeout", f"no end within {timeout:g} s"
    except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
        outcome, reading.reason = "broken", f"{type(error).__name__}: {error}"
    return Seen(
        asked.number, outcome, scheduled, sent, reading.first, reading.last, clock(), reading.tokens,
        "pieces" if reading.usage.completion_tokens is None else "usage", reading.usage.prompt_tokens,
        reading.finish, reading.status, reading.retry_after, reading.reason,
    )  # fmt: skip


def message(body: bytes, status: int) -> str:
    """What an error says, in OpenAI's envelope or another."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        text = body.decode("utf-8", "replace").strip()
        return text[:300] or f"status {status}"
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        error = error.get("message", error.get("detail", error))
    return str(error)[:300]
