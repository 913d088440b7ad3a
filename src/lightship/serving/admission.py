"""Who may use the engine now: a bounded queue, fair between keys, that never lets in more than its memory holds."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from lightship.errors import LightshipError, Overloaded, RequestError, Timeout
from lightship.serving.rates import KeyRates, Speed
from lightship.serving.ticket import Demand, Limits, Observer, Seats, Ticket, until

LONG = 1 / 8  # of the pool: a request that may need more is a long one
LONG_TOGETHER = 3 / 4  # of the pool: what long ones hold together at most while shorter ones wait
OUTPUT_WEIGHT = 2  # tokens of a prompt that one produced token counts for, as in the paper named at `Admission`
LONGEST_RETRY = 600  # seconds
WORTH_WAITING = 1 / 2  # of the deadline for the first token: who would probably wait longer is refused at once
GUESSED_PREFILL, GUESSED_DECODE = 100.0, 10.0  # tokens/s of a slow machine, for a server that was told nothing


@dataclass(frozen=True)
class Snapshot:
    """The state at a moment. Speeds are tokens/s of one sequence, as measured under the present load."""

    running: int
    sequences: int
    waiting: int
    waiting_by_key: dict[str, int]
    blocks: int
    blocks_used: int
    prefill_speed: float
    decode_speed: float


@dataclass(eq=False)
class _Waiting:
    demand: Demand
    blocks: int
    arrived: float
    turn: asyncio.Future[Ticket | LightshipError]
    overtaken: float | None = None  # when a later one first went before it


class Admission:
    """Lets requests in, as many as fit by their worst case.

    Between keys the one that was served least goes first, counting prompt tokens once and produced tokens
    `OUTPUT_WEIGHT` times; a key that begins to wait starts level with the least of those that wait. This is the
    virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), and needs no guess
    of what a request will produce. Within a key the oldest goes first. When the queue is full the key that has the
    most waiting loses its newest. Who would wait long, as measured so far, is refused at once: that client learns now
    what it would learn at the deadline, and nobody is kept waiting for nothing.

    A request that does not fit may be overtaken for `Limits.patience`; then everything behind it waits until it fits.
    Long requests are let in beyond `LONG_TOGETHER` of the pool only when no shorter one waits, or one at a time; one
    that waits for that holds up other long ones only.

    All of it runs in one event loop; nothing here blocks.
    """

    def __init__(
        self,
        limits: Limits,
        prefill: float | None = None,
        decode: float | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        seats: Seats | None = None,
        rates: KeyRates | None = None,
        begun: bool = True,
    ) -> None:
        """`prefill`, `decode`: tokens/s of one sequence to begin with, such as the bundle's report has them. `limits`
        are those of each engine: with several, `seats` finds each request one; the queue is one. `rates`: what keys
        have used, where that is to outlive this. Not `begun`: nobody is let in before `begin`."""
        self.limits, self.now = limits, clock
        self._begun = begun
        self._observer = observer
        self._seats = seats
        if seats is not None:
            seats.changed = self.fill
        self._rates = rates or KeyRates(clock)
        self._prefill = Speed(prefill or GUESSED_PREFILL, half_life=4000)
        self._decode = Speed(decode or GUESSED_DECODE, half_life=1000)
        self._usual_output: float | None = None  # tokens of a sequence
        self._queues: dict[str, deque[_Waiting]] = {}
        self._running: set[Ticket] = set()
        self._served: dict[str, float] = {}
        self._long: set[Ticket] = set()  # those that were long ones when they were let in
        self._blocks = self._sequences = 0

    def snapshot(self) -> Snapshot:
        """The state now."""
        waiting = {key: len(queue) for key, queue in self._queues.items()}
        blocks = self._pools * self.limits.blocks
        return Snapshot(len(self._running), self._sequences, sum(waiting.values()), waiting, blocks,
                        self._blocks, self._prefill.per_second, self._decode.per_second)  # fmt: skip

    @property
    def _pools(self) -> int:
        return 1 if self._seats is None else self._seats.working

    def begin(self, limits: Limits) -> None:
        """The engine is loaded, and what it holds is known: whoever waits for more than that hears it now."""
        self.limits, self._begun = limits, True
        for waiting in list(self._in_order()):
            try:
                waiting.blocks = self._check(waiting.demand)
            except RequestError as error:
                self._remove(waiting)
                self._tell(waiting, error)
        self.fill()

    def end(self, error: LightshipError) -> None:
        """There will be no engine: all that wait hear `error`."""
        for waiting in list(self._in_order()):
            self._remove(waiting)
            self._tell(waiting, error)

    async def enter(self, demand: Demand) -> Ticket:
        """Wait for a place. Raises `RequestError` for what never fits, `Overloaded` when the queue is full or too slow
        or the key has used what it may, and `Timeout` when the first token does not come within its deadline."""
        try:
            return await self._enter(demand)
        except Overloaded as error:
            self._reject(error.reason)
            raise
        except Timeout as error:
            error.retry_after = self._retry_after()
            self._reject("deadline")
            raise
        except RequestError:
            self._reject("too_large")
            raise

    async def _enter(self, demand: Demand) -> Ticket:
        blocks = self._check(demand)
        self._rates.take(demand.key, demand.prompt, demand.requests_per_minute, demand.tokens_per_minute)
        now = self.now()
        waiting = _Waiting(demand, blocks, now, asyncio.get_running_loop().create_future())
        self._join(waiting)
        self.fill()
        self._shed(waiting)
        self._turn_away(waiting)
        patient = min(self.limits.first_token_deadline, self.limits.total_deadline or math.inf)
        try:
            async with until(now + patient, now, "the server was too busy to begin this request in time"):
                got = await waiting.turn
        except BaseException as error:
            self._leave(waiting, refused=isinstance(error, Timeout))
            raise
        if not isinstance(got, Ticket):
            raise got
        return got

    def _reject(self, reason: str) -> None:
        if self._observer is not None:
            self._observer.rejected(reason)

    # ── The queue ───────────────────────────────────────────────────────────

    def _check(self, demand: Demand) -> int:
        limits, blocks, sequences = self.limits, demand.blocks(self.limits.block_tokens), demand.sequences
        many = f", in {sequences} sequences," if sequences > 1 else ""
        if blocks > limits.blocks:
            raise RequestError(
                f"{demand.prompt} prompt tokens and up to {max(demand.outputs)} new ones{many} need {blocks} blocks of "
                f"the KV cache, which has {limits.blocks} blocks of {limits.block_tokens} tokens; ask for fewer tokens",
                "max_tokens",
                "request_too_large",
            )
        if sequences > limits.max_concurrent:
            raise RequestError(
                f"{len(demand.prompts)} prompts × {demand.choices} choices make {sequences} sequences; this server "
                f"runs {limits.max_concurrent} at once",
                "n" if demand.choices > 1 else "prompt",
                "request_too_large",
            )
        return blocks

    def _join(self, waiting: _Waiting) -> None:
        key = waiting.demand.key
        if key not in self._queues:
            waits = [self._served[other] for other in self._queues]
            level = min(waits) if waits else max(self._served.values(), default=0.0)
            self._served[key] = max(self._served.get(key, 0.0), level)
            self._queues[key] = deque()
        self._queues[key].append(waiting)

    def _remove(self, waiting: _Waiting) -> None:
        key = waiting.demand.key
        self._queues[key].remove(waiting)
        if not self._queues[key]:
            del self._queues[key]
        if not self._queues:  # nobody is owed anything
            runs = {ticket.demand.key for ticket in self._running}
            self._served = {key: served for key, served in self._served.items() if key in runs}

    def _shed(self, arrived: _Waiting) -> None:
        """When more wait than may, refuse the newest of the key that has most: the one that just came, if it is its."""
        if sum(map(len, self._queues.values())) > self.limits.max_queue:
            newest = max(self._queues.values(), key=lambda queue: (len(queue), queue[-1] is arrived))[-1]
            self._refuse(newest, "too many requests wait", "queue_full")

    def _turn_away(self, arrived: _Waiting) -> None:
        """Refuse the one that just came when it would probably wait too long. Nothing is known of answers' lengths, and
        nobody turned away, before the first has ended."""
        if arrived.turn.done() or self._usual_output is None:
            return
        worth = WORTH_WAITING * self.limits.first_token_deadline
        if (wait := self._wait(arrived)) > worth:
            self._refuse(arrived, f"the first token would take about {math.ceil(wait)} s", "queue_slow")

    def _refuse(self, waiting: _Waiting, why: str, reason: str) -> None:
        self._remove(waiting)
        retry = self._retry_after()  # for those that stay
        self._tell(waiting, Overloaded(f"{why}; try again in {retry} s", retry, reason))

    def _tell(self, waiting: _Waiting, error: LightshipError) -> None:
        """It is let in no more, and it costs its key nothing."""
        self._rates.give_back(waiting.demand.key, waiting.demand.prompt)
        if not waiting.turn.done():
            waiting.turn.set_result(error)

    def _leave(self, waiting: _Waiting, refused: bool) -> None:
        """It was cancelled, or `refused` after too long a wait, perhaps in the moment in which its turn came. A client
        that gives up pays for a request all the same."""
        turn = waiting.turn
        if turn.done() and not turn.cancelled():
            if isinstance(got := turn.result(), Ticket):
                got.close()
            return
        turn.cancel()
        if waiting not in self._queues.get(waiting.demand.key, ()):
            return  # it was refused when it was already cancelled
        self._remove(waiting)
        if refused:
            self._rates.give_back(waiting.demand.key, waiting.demand.prompt)
        else:
            self._rates.spend(waiting.demand.key, -waiting.demand.prompt)
        self.fill()

    # ── Whose turn it is ────────────────────────────────────────────────────

    def fill(self) -> None:
        """Let in who fits now: there may be more room than before."""
        while (waiting := self._next()) is not None:
            self._admit(waiting)

    def _in_order(self) -> Iterator[_Waiting]:
        for key in sorted(self._queues, key=lambda key: (self._served[key], self._queues[key][0].arrived)):
            yield from (waiting for waiting in self._queues[key] if not waiting.turn.done())

    def _next(self) -> _Waiting | None:
        """The first in order that fits and that nobody before it holds up."""
        full = self._blocks >= self.limits.blocks or self._sequences >= self.limits.max_concurrent
        if not self._begun or (full and self._seats is None):
            return None
        shorter_waits = any(not self._is_long(waiting.blocks) for waiting in self._in_order())
        now, passed, long_held = self.now(), list[_Waiting](), False
        for waiting in self._in_order():
            obstacle = self._obstacle(waiting, shorter_waits)
            if obstacle is None and not (long_held and self._is_long(waiting.blocks)):
                for other in passed:
                    other.overtaken = now if other.overtaken is None else other.overtaken
                return waiting
            passed.append(waiting)
            if waiting.overtaken is not None and now - waiting.overtaken >= self.limits.patience:
                if obstacle == "room":
                    return None
                long_held = True
        return None

    def _is_long(self, blocks: int) -> bool:
        return blocks > LONG * self.limits.blocks

    def _obstacle(self, waiting: _Waiting, shorter_waits: bool) -> Literal["share", "room"] | None:
        if self._is_long(waiting.blocks) and self._long_blocks and shorter_waits:
            together = self._long_blocks + waiting.blocks
            if together > LONG_TOGETHER * self._pools * self.limits.blocks:
                return "share"
        return None if self._has_room(waiting.blocks, waiting.demand.sequences) else "room"

    def _has_room(self, blocks: int, sequences: int) -> bool:
        if self._seats is not None:
            return self._seats.has_room(blocks, sequences, self.limits)
        return (self._blocks + blocks <= self.limits.blocks
                and self._sequences + sequences <= self.limits.max_concurrent)  # fmt: skip

    def _admit(self, waiting: _Waiting) -> None:
        ticket = Ticket(self, waiting.demand, waiting.blocks, waiting.arrived, self.now())
        if self._seats is not None:
            ticket.seat = self._seats.seat(ticket, self.limits)
        self._running.add(ticket)
        self._count(ticket, 1)
        if self._is_long(ticket.blocks):
            self._long.add(ticket)
        self._served[ticket.demand.key] += ticket.demand.prompt
        self._remove(waiting)
        waiting.turn.set_result(ticket)
        if self._observer is not None:
            self._observer.admitted(ticket)

    def _count(self, ticket: Ticket, sign: int) -> None:
        self._blocks += sign * ticket.blocks
        self._sequences += sign * ticket.demand.sequences

    @property
    def _long_blocks(self) -> int:
        return sum(ticket.blocks for ticket in self._long)

    # ── What tickets tell ───────────────────────────────────────────────────

    def heard_first(self, ticket: Ticket, seconds: float) -> None:
        """A ticket's prompt was read in `seconds`."""
        demand = ticket.demand
        all_read = not any(demand.outputs)  # by an encoder; else those after the first may not have been read yet
        self._prefill.observe(demand.prompt if all_read else demand.prompts[0], seconds)
        if self._observer is not None:
            self._observer.first_token(ticket)

    def heard(self, ticket: Ticket, count: int, seconds: float | None) -> None:
        """A ticket gained `count` tokens, `seconds` after those before them; None for the first of an engine."""
        self._rates.spend(ticket.demand.key, count)
        self._served[ticket.demand.key] += OUTPUT_WEIGHT * count
        if not count:
            return
        apart = None if seconds is None else seconds * ticket.demand.sequences  # of one sequence's tokens
        if apart is not None:
            self._decode.observe(count, apart)
        if self._observer is not None:
            self._observer.produced(count, apart)

    def heard_again(self, ticket: Ticket) -> None:
        """An engine gets it once more: its tokens so far went with the one before, and are in no answer."""
        self._rates.spend(ticket.demand.key, -ticket.tokens)
        self._served[ticket.demand.key] -= OUTPUT_WEIGHT * ticket.tokens

    def release(self, ticket: Ticket) -> None:
        """A ticket is closed."""
        ticket.ended = self.now()
        self._running.remove(ticket)
        self._count(ticket, -1)
        self._long.discard(ticket)
        if ticket.finish in ("stop", "length") and any(ticket.demand.outputs):
            output = ticket.tokens / ticket.demand.sequences
            self._usual_output = output if self._usual_output is None else 0.9 * self._usual_output + 0.1 * output
        if self._observer is not None:
            self._observer.finished(ticket)
        if ticket.seat is not None:
            ticket.seat.leave()
        self.fill()

    def _retry_after(self) -> int:
        """Seconds until all that wait will have been served, or, when none does, until something that runs ends."""
        line = list(self._in_order())
        ends = [begin + self._seconds(each.demand) for each, begin in zip(line, self._begins(line), strict=True)]
        soonest = max(ends) if ends else min(map(self._left, self._running), default=0.0)
        return min(LONGEST_RETRY, max(1, math.ceil(soonest)))

    def _wait(self, arrived: _Waiting) -> float:
        """Seconds until the one that came last of its key will probably have its first token."""
        return self._begins([*self._before(arrived), arrived])[-1] + arrived.demand.prompt / self._prefill.per_second

    def _before(self, arrived: _Waiting) -> list[_Waiting]:
        """Who goes before it: what its key has waiting, and of every other key what begins in as much work as that."""
        found: dict[str, list[tuple[float, _Waiting]]] = {}
        for key, queue in self._queues.items():
            work, found[key] = 0.0, []
            for waiting in queue:
                if waiting is not arrived and not waiting.turn.done():
                    found[key].append((work, waiting))
                    work += self._seconds(waiting.demand)
        own = sum(self._seconds(waiting.demand) for _, waiting in found[arrived.demand.key])
        before = [each for each in chain.from_iterable(found.values()) if each[0] <= own]
        return [waiting for _, waiting in sorted(before, key=lambda each: (each[0], each[1].arrived))]

    def _begins(self, line: Sequence[_Waiting]) -> list[float]:
        """In how many seconds each of `line` is let in when they go in this order, at the measured speeds of one
        sequence: what runs ends one by one, and each that ends leaves its room to those that wait."""
        ends = [(self._left(ticket), number, ticket.blocks, ticket.demand.sequences)
                for number, ticket in enumerate(self._running)]  # fmt: skip
        heapq.heapify(ends)
        blocks = self._pools * self.limits.blocks - self._blocks
        sequences = self._pools * self.limits.max_concurrent - self._sequences
        now, found = 0.0, list[float]()
        for number, waiting in enumerate(line, len(ends)):
            while ends and (blocks < waiting.blocks or sequences < waiting.demand.sequences):
                now, _, freed, ended = heapq.heappop(ends)
                blocks, sequences = blocks + freed, sequences + ended
            found.append(now)
            blocks, sequences = blocks - waiting.blocks, sequences - waiting.demand.sequences
            end = now + self._seconds(waiting.demand)
            heapq.heappush(ends, (end, number, waiting.blocks, waiting.demand.sequences))
        return found

    def _left(self, ticket: Ticket) -> float:
        return self._seconds(ticket.demand, ticket.tokens, not ticket.reading)

    def _seconds(self, demand: Demand, produced: int = 0, read: bool = False) -> float:
        output = max(demand.outputs) if self._usual_output is None else min(max(demand.outputs), self._usual_output)
        left = max(0.0, output - produced / demand.sequences)
        return (0.0 if read else demand.prompt / self._prefill.per_second) + left / self._decode.per_second
