"""Several engines as one: each request gets a seat at the engine that knows its prompt or has the least to do.

When an engine goes, its seats move to the others at once, and the others are all there is until it is back.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied
from lightship.serving.placement import Place
from lightship.serving.prefix import BLOCK
from lightship.serving.supervisor import Care, Supervisor
from lightship.serving.ticket import Limits, Ticket

REMEMBERED = 16_384  # blocks of prompts, of an engine that does not tell the size of its cache
MUCH, SLACK = 2, 2048  # an engine with more than MUCH times the tokens of another, and SLACK, has much more to do


@dataclass(eq=False)
class _Member:
    """One engine, who sits there, and which beginnings of prompts it has read."""

    engine: Supervisor
    seats: set[Seat] = field(default_factory=set)
    blocks: int = 0
    sequences: int = 0
    read: OrderedDict[int, None] = field(default_factory=OrderedDict)
    restarts: int = 0  # when `read` began

    def has_room(self, blocks: int, sequences: int, limits: Limits) -> bool:
        return self.blocks + blocks <= limits.blocks and self.sequences + sequences <= limits.max_concurrent

    def load(self) -> int:
        """Tokens that its requests may still take."""
        return sum(seat.left() for seat in self.seats)

    def knows(self, marks: Sequence[int]) -> int:
        """How many of the leading blocks it has read."""
        if self.restarts != self.engine.restarts:
            self.restarts = self.engine.restarts
            self.read.clear()
        return next((number for number, mark in enumerate(marks) if mark not in self.read), len(marks))

    def learn(self, marks: Sequence[int]) -> None:
        stats = self.engine.stats
        most = stats["blocks"] * stats["block_tokens"] // BLOCK if stats.get("blocks") else REMEMBERED
        for mark in reversed(marks):  # a block is of use only with those before it: they are forgotten last
            self.read[mark] = None
            self.read.move_to_end(mark)
        while len(self.read) > most:
            self.read.popitem(last=False)

    def take(self, seat: Seat) -> None:
        self.seats.add(seat)
        self.blocks += seat.ticket.blocks
        self.sequences += seat.ticket.demand.sequences

    def give_back(self, seat: Seat) -> None:
        self.seats.remove(seat)
        self.blocks -= seat.ticket.blocks
        self.sequences -= seat.ticket.demand.sequences


class Seat:
    """The engine of one request, as `Supervisor` is one: what it may need at most is kept free there until `leave`."""

    def __init__(self, fleet: Fleet, ticket: Ticket, member: _Member, limits: Limits) -> None:
        self._fleet, self.ticket, self.member, self.limits = fleet, ticket, member, limits
        member.take(self)

    def left(self) -> int:
        """Tokens that are still to be read and written, at most."""
        demand = self.ticket.demand
        if demand.beside:
            return 0
        unread = demand.prompt if self.ticket.reading else 0
        return unread + max(0, sum(demand.outputs) * demand.choices - self.ticket.tokens)

    def generate(self, tokens: Sequence[int], params: GenerationParams) -> AsyncGenerator[Event, None]:
        """See `Worker.generate`."""
        return self.member.engine.generate(tokens, params)

    async def recovered(self, timeout: float) -> None:
        """Move to an engine that is ready and has room, or wait for one. Raises `EngineDied` after `timeout` seconds,
        or when all are down."""
        await self._fleet.moved(self, timeout)

    def move(self, member: _Member) -> None:
        """Sit there from now on."""
        self.member.give_back(self)
        self.member = member
        member.take(self)

    def leave(self) -> None:
        """Give the place back."""
        self.member.give_back(self)
        self._fleet.tell()


class Fleet:
    """As one `Supervisor`, but requests should come with a `seat`, which `Admission` asks for.

    A request goes where most of its beginning was read before, in blocks of `prefix.BLOCK` tokens, unless that engine
    has much more to do than the one with the least; then, and when nobody knows it, to that one. What an engine has
    read is forgotten with the engine, and what its cache cannot hold any more with time.
    """

    def __init__(self, target: str, settings: EngineSettings, care: Care | None, places: Sequence[Place]) -> None:
        self.engines = tuple(Supervisor(target, settings, care, place) for place in places)
        self._members = [_Member(engine) for engine in self.engines]
        self._by_prefix = settings.prefix_cache  # else it would help nobody
        self._pulse = asyncio.Event()
        self._moving: list[Seat] = []  # those that wait for room elsewhere, the first first
        self._begun = False
        self.changed: Callable[[], None] = lambda: None  # called when there may be more room than before
        for engine in self.engines:
            engine.changed = self.tell

    def tell(self) -> None:
        """Wake who waits for room or for an engine."""
        self._pulse.set()
        self._pulse = asyncio.Event()
        self.changed()

    # ── As one engine ───────────────────────────────────────────────────────

    @property
    def ready(self) -> bool:
        """Whether any takes requests; none does before all have been loaded, since only then all is known."""
        return self._begun and any(engine.ready for engine in self.engines)

    @property
    def live(self) -> bool:
        """Whether any works, loads or will be started again."""
        return any(engine.live for engine in self.engines)

    @property
    def alive(self) -> bool:
        """Whether there is any engine process."""
        return any(engine.alive for engine in self.engines)

    @property
    def failure(self) -> str | None:
        """Why one is not there now."""
        return next((engine.failure for engine in self.engines if engine.failure), None)

    @property
    def restarts(self) -> int:
        """How often any was replaced."""
        return sum(engine.restarts for engine in self.engines)

    @property
    def stats(self) -> dict[str, Any]:
        """Those of the first engine; what runs is summed, the use of the caches is their mean, and `blocks` the
        smallest pool."""
        every = [engine.stats for engine in self.engines]
        found = dict(every[0])
        for name, together in (("running", sum), ("waiting", sum), ("steps", sum), ("blocks", min)):
            if values := [stats[name] for stats in every if stats.get(name) is not None]:
                found[name] = together(values)
        if usage := [stats["cache_usage"] for stats in every if stats.get("cache_usage") is not None]:
            found["cache_usage"] = sum(usage) / len(usage)
        return found

    def resident(self) -> int | None:
        """Bytes of memory of all processes."""
        sizes = [size for engine in self.engines if (size := engine.resident()) is not None]
        return sum(sizes) if sizes else None

    def spawn(self) -> None:
        """See `Worker.spawn`."""
        for engine in self.engines:
            engine.spawn()

    def load(self, folder: Path) -> None:
        """See `Supervisor.load`."""
        for engine in self.engines:
            engine.load(folder)

    def kill(self) -> None:
        """See `Worker.kill`."""
        for engine in self.engines:
            engine.kill()

    async def start(self) -> None:
        """Wait until all are loaded. Raises the `EngineError` of the first that cannot be."""
        await asyncio.gather(*(engine.start() for engine in self.engines))
        self._begun = True

    async def close(self) -> None:
        """See `Supervisor.close`."""
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def generate(self, tokens: Sequence[int], params: GenerationParams) -> AsyncGenerator[Event, None]:
        """The events of a request without a seat, from the engine with the least to do."""
        return min(self._open(), key=_Member.load).engine.generate(tokens, params)

    async def recovered(self, timeout: float) -> None:
        """Wait until any is ready. Raises as `Seat.recovered`."""
        await self._until(lambda: self.ready, timeout)

    # ── Seats ───────────────────────────────────────────────────────────────

    @property
    def working(self) -> int:
        """Engines whose pools count now: those that are ready; while none is, those that may come back."""
        return len(self._open())

    def _open(self) -> list[_Member]:
        ready = [member for member in self._members if member.engine.ready]
        return ready or [member for member in self._members if not member.engine.down] or self._members

    def has_room(self, blocks: int, sequences: int, limits: Limits) -> bool:
        """Whether an engine has so much free."""
        return bool(self._fitting(blocks, sequences, limits))

    def _fitting(self, blocks: int, sequences: int, limits: Limits) -> list[_Member]:
        """Engines with so much free for who is new. Who lost its engine goes before: what it needs is kept free at the
        engine that has the most, and only there."""
        kept = {member: (0, 0) for member in self._open()}  # blocks and sequences

        def filled(member: _Member) -> float:
            held, running = member.blocks + kept[member][0], member.sequences + kept[member][1]
            return max(held / limits.blocks, running / limits.max_concurrent)

        for seat in self._moving:
            most = min(kept, key=filled)
            kept[most] = kept[most][0] + seat.ticket.blocks, kept[most][1] + seat.ticket.demand.sequences
        return [member for member, (held, running) in kept.items()
                if member.has_room(blocks + held, sequences + running, limits)]  # fmt: skip

    def seat(self, ticket: Ticket, limits: Limits) -> Seat:
        """A seat for `ticket`, for which there must be room."""
        marks = self._marks(ticket)
        member = self._best(ticket.blocks, ticket.demand.sequences, limits, marks)
        member.learn(marks)
        return Seat(self, ticket, member, limits)

    def _best(self, blocks: int, sequences: int, limits: Limits, marks: Sequence[int]) -> _Member:
        fitting = self._fitting(blocks, sequences, limits)
        least = min(fitting, key=_Member.load)
        nearest = max(fitting, key=lambda member: member.knows(marks)) if marks else least
        if not nearest.knows(marks) or nearest.load() > MUCH * least.load() + SLACK:
            return least
        return nearest

    async def moved(self, seat: Seat, timeout: float) -> None:
        """See `Seat.recovered`."""
        self._moving.append(seat)
        try:
            await self._until(lambda: self._move(seat), timeout)
        finally:
            self._moving.remove(seat)
            self.tell()

    def _move(self, seat: Seat) -> bool:
        if seat.member.engine.ready:
            return True
        blocks, sequences = seat.ticket.blocks, seat.ticket.demand.sequences
        fitting = [member for member in self._members
                   if member.engine.ready and member.has_room(blocks, sequences, seat.limits)]  # fmt: skip
        if fitting:
            seat.move(min(fitting, key=_Member.load))
            seat.member.learn(self._marks(seat.ticket))
        return bool(fitting)

    def _marks(self, ticket: Ticket) -> Sequence[int]:
        prefix = ticket.demand.prefix
        return prefix.marks if self._by_prefix and prefix is not None else ()

    async def _until(self, condition: Callable[[], bool], timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    if all(engine.down for engine in self.engines):
                        raise EngineDied(self.failure or "the engines were closed")
                    await self._pulse.wait()
        except TimeoutError as error:
            raise EngineDied(f"no engine is there after {timeout:.0f} s") from error


def open_engine(target: str, settings: EngineSettings, care: Care, places: Sequence[Place]) -> Supervisor | Fleet:
    """What generates: one engine as it is, or several as one."""
    if len(places) == 1:
        return Supervisor(target, settings, care, places[0])
    return Fleet(target, settings, care, places)
