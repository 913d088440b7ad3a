"""The right to run one request: what it may need, its deadlines, and what is heard of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from lightship.engine import MAX_CONCURRENT, Event, GenerationParams
from lightship.errors import ClientLeft, Timeout, UsageError
from lightship.serving.prefix import Prefix


@dataclass(frozen=True)
class Limits:
    """What each engine may hold at once. Times are seconds.

    `blocks`: KV blocks of its pool, each for `block_tokens` tokens of one sequence. `max_concurrent`: sequences that
    run; `max_queue`: requests that wait. `first_token_deadline`: from arrival to the first token; `total_deadline`: to
    the last. `patience`: for how long smaller requests may overtake one that does not fit yet.
    """

    blocks: int
    block_tokens: int = 32
    max_concurrent: int = MAX_CONCURRENT
    max_queue: int = 256
    first_token_deadline: float = 60.0
    total_deadline: float | None = None
    patience: float = 5.0

    def __post_init__(self) -> None:
        for name in ("blocks", "block_tokens", "max_concurrent", "first_token_deadline", "total_deadline"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} is {value}, and must be above 0")
        for name in ("max_queue", "patience"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}, and must be 0 or more")


@dataclass(frozen=True)
class Demand:
    """What a request may need at most: tokens of each of its `prompts`, and of the `outputs` of each, for every one of
    `choices`. `key` is whose it is; the rates are the limits of that key, None for none. `prefix`: how its first prompt
    begins, where that is known. `beside`: its prompts are read beside the engine, one after the other, and it takes a
    single place there."""

    key: str
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    choices: int = 1
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    prefix: Prefix | None = field(default=None, compare=False)
    beside: bool = False

    @property
    def prompt(self) -> int:
        """Tokens to be read: a prompt counts once, however many choices it has."""
        return sum(self.prompts)

    @property
    def sequences(self) -> int:
        """Sequences in the engine."""
        return 1 if self.beside else self.choices * len(self.prompts)

    def blocks(self, block_tokens: int) -> int:
        """KV blocks in the worst case."""
        if self.beside:
            return 0
        lengths = zip(self.prompts, self.outputs, strict=True)
        return self.choices * sum(math.ceil((prompt + output) / block_tokens) for prompt, output in lengths)


class Observer(Protocol):
    """Who wants to hear of every request; `metrics.Metrics` does."""

    def rejected(self, reason: str) -> None:
        """Refused or given up: a limit's name, `too_large`, or `deadline`."""
        ...

    def admitted(self, ticket: Ticket) -> None:
        """It may run from now on."""
        ...

    def first_token(self, ticket: Ticket) -> None:
        """Its first token came, `ticket.ttft` seconds after it arrived."""
        ...

    def produced(self, tokens: int, seconds: float | None) -> None:
        """`tokens` more of a sequence came, `seconds` after those before them; None for the first."""
        ...

    def finished(self, ticket: Ticket) -> None:
        """It ended, as `ticket.finish` says."""
        ...


class Seat(Protocol):
    """The engine that a ticket was let in for, where there are several: `fleet.Seat`."""

    def generate(self, tokens: Sequence[int], params: GenerationParams) -> AsyncGenerator[Event, None]:
        """See `Worker.generate`."""
        ...

    async def recovered(self, timeout: float) -> None:
        """Wait for an engine that is ready, perhaps another one."""
        ...

    def leave(self) -> None:
        """Give the place back."""
        ...


class Seats(Protocol):
    """Several engines, each with a pool of its own: `fleet.Fleet`."""

    changed: Callable[[], None]

    @property
    def working(self) -> int:
        """Engines whose pools count now, at least one."""
        ...

    def has_room(self, blocks: int, sequences: int, limits: Limits) -> bool:
        """Whether one of them has so much free."""
        ...

    def seat(self, ticket: Ticket, limits: Limits) -> Seat:
        """A seat for `ticket`, for which there is room."""
        ...


class Gate(Protocol):
    """What a ticket opens, and what it tells of the request: `admission.Admission`."""

    limits: Limits
    now: Callable[[], float]

    def heard_first(self, ticket: Ticket, seconds: float) -> None:
        """Its prompt was read in `seconds`."""
        ...

    def heard(self, ticket: Ticket, count: int, seconds: float | None) -> None:
        """It gained `count` tokens, `seconds` after those before them; None for the first of an engine."""
        ...

    def heard_again(self, ticket: Ticket) -> None:
        """An engine gets it from its beginning, though it had tokens."""
        ...

    def release(self, ticket: Ticket) -> None:
        """It is closed."""
        ...


class Ticket:
    """The right to run one request, until `close`. An async context manager that closes itself.

    `queued` and `ttft`: seconds from arrival to admission and to the first token (None before it); `tokens`: produced
    so far; `finish`: why it ended, set by whoever knows: an engine's finish reason, `error`, `timeout`, or `abort` for
    one that was left. `seat`: the engine it is for, None where there is only one.
    """

    def __init__(self, gate: Gate, demand: Demand, blocks: int, arrived: float, admitted: float) -> None:
        self._gate = gate
        self.demand, self.blocks = demand, blocks
        self.arrived, self.started, self.ended = arrived, admitted, admitted
        self.queued = admitted - arrived
        self.ttft: float | None = None
        self.tokens = 0
        self.finish: str | None = None
        self.seat: Seat | None = None
        self._last = admitted
        self.reading = True  # no token has come since an engine got it
        self._closed = False

    @property
    def deadline(self) -> float | None:
        """When it ends at the latest, by the gate's clock: for its first token, after that as a whole."""
        limits = self._gate.limits
        ends = [None if self.ttft is not None else limits.first_token_deadline, limits.total_deadline]
        return min((self.arrived + end for end in ends if end is not None), default=None)

    def begin(self) -> None:
        """An engine gets it now, perhaps once more: the speeds count from here, and its tokens from nothing."""
        if self.tokens:
            self._gate.heard_again(self)
            self.tokens = 0
        self.started, self.reading = self._gate.now(), True

    def first_token(self, at: float | None = None) -> None:
        """The prompt has been read. Further calls change nothing."""
        if self.ttft is None and not self._closed:
            self._last = self._came(at)
            self.ttft = self._last - self.arrived
            self._gate.heard_first(self, max(0.0, self._last - self.started))

    def produced(self, count: int, at: float | None = None) -> None:
        """`count` tokens more have come, of whichever sequence. `at`: when the engine gave them (default: now), which
        may be long before a client that reads slowly lets them be taken."""
        if self._closed:
            return
        self.first_token(at)
        came = self._came(at)
        self._gate.heard(self, count, None if self.reading else came - self._last)
        self.reading = self.reading and not count
        self.tokens += count
        self._last = came

    def _came(self, at: float | None) -> float:
        """No later than now and no earlier than what came before: sequences are heard one after the other."""
        now = self._gate.now()
        return now if at is None else max(self._last, min(at, now))

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raise `Timeout` when what is awaited inside is not there by the deadline."""
        what = "the first token" if self.ttft is None else "the last token"
        async with until(self.deadline, self._gate.now(), f"{what} did not come in time"):
            yield

    async def watch(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """`events` of the engine within the deadlines, counted. Closing this closes them."""
        try:
            while True:
                if self.deadline is None:
                    event = await anext(events, None)
                else:
                    async with self.in_time():
                        event = await anext(events, None)
                if event is None:
                    return
                self.produced(len(event.token_ids), event.at)
                self.finish = event.finish_reason or self.finish
                yield event
        finally:
            await events.aclose()

    def close(self, error: BaseException | None = None) -> None:
        """Give the place back, after `error` where there was one. Further calls change nothing."""
        if self._closed:
            return
        self._closed = True
        if isinstance(error, Exception) and not isinstance(error, ClientLeft):
            self.finish = "timeout" if isinstance(error, Timeout) else "error"
        self.finish = self.finish or "abort"
        self._gate.release(self)

    async def __aenter__(self) -> Ticket:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


@asynccontextmanager
async def until(deadline: float | None, now: float, message: str) -> AsyncIterator[None]:
    """Raise `Timeout` when what is awaited inside takes longer than from `now` to `deadline`."""
    limit = asyncio.timeout(None if deadline is None else deadline - now)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise Timeout(message) from error
